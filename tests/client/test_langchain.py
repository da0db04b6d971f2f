"""LangChain's embeddings without a model: what is sent, with threads and coroutines; errors, the key, the extra.

With a model and a vector store: tests/end_to_end/one_server/test_frameworks.py.
"""

import asyncio
import base64
import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import GOLDEN
from jina_v4_client import ArgumentError, ImageError, ServerAuthenticationError
from jina_v4_client.integrations.langchain import JinaV4Embeddings

IMAGES = [str(path) for path in sorted((GOLDEN / "img").glob("*.png"))]
Make = Callable[..., JinaV4Embeddings]


@pytest.fixture
def make(server: Any) -> Iterator[Make]:
    """Make embeddings by the played gateway; all are closed at the end."""
    server.play_gateway()
    made = []

    def make_one(**arguments: Any) -> JinaV4Embeddings:
        made.append(JinaV4Embeddings(server.url, **{"client_options": {"max_retries": 0}, **arguments}))
        return made[-1]

    yield make_one
    for embeddings in made:
        embeddings.close()


def data_uri(path: str) -> str:
    return f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


def test_documents_are_passages_queries_are_queries_and_images_have_no_prompt(server: Any, make: Make) -> None:
    embeddings = make()
    assert embeddings.embed_documents(["a", "b"]) == [server.vector(f"Passage: {text}").tolist() for text in "ab"]
    assert embeddings.embed_query("a") == server.vector("Query: a").tolist()
    assert embeddings.embed_image(uris=IMAGES) == [server.vector(data_uri(path)).tolist() for path in IMAGES]
    assert {body["task"] for body in server.bodies("/v1/embeddings")} == {"retrieval"}


def test_coroutines_give_the_same_in_any_number_of_event_loops(server: Any, make: Make) -> None:
    embeddings = make()

    async def embed() -> tuple[Any, Any, Any]:
        found = await asyncio.gather(
            embeddings.aembed_documents(["a", "b"]), embeddings.aembed_query("a"), embeddings.aembed_image(IMAGES)
        )
        await embeddings.aclose()
        return found

    expected = [embeddings.embed_documents(["a", "b"]), embeddings.embed_query("a"), embeddings.embed_image(IMAGES)]
    assert asyncio.run(embed()) == expected
    assert asyncio.run(embed()) == expected


def test_coroutines_share_connections_and_what_is_known_of_the_server_within_a_loop(server: Any, make: Make) -> None:
    embeddings = make()

    async def embed() -> None:
        for _ in range(3):
            await embeddings.aembed_query("a")
        await embeddings.aclose()

    asyncio.run(embed())
    assert server.paths() == ["/v1/models", *["/v1/embeddings"] * 3]


def test_task_dimensions_and_pixels_go_with_every_call(server: Any, make: Make) -> None:
    embeddings = make(task="code", truncate_dim=128, max_pixels=50_000)
    vectors = [embeddings.embed_query("a"), *embeddings.embed_documents(["a"]), *embeddings.embed_image(IMAGES[:1])]
    assert [len(vector) for vector in vectors] == [128] * 3
    bodies = server.bodies("/v1/embeddings")
    assert {(body["task"], body["dimensions"]) for body in bodies} == {("code", 128)}
    assert [body.get("max_pixels") for body in bodies] == [None, None, 50_000]


def test_an_empty_list_sends_no_request(server: Any, make: Make) -> None:
    embeddings = make()
    assert embeddings.embed_documents([]) == embeddings.embed_image([]) == []
    assert asyncio.run(embeddings.aembed_documents([])) == asyncio.run(embeddings.aembed_image([])) == []
    assert server.seen == []


@pytest.mark.parametrize("texts", ["abc", "", (text for text in "abc")], ids=["text", "empty text", "generator"])
def test_what_is_no_list_of_texts_is_refused(server: Any, make: Make, texts: Any) -> None:
    embeddings = make()
    with pytest.raises(ArgumentError, match="texts must be a list, not"):
        embeddings.embed_documents(texts)
    with pytest.raises(ArgumentError, match="texts must be a list, not"):
        asyncio.run(embeddings.aembed_documents(texts))
    assert server.seen == []


@pytest.mark.parametrize("image", [IMAGES[0], Path(IMAGES[0]), b"GIF89a"], ids=["str", "path", "bytes"])
def test_what_is_no_list_of_images_is_refused(server: Any, make: Make, image: Any) -> None:
    embeddings = make()
    with pytest.raises(ArgumentError, match="images must be a list, not"):
        embeddings.embed_image(image)
    with pytest.raises(ArgumentError, match="images must be a list, not"):
        asyncio.run(embeddings.aembed_image(image))
    assert server.seen == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "clustering"}, "Invalid task: clustering"),
        ({"task": None}, "Invalid task: None"),
        ({"truncate_dim": 300}, "Invalid truncate_dim: 300"),
        ({"max_pixels": 1}, "max_pixels=1 is not allowed"),
        ({"client_options": {"timeout_s": -1}}, "timeout_s=-1 is not allowed"),
    ],
    ids=str,
)
def test_what_is_not_allowed_is_refused_before_a_call(make: Make, arguments: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make(**arguments)


def test_the_errors_are_the_client_s(server: Any, make: Make) -> None:
    with pytest.raises(ImageError, match="no such file"):
        make().embed_image(["/no/such/file.png"])
    server.routes["/v1/models"] = lambda _: server.json_answer({"error": {"message": "no"}}, 401)
    with pytest.raises(ServerAuthenticationError):
        make().embed_query("a")
    with pytest.raises(ServerAuthenticationError):
        asyncio.run(make().aembed_query("a"))


def test_the_key_is_sent_and_not_shown(server: Any, make: Make) -> None:
    embeddings = make(api_key="a-secret")
    embeddings.embed_query("a")
    assert {seen.headers["authorization"] for seen in server.seen} == {"Bearer a-secret"}
    assert "a-secret" not in repr(embeddings)


def test_a_deep_copy_has_the_same_arguments_and_connections_of_its_own(server: Any, make: Make) -> None:
    embeddings = make(api_key="a-secret", task="code", truncate_dim=128)
    copied = copy.deepcopy(embeddings)
    embeddings.close()
    assert len(copied.embed_query("a")) == 128
    assert {body["task"] for body in server.bodies("/v1/embeddings")} == {"code"}
    assert {seen.headers["authorization"] for seen in server.seen} == {"Bearer a-secret"}
    copied.close()


def test_langchain_is_imported_no_sooner_than_its_adapter_and_its_absence_says_what_to_install() -> None:
    program = """
import sys
import jina_v4_client, jina_v4_client.integrations
assert "langchain_core" not in sys.modules
sys.modules["langchain_core.embeddings"] = None
import jina_v4_client.integrations.langchain
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "install it with: pip install 'jina-v4-client[langchain]'" in done.stderr
