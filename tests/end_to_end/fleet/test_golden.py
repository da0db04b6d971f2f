"""The published vectors, through fold, real vLLM in float32, HTTP and the client: by both ways that the client knows.

The largest difference of any element is 1e-5 at most; 4e-7 is what it has been.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TASKS, Figure, Golden
from jina_v4_client import AsyncEmbeddingsClient, EmbeddingsClient, WrongServerError
from near import largest_difference
from numpy.typing import NDArray
from openai import BadRequestError, OpenAI, UnprocessableEntityError
from servers import stock_server

BOUND = 1e-5
Check = Callable[[Sequence[NDArray[np.float32]], list[str]], None]
WAYS = ("pooled in the engine", "pooled by the client")


@dataclass(frozen=True)
class Served:
    """A task and a client for each way of having it served."""

    task: str
    base_url: str
    settings: dict[str, dict[str, Any]]
    clients: dict[str, EmbeddingsClient]


@pytest.fixture(scope="module", params=TASKS)
def served(
    request: pytest.FixtureRequest,
    addresses: dict[str, str],
    folded: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    task = request.param
    checkpoint = folded("float32") / f"jina-embeddings-v4-{task}"
    with ExitStack() as stack:
        stock = stack.enter_context(stock_server(checkpoint, tmp_path_factory.mktemp("stock") / "log"))
        stock.wait_ready()
        projector = checkpoint / "multi_vector_projector.safetensors"
        ways = ({"base_url": addresses[task]}, {"base_url": stock.base_url, "projector": projector})
        settings: dict[str, dict[str, Any]] = dict(zip(WAYS, ways, strict=True))
        clients = {way: stack.enter_context(EmbeddingsClient(**settings[way])) for way in WAYS}
        yield Served(task, addresses[task], settings, clients)


@pytest.fixture(params=WAYS)
def client(request: pytest.FixtureRequest, served: Served) -> EmbeddingsClient:
    return served.clients[request.param]


@pytest.fixture
def check(served: Served, golden: Golden, figure: Figure) -> Check:
    """A function that compares vectors with the task's golden rows of some names, and reports the difference."""

    def compare(found: Sequence[NDArray[np.float32]], names: list[str]) -> None:
        difference = largest_difference(found, [golden.rows[f"{served.task}/{name}"] for name in names])
        figure(f"largest difference {difference:.1e}")
        assert difference <= BOUND

    return compare


@pytest.mark.parametrize("kind", ["dense", "multi"])
@pytest.mark.parametrize("prompt_name", ["query", "passage"])
def test_every_text_has_the_published_vectors(
    served: Served, client: EmbeddingsClient, golden: Golden, prompt_name: str, kind: str, check: Check
) -> None:
    multi = kind == "multi"
    found = client.encode_text(golden.texts, task=served.task, prompt_name=prompt_name, return_multivector=multi)
    check(found, [f"{prompt_name}/{i}/{kind}" for i in range(len(golden.texts))])


@pytest.mark.parametrize("kind", ["dense", "multi"])
def test_every_image_has_the_published_vectors(
    served: Served, client: EmbeddingsClient, golden: Golden, kind: str, check: Check
) -> None:
    found = client.encode_image(golden.images, task=served.task, return_multivector=kind == "multi")
    check(found, [f"image/{i}/{kind}" for i in range(len(golden.images))])


def test_a_sentence_without_a_prompt_is_embedded_as_it_is(
    served: Served, client: EmbeddingsClient, golden: Golden, check: Check
) -> None:
    found = client.encode([f"Query: {text}" for text in golden.texts], task=served.task)
    check(list(found), [f"query/{i}/dense" for i in range(len(golden.texts))])


@pytest.mark.parametrize(
    ("text", "options", "name"),
    [(0, {"truncate_dim": 128}, "query/0/dense128"), (3, {"max_length": 16}, "query/3/max16")],
    ids=["128 dimensions", "16 tokens"],
)
def test_a_text_that_is_cut_has_the_published_vector(
    served: Served, client: EmbeddingsClient, golden: Golden, text: int, options: Any, name: str, check: Check
) -> None:
    check([client.encode_text(golden.texts[text], task=served.task, prompt_name="query", **options)], [name])


def test_both_kinds_from_one_pass_have_the_published_vectors(
    served: Served, client: EmbeddingsClient, golden: Golden, check: Check
) -> None:
    texts = client.encode_both([f"Query: {text}" for text in golden.texts], task=served.task)
    images = client.encode_both(golden.images, task=served.task)
    names = [f"query/{i}" for i in range(len(golden.texts))] + [f"image/{i}" for i in range(len(golden.images))]
    found = [vectors for both in texts + images for vectors in (both.dense, both.multivector)]
    check(found, [f"{name}/{kind}" for name in names for kind in ("dense", "multi")])


@pytest.mark.parametrize(
    ("kind", "way", "wire_format"),
    [
        pytest.param("sync", WAYS[0], "base64", id="base64"),
        pytest.param("sync", WAYS[0], "float", id="JSON"),
        pytest.param("async", WAYS[0], "safetensors", id="safetensors, async"),
        pytest.param("async", WAYS[0], "base64", id="base64, async"),
        pytest.param("async", WAYS[0], "float", id="JSON, async"),
        pytest.param("async", WAYS[1], "safetensors", id="stock vLLM, async"),
    ],
)
def test_every_wire_format_carries_the_published_vectors(
    served: Served, golden: Golden, kind: str, way: str, wire_format: Any, check: Check
) -> None:
    calls = [("encode_text", golden.texts), ("encode_image", golden.images[:1])]
    settings = {**served.settings[way], "wire_format": wire_format, "task": served.task}

    async def embed_async() -> list[list[NDArray[np.float32]]]:
        async with AsyncEmbeddingsClient(**settings) as client:
            return await asyncio.gather(
                *(getattr(client, name)(items, return_multivector=m) for m in (False, True) for name, items in calls)
            )

    if kind == "async":
        found = asyncio.run(embed_async())
    else:
        with EmbeddingsClient(**settings) as client:
            found = [getattr(client, name)(items, return_multivector=m) for m in (False, True) for name, items in calls]
    sources = [*(f"query/{i}" for i in range(len(golden.texts))), "image/0"]
    names = [f"{source}/{output}" for output in ("dense", "multi") for source in sources]
    check([row for rows in found for row in rows], names)


def test_both_ways_agree_on_a_smaller_image(served: Served, golden: Golden) -> None:
    found = [
        client.encode_image(golden.images[2], task=served.task, max_pixels=200_704)
        for client in served.clients.values()
    ]
    assert largest_difference(found[:1], found[1:]) <= BOUND
    whole = golden.rows[f"{served.task}/image/2/dense"]
    assert np.abs(found[0] - whole).max() > 100 * BOUND  # the limit was heeded


def test_the_openai_package_gets_the_same_vectors(served: Served, golden: Golden, check: Check) -> None:
    with OpenAI(base_url=f"{served.base_url}/v1", api_key="none") as plain:
        model = plain.models.list().data[0].id
        assert model == f"jina-embeddings-v4-{served.task}"
        answer = plain.embeddings.create(model=model, input=golden.texts)
        found = [np.array(item.embedding, dtype=np.float32) for item in answer.data]
        check(found, [f"query/{i}/dense" for i in range(len(golden.texts))])
        cut = plain.embeddings.create(model=model, input=golden.texts[0], dimensions=128, encoding_format="float")
        check([np.array(cut.data[0].embedding, dtype=np.float32)], ["query/0/dense128"])
        with pytest.raises(UnprocessableEntityError, match="dimensions=300 is not offered; choose 1 to 256"):
            plain.embeddings.create(model=model, input=golden.texts[0], dimensions=300)
        with pytest.raises(BadRequestError, match="127235 over"):
            plain.embeddings.create(model=model, input="a b " * 40_000)


def test_a_server_of_another_task_is_refused_by_both_ways(served: Served, client: EmbeddingsClient) -> None:
    other = TASKS[(TASKS.index(served.task) + 1) % len(TASKS)]
    with pytest.raises(WrongServerError, match=served.task) as error:
        client.encode_text("x", task=other)
    assert other in str(error.value)
