"""Rankings: what their bodies mean, their scores against plain numpy, their replies; one pass of the engine for all.

Real servers rank in end_to_end.
"""

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import httpx2
import numpy as np
import orjson
import pytest
from api_limits import limits
from conftest import GOLDEN
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from jina_v4_serve.api import ranking
from jina_v4_serve.api.door import Door
from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.api.forms import rankings
from jina_v4_serve.api.forms.errors import error_body
from jina_v4_serve.api.forms.schema import parse
from jina_v4_serve.api.guard import Guard
from jina_v4_serve.api.images import ImageLoader
from jina_v4_serve.api.pdf import PdfReader
from jina_v4_serve.api.prompts import PromptMaker
from jina_v4_serve.api.request import EmbedRequest, RankRequest
from jina_v4_serve.api.routes import attach_routes
from jina_v4_serve.api.service import Service
from jina_v4_serve.api.vectors import Vectors
from jina_v4_serve.settings import SERVED_TASKS, read_settings
from tokenizers import Tokenizer
from unit_rows import to_unit
from wire import IMAGES_BASE64

RANK = {"query": "q", "documents": ["a", "b"]}


def asked(served: str = "retrieval", /, **fields: Any) -> RankRequest:
    body = orjson.dumps({**RANK, **fields})
    return rankings.settle_rerank(parse(body, rankings.RerankBody), limits(served))


def scored(**fields: Any) -> RankRequest:
    return rankings.settle_score(parse(orjson.dumps(fields), rankings.ScoreBody), limits("retrieval"))


def vectors(n_tokens: int, seed: int) -> Vectors:
    random = np.random.default_rng(seed)
    dense, rows = (to_unit(random.standard_normal(shape)) for shape in ((1, 256), (n_tokens, 128)))
    return Vectors(dense, rows, n_tokens)


@settings(deadline=None)
@given(st.integers(1, 40), st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(1, 5000))
def test_maxsim_is_the_mean_of_the_best_however_it_is_cut_into_blocks(
    n_tokens: int, lengths: list[int], n_bytes: int
) -> None:
    query, documents = vectors(n_tokens, 0), [vectors(n, i + 1) for i, n in enumerate(lengths)]
    expected = [
        sum(max(float(a @ b) for b in document.multivector) for a in query.multivector) / n_tokens
        for document in documents
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "_BLOCK_BYTES", n_bytes)
        found = ranking.scores([query], documents, "multivector")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_ranking_by_dense_is_by_the_cosine() -> None:
    query, documents = vectors(3, 0), [vectors(2, 1), vectors(5, 2)]
    expected = [float(query.dense[0] @ document.dense[0]) for document in documents]
    np.testing.assert_allclose(ranking.scores([query], documents, "dense"), expected, atol=1e-6)


def test_each_document_may_have_its_own_query() -> None:
    queries, documents = [vectors(3, 0), vectors(9, 1)], [vectors(4, 2), vectors(5, 3)]
    found = ranking.scores(queries, documents, "multivector")
    assert found.tolist() == [ranking.maxsim(*pair) for pair in zip(queries, documents, strict=True)]


def test_equal_scores_keep_the_order_of_the_documents() -> None:
    found = np.array([0.5, 0.7, 0.5, 0.7, 0.1], dtype=np.float32)
    assert ranking.order(found, None) == [1, 3, 0, 2, 4]
    assert ranking.order(found, 3) == [1, 3, 0]
    assert ranking.order(found, 99) == [1, 3, 0, 2, 4]


@pytest.mark.parametrize(
    ("task", "model", "prefixes"),
    [
        ("retrieval", None, ("Query: ", "Passage: ")),
        ("code", "jina-embeddings-v4-code", ("Query: ", "Passage: ")),
        ("text-matching", "jina-embeddings-v4", ("Query: ", "Query: ")),
        ("retrieval", "jina-embeddings-v4-none", ("", "")),
        ("retrieval", "our-name", ("Query: ", "Passage: ")),
    ],
)
def test_queries_and_documents_have_prompts_of_their_own(
    task: str, model: str | None, prefixes: tuple[str, str]
) -> None:
    found = asked(task, model=model, task=task)
    assert (found.queries.prefix, found.documents.prefix) == prefixes
    assert [item.path for item in found.queries.items] == ["query"]
    assert [item.path for item in found.documents.items] == ["documents[0]", "documents[1]"]


def test_only_the_vectors_that_are_compared_are_computed() -> None:
    assert asked().queries.outputs == asked().documents.outputs == {"multivector"}
    assert asked(by="multivector") == asked()
    assert asked(by="dense").documents.outputs == {"dense"}


def test_each_side_has_its_own_limit_of_tokens() -> None:
    found = asked(max_tokens_per_query=7, max_tokens_per_doc=50)
    assert (found.queries.max_length, found.documents.max_length) == (7, 50)
    found = asked(max_tokens_per_query=0, max_tokens_per_doc=50, truncate=True)
    assert (found.queries.max_length, found.documents.max_length) == (1000, 50)
    assert asked(truncate=False).documents.max_length is None


@pytest.mark.parametrize("first", ["queries", "text_1", "data_1"])
@pytest.mark.parametrize("second", ["documents", "text_2", "data_2", "items"])
def test_vllms_names_of_queries_and_documents_are_taken(first: str, second: str) -> None:
    found = scored(**{first: "q", second: ["a", {"content": [{"type": "text", "text": "b"}]}]})
    assert [item.text for item in found.queries.items] == ["q"]
    assert [item.text for item in found.documents.items] == ["a", "b"]
    assert found.documents.items[0].path == f"{second}[0]"


def test_fields_of_other_servers_are_named() -> None:
    assert asked(odd=1, priority=3, overlap_tokens=80).documents.ignored == ["odd", "overlap_tokens"]


def test_an_error_of_v2_is_in_coheres_shape() -> None:
    error = ApiError(422, "why", code="X")
    assert orjson.loads(error_body(error, "id", "/v2/rerank")) == {"id": "id", "message": "why"}
    assert orjson.loads(error_body(error, "id", "/v1/rerank")).keys() == {"error", "detail", "errors"}


def replied(content: dict[str, Any]) -> Any:
    return orjson.loads(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY))


@pytest.mark.parametrize(
    ("return_documents", "of_jina", "of_cohere"),
    [(None, (True, False), (False, False)), (True, (True, True), (True, True)), (False, (False,) * 2, (False,) * 2)],
)
def test_a_reply_has_its_documents_where_they_are_asked_for(
    return_documents: bool | None, of_jina: tuple[bool, bool], of_cohere: tuple[bool, bool]
) -> None:
    request = asked(documents=["a", {"image": "data:y"}], return_documents=return_documents)
    found = [vectors(3, 0), vectors(4, 1), vectors(5, 2)]
    for write, shown in ((rankings.write_rerank, of_jina), (rankings.write_cohere, of_cohere)):
        results = {result["index"]: result for result in replied(write(request, found, "id"))["results"]}
        documents = [{"text": "a"}, {"image": "data:y"}]
        assert [results[i].get("document") for i in range(2)] == [
            document if is_shown else None for document, is_shown in zip(documents, shown, strict=True)
        ]


def test_each_route_replies_in_its_own_shape() -> None:
    found = [vectors(3, 0), vectors(4, 1), vectors(5, 2)]
    body = replied(rankings.write_rerank(asked(top_n=1, model="our-name"), found, "some-id"))
    assert body | {"results": None} == {
        "id": "some-id",
        "object": "list",
        "model": "our-name",
        "usage": {"prompt_tokens": 12, "total_tokens": 12},
        "results": None,
    }
    assert len(body["results"]) == 1
    body = replied(rankings.write_cohere(asked(documents=["a", {"image": "y"}]), found, "some-id"))
    assert body.keys() == {"id", "results", "meta"}
    assert body["meta"]["billed_units"] == {"input_tokens": 7, "image_tokens": 5}
    assert all(result.keys() == {"index", "relevance_score"} for result in body["results"])
    body = replied(rankings.write_score(scored(text_1="q", text_2=["a", "b"]), found, "some-id"))
    assert body.keys() == {"id", "object", "created", "model", "data", "usage"}
    assert [(item["index"], item["object"]) for item in body["data"]] == [(0, "score"), (1, "score")]


class Engine:
    """Stands for vLLM: rows that the token ids of a prompt decide, of unit length; it keeps what it was asked for."""

    dead = False
    n_waiting = 0

    def __init__(self) -> None:
        self.calls: list[tuple[int, EmbedRequest]] = []
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()

    async def embed(self, prompts: Sequence[Any], _: str, request: EmbedRequest, **__: object) -> list[Vectors]:
        self.calls.append((len(prompts), request))
        await self.may_go_on.wait()
        return [vectors(len(prompt.token_ids), sum(prompt.token_ids)) for prompt in prompts]


def served(monkeypatch: pytest.MonkeyPatch, engine: Engine, budget_tokens: int = 10**6) -> httpx2.AsyncClient:
    """Return a client of our routes with a stand-in for the engine."""
    monkeypatch.setenv(SERVED_TASKS, "retrieval")
    read, known = read_settings(), limits("retrieval")
    tokenizer = Tokenizer.from_file(str(GOLDEN / "checkpoint" / "tokenizer.json"))
    prompts = PromptMaker(tokenizer, known.max_length, known.prompts["retrieval"].image)
    app = FastAPI()
    attach_routes(app)
    app.add_middleware(Guard)
    app.state.jina_v4 = Service(engine, known, Door(read), ImageLoader(read), PdfReader(read), prompts, budget_tokens)
    app.state.server = SimpleNamespace()
    transport = httpx2.ASGITransport(app=app)
    return httpx2.AsyncClient(transport=transport, base_url="http://door")


async def test_a_ranking_is_one_pass_of_the_engine_and_no_vector_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    body = {"query": "q", "documents": ["Passage: a", "b", {"image": IMAGES_BASE64[0]}]}
    async with served(monkeypatch, engine) as http:
        answer = await http.post("/v1/rerank", json=body)
        assert answer.status_code == 200, answer.text
        ((n_prompts, request),) = engine.calls
        assert n_prompts == 4, "the query once, each document once"
        assert request.outputs == {"multivector"}
        assert answer.headers["x-jina-v4-prompt"] == "query, passage, image"
        assert answer.headers["x-jina-v4-warning"] == (
            "texts that already began with 'Passage:', which was added again: documents[0]"
        )
        assert len(answer.content) < 500
        assert (await http.post("/v1/rerank", json={**body, "by": "dense"})).status_code == 200
        assert engine.calls[1][1].outputs == {"dense"}


@pytest.mark.parametrize(("path", "body"), [("/v1/rerank", RANK), ("/v2/rerank", RANK), ("/v1/score", {"text_1": "q"})])
async def test_a_ranking_counts_in_the_budget_as_its_texts_do(
    path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine()
    engine.may_go_on.clear()
    documents = {"text_2" if "text_1" in body else "documents": ["a b c d " * 20] * 2}
    async with asyncio.timeout(60), served(monkeypatch, engine, budget_tokens=90) as http:
        first = asyncio.create_task(http.post(path, json=body | documents))
        while not engine.calls:
            await asyncio.sleep(0.01)
        refused = await http.post(path, json=body | documents)
        assert (refused.status_code, int(refused.headers["retry-after"]) > 0) == (429, True)
        assert refused.json().keys() == ({"id", "message"} if path == "/v2/rerank" else {"error", "detail"})
        engine.may_go_on.set()
        assert (await first).status_code == 200
        assert len(engine.calls) == 1
