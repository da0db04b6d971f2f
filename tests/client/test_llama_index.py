"""LlamaIndex's embedding without a model: what is sent, with threads and coroutines; errors, dumps, the extra.

With a model and an index: tests/end_to_end/one_server/test_frameworks.py.
"""

import asyncio
import base64
import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import GOLDEN
from jina_v4_client import ArgumentError, ImageError, ServerAuthenticationError
from jina_v4_client.integrations.llama_index import JinaV4Embedding
from llama_index.core.storage.kvstore import SimpleKVStore

IMAGES = [str(path) for path in sorted((GOLDEN / "img").glob("*.png"))]
TEXTS = [f"text {i}" for i in range(70)]
Make = Callable[..., JinaV4Embedding]


@pytest.fixture
def make(server: Any) -> Iterator[Make]:
    """Make embeddings by the played gateway; all are closed at the end."""
    server.play_gateway()
    made = []

    def make_one(**arguments: Any) -> JinaV4Embedding:
        made.append(JinaV4Embedding(server.url, **{"client_options": {"max_retries": 0}, **arguments}))
        return made[-1]

    yield make_one
    for embedding in made:
        embedding.close()


def data_uri(path: str) -> str:
    return f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


def vectors(server: Any, items: list[str]) -> list[list[float]]:
    return [server.vector(item).tolist() for item in items]


def test_texts_are_passages_queries_are_queries_and_images_have_no_prompt(server: Any, make: Make) -> None:
    embedding = make()
    assert embedding.get_text_embedding("a") == server.vector("Passage: a").tolist()
    assert embedding.get_query_embedding("a") == server.vector("Query: a").tolist()
    assert embedding.get_image_embedding(IMAGES[0]) == server.vector(data_uri(IMAGES[0])).tolist()
    in_memory = io.BytesIO(Path(IMAGES[0]).read_bytes())
    in_memory.read()  # from wherever it stands
    assert embedding.get_image_embedding(in_memory) == server.vector(data_uri(IMAGES[0])).tolist()


def test_batches_go_as_few_requests_and_keep_their_order(server: Any, make: Make) -> None:
    embedding = make()
    assert embedding.get_text_embedding_batch(TEXTS) == vectors(server, [f"Passage: {text}" for text in TEXTS])
    assert embedding.get_image_embedding_batch(IMAGES) == vectors(server, [data_uri(path) for path in IMAGES])
    sizes = sorted(len(body["input"]) for body in server.bodies("/v1/embeddings"))
    assert sizes == [4, 6, 32, 32]


def test_coroutines_give_the_same_in_any_number_of_event_loops(server: Any, make: Make) -> None:
    embedding = make()

    async def embed() -> list[Any]:
        found = await asyncio.gather(
            embedding.aget_text_embedding("a"),
            embedding.aget_query_embedding("a"),
            embedding.aget_image_embedding(IMAGES[0]),
            embedding.aget_text_embedding_batch(TEXTS),
            embedding.aget_image_embedding_batch(IMAGES),
        )
        await embedding.aclose()
        return found

    expected = [
        *vectors(server, ["Passage: a", "Query: a", data_uri(IMAGES[0])]),
        vectors(server, [f"Passage: {text}" for text in TEXTS]),
        vectors(server, [data_uri(path) for path in IMAGES]),
    ]
    assert asyncio.run(embed()) == expected
    assert asyncio.run(embed()) == expected


def test_task_dimensions_and_pixels_go_with_every_call(server: Any, make: Make) -> None:
    embedding = make(task="code", truncate_dim=128, max_pixels=50_000)
    assert len(embedding.get_text_embedding("a")) == len(embedding.get_image_embedding(IMAGES[0])) == 128
    text, image = server.bodies("/v1/embeddings")
    assert (text["task"], text["dimensions"], text.get("max_pixels")) == ("code", 128, None)
    assert (image["task"], image["dimensions"], image["max_pixels"]) == ("code", 128, 50_000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "clustering"}, "Invalid task: clustering"),
        ({"truncate_dim": 300}, "Invalid truncate_dim: 300"),
        ({"max_pixels": 1}, "max_pixels=1 is not allowed"),
        ({"client_options": {"timeout_s": -1}}, "timeout_s=-1 is not allowed"),
    ],
    ids=str,
)
def test_what_is_not_allowed_is_refused_before_a_call(make: Make, arguments: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make(**arguments)


@pytest.mark.parametrize("task", ["retrieval", "code"])
def test_a_cache_that_would_give_a_query_the_vector_of_a_passage_is_refused(make: Make, task: str) -> None:
    with pytest.raises(ArgumentError, match=f"embeddings_cache does not go with task='{task}'"):
        make(task=task, embeddings_cache=SimpleKVStore())
    embedding = make(task=task)
    with pytest.raises(ValueError, match="Field is frozen"):
        embedding.embeddings_cache = SimpleKVStore()


def test_text_matching_has_one_prompt_so_a_cache_is_right(server: Any, make: Make) -> None:
    embedding = make(task="text-matching", embeddings_cache=SimpleKVStore())
    assert embedding.get_text_embedding_batch(["a"]) == [embedding.get_query_embedding("a")]
    (body,) = server.bodies("/v1/embeddings")
    assert body["task"] == "text-matching"


def test_a_misspelt_argument_is_refused_without_its_value(make: Make) -> None:
    with pytest.raises(ValueError, match="Extra inputs are not permitted") as refusal:
        make(apikey="a-secret")
    assert "a-secret" not in str(refusal.value)


def test_a_bare_text_is_refused_where_a_list_is_needed(server: Any, make: Make) -> None:
    embedding, text = make(), cast("list[str]", "abc")
    with pytest.raises(ArgumentError, match="texts must be a list, not str"):
        embedding.get_text_embedding_batch(text)
    with pytest.raises(ArgumentError, match="texts must be a list, not str"):
        asyncio.run(embedding.aget_text_embedding_batch(text))
    assert server.seen == []


def test_the_errors_are_the_client_s(server: Any, make: Make) -> None:
    with pytest.raises(ImageError, match="no such file"):
        make().get_image_embedding("/no/such/file.png")
    server.routes["/v1/models"] = lambda _: server.json_answer({"error": {"message": "no"}}, 401)
    with pytest.raises(ServerAuthenticationError):
        make().get_query_embedding("a")
    with pytest.raises(ServerAuthenticationError):
        asyncio.run(make().aget_query_embedding("a"))


def test_a_dump_makes_the_same_embedding_again_and_holds_no_key(
    server: Any, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedding = make(api_key="a-secret", task="code", truncate_dim=128)
    embedding.get_query_embedding("a")
    assert {seen.headers["authorization"] for seen in server.seen} == {"Bearer a-secret"}
    pickled = pickle.dumps(embedding)
    for shown in (repr(embedding), str(embedding), embedding.to_json(), str(embedding.to_payload()), repr(pickled)):
        assert "a-secret" not in shown
    monkeypatch.setenv("JINA_V4_API_KEY", "another")
    for again in (JinaV4Embedding.from_json(embedding.to_json()), pickle.loads(pickled)):  # noqa: S301 - our own
        assert again.to_dict() == embedding.to_dict()
        server.seen.clear()
        assert again.get_query_embedding("a") == embedding.get_query_embedding("a")
        assert server.seen[0].headers["authorization"] == "Bearer another"
        again.close()


@pytest.mark.parametrize("field", ["base_url", "task", "truncate_dim", "max_pixels", "client_options"])
def test_what_decides_about_vectors_cannot_be_assigned(make: Make, field: str) -> None:
    embedding = make()
    with pytest.raises(ValueError, match="Field is frozen"):
        setattr(embedding, field, getattr(embedding, field))
    embedding.embed_batch_size = 7  # LlamaIndex reads it in every call
    assert embedding.embed_batch_size == 7


def test_a_copy_uses_the_values_that_it_is_updated_with_and_has_the_same_key(server: Any, make: Make) -> None:
    embedding = make(api_key="a-secret", max_pixels=50_000)
    copied = embedding.model_copy(update={"task": "code", "truncate_dim": 128})
    assert (copied.task, copied.truncate_dim, copied.max_pixels) == ("code", 128, 50_000)
    assert len(copied.get_text_embedding("a")) == 128
    (body,) = server.bodies("/v1/embeddings")
    assert (body["task"], body["dimensions"]) == ("code", 128)
    assert {seen.headers["authorization"] for seen in server.seen} == {"Bearer a-secret"}
    copied.close()
    assert len(embedding.get_text_embedding("a")) == len(server.vector("a"))
    with pytest.raises(ArgumentError, match="Invalid task: clustering"):
        embedding.model_copy(update={"task": "clustering"})


@pytest.mark.parametrize("make_copy", [copy.copy, copy.deepcopy])
def test_a_copy_has_connections_of_its_own(make: Make, make_copy: Callable[[Any], Any]) -> None:
    embedding = make(task="code")
    copied = make_copy(embedding)
    embedding.close()
    assert copied.to_dict() == embedding.to_dict()
    assert copied.get_text_embedding("a")
    copied.close()


def test_llama_index_is_imported_no_sooner_than_its_adapter_and_its_absence_says_what_to_install() -> None:
    program = """
import sys
import jina_v4_client, jina_v4_client.integrations
assert "llama_index" not in sys.modules
sys.modules["llama_index"] = None
import jina_v4_client.integrations.llama_index
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "install it with: pip install 'jina-v4-client[llama-index]'" in done.stderr
