"""Servers that are dead, forbidding, failing or no servers at all; and whose secrets go where."""

import asyncio
import gc
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from jina_v4_client import (
    ArgumentError,
    AsyncEmbeddingsClient,
    BadReplyError,
    EmbeddingsClient,
    ServerAuthenticationError,
    ServerConnectionError,
    ServerFailedError,
    ServerRefusedError,
    ServerTimeoutError,
    WrongServerError,
)
from servers import free_port


def failing_first(server: Any, n_failures: int, failure: Any) -> None:
    """Let the route of embeddings fail so many times before it works."""
    embed, left = server.routes["/v1/embeddings"], iter([failure] * n_failures)
    server.routes["/v1/embeddings"] = lambda seen: next(left, None) or embed(seen)


def test_a_dead_server_is_named_with_a_way_to_start_one() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with (
        EmbeddingsClient(url, task="retrieval", max_retries=0) as client,
        pytest.raises(ServerConnectionError) as caught,
    ):
        client.encode_text("a")
    message = str(caught.value)
    assert message.startswith(f"no server answers at {url} (ConnectError: ")
    assert "make serve-retrieval" in message
    assert "\n" not in message
    assert isinstance(caught.value.__cause__, openai.APIConnectionError)


def test_a_host_name_that_cannot_be_looked_up_is_named(make_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise UnicodeError("label too long")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(ServerConnectionError, match=r"no server answers at http://host \(ConnectError: label too long"):
        make_client("http://host", max_retries=0).encode_text("a")


def test_an_unknown_host_is_named() -> None:
    with (
        EmbeddingsClient("http://no-such-host.invalid", task="code", max_retries=0) as client,
        pytest.raises(ServerConnectionError, match=r"no server answers at http://no-such-host\.invalid"),
    ):
        client.encode_text("a")


@pytest.fixture
def mute_port() -> Iterator[int]:
    """A port where connections are accepted and nothing is ever said."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


def test_a_server_that_says_nothing_runs_into_the_timeout(mute_port: int) -> None:
    with (
        EmbeddingsClient(f"http://127.0.0.1:{mute_port}", task="code", timeout_s=0.2, max_retries=0) as client,
        pytest.raises(ServerTimeoutError, match=r"/v1/models did not answer within timeout_s=0\.2"),
    ):
        client.encode_text("a")


def test_a_port_that_does_not_speak_http_is_refused() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def greet() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with (
            EmbeddingsClient(url, task="code", max_retries=0) as client,
            pytest.raises(ServerConnectionError, match="RemoteProtocolError"),
        ):
            client.encode_text("a")
        thread.join()


def test_a_connection_that_breaks_within_the_reply_returns_nothing(server: Any, client: EmbeddingsClient) -> None:
    server.play_ours()
    embed = server.routes["/v1/embeddings"]

    def half(seen: Any) -> Any:
        answer = embed(seen)
        return server.answer(answer.content[:500], announced=len(answer.content), **answer.headers)

    server.routes["/v1/embeddings"] = half
    with pytest.raises(ServerConnectionError, match="RemoteProtocolError"):
        client.encode_text("a")


def test_a_connection_that_broke_once_is_tried_again(server: Any) -> None:
    server.play_ours()
    failing_first(server, 1, server.answer(b"{", announced=1000))
    with EmbeddingsClient(server.url, task="retrieval", max_retries=1) as client:
        assert client.encode_text("a").shape == (256,)
    assert server.paths().count("/v1/embeddings") == 2


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504])
def test_a_server_that_fails_for_a_while_is_asked_again(server: Any, status: int) -> None:
    server.play_ours()
    failing_first(server, 2, server.json_answer({}, status, retry_after_ms="1"))
    with EmbeddingsClient(server.url, task="retrieval", max_retries=2) as client:
        assert client.encode_text("a").shape == (256,)
    assert server.paths().count("/v1/embeddings") == 3


def test_a_server_that_goes_on_failing_is_given_up(server: Any) -> None:
    server.play_ours()
    failing_first(server, 9, server.json_answer({"error": {"message": "out of\nmemory"}}, 500, retry_after_ms="1"))
    with (
        EmbeddingsClient(server.url, task="retrieval", max_retries=2) as client,
        pytest.raises(ServerFailedError, match="/v1/embeddings failed with status 500: out of memory") as caught,
    ):
        client.encode_text("a")
    assert caught.value.status_code == 500
    assert isinstance(caught.value.__cause__, openai.InternalServerError)
    assert server.paths().count("/v1/embeddings") == 3


@pytest.mark.parametrize("status", [400, 404, 413, 415, 422])
def test_a_refusal_is_passed_on_and_never_repeated(server: Any, status: int) -> None:
    server.play_ours()
    failing_first(server, 9, server.json_answer({"error": {"message": "too long"}}, status))
    with (
        EmbeddingsClient(server.url, task="retrieval", max_retries=5) as client,
        pytest.raises(ServerRefusedError, match=f"refused with status {status}: too long") as caught,
    ):
        client.encode_text("a")
    assert caught.value.status_code == status
    assert server.paths().count("/v1/embeddings") == 1


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({"error": {"message": "the reason", "type": "BadRequestError"}}, "the reason"),
        ({"object": "error", "message": "the reason"}, "the reason"),
        ({"error": "the reason"}, "the reason"),
        ({"detail": "the reason"}, "the reason"),
        ({"detail": {"message": "the reason", "code": "X"}}, "the reason"),
        ({"error": {"message": "the reason", "param": "input"}, "detail": {"message": "other"}}, "the reason"),
        ({"detail": "the reason", "code": "UNAUTHORIZED"}, "the reason"),
        ({"detail": [{"loc": ["body", "input"], "msg": "wrong"}]}, r'\[{"loc": \["body", "input"\], "msg": "wrong"}\]'),
        ({}, r"{}"),
        ("the reason", '"the reason"'),
        ({"error": {"message": "x" * 9999}}, r"x{600}\.\.\."),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_servers_reason_is_found(server: Any, client: EmbeddingsClient, document: Any, reason: str) -> None:
    server.play_ours()
    failing_first(server, 1, server.json_answer(document, 400))
    with pytest.raises(ServerRefusedError, match=f"refused with status 400: {reason}$"):
        client.encode_text("a")


def test_a_busy_server_is_asked_again_when_it_says(server: Any) -> None:
    """As ours refuses what is over its budget."""
    message = {"message": "the server is at work on 9 tokens", "code": "OVERLOADED"}
    server.play_ours()
    failing_first(server, 1, server.json_answer({"error": message, "detail": message}, 429, retry_after="1"))
    begin = time.monotonic()
    with EmbeddingsClient(server.url, task="retrieval", max_retries=1) as client:
        assert client.encode_text("a").shape == (256,)
    assert time.monotonic() - begin >= 1


UNAUTHORIZED = "no valid API key: send it as Authorization: Bearer KEY"


@pytest.mark.parametrize(
    "document",
    [
        {"error": "Unauthorized"},
        {"detail": UNAUTHORIZED, "code": "UNAUTHORIZED"},
        {"error": {"message": UNAUTHORIZED, "code": "UNAUTHORIZED"}, "detail": UNAUTHORIZED, "code": "UNAUTHORIZED"},
    ],
    ids=["stock", "hosted", "ours"],
)
@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_not_accepted_is_not_repeated_in_the_message(server: Any, status: int, document: Any) -> None:
    server.routes["/v1/models"] = lambda _: server.json_answer(document, status)
    with (
        EmbeddingsClient(server.url, "hush", task="code") as client,
        pytest.raises(ServerAuthenticationError, match=rf"did not accept the API key \({status}\)") as caught,
    ):
        client.encode_text("a")
    assert "hush" not in str(caught.value)
    assert server.paths() == ["/v1/models"]


@pytest.mark.parametrize(
    ("content", "kind", "reason"),
    [
        (b"<html><h1>Forbidden</h1></html>", "text/html", "an HTML page; is a proxy in the way"),  # squid, nginx
        (b"RBAC: access denied", "text/plain", "RBAC: access denied"),  # Envoy, Istio
    ],
)
def test_a_proxy_that_refuses_is_not_taken_for_a_wrong_key(
    server: Any, client: EmbeddingsClient, content: bytes, kind: str, reason: str
) -> None:
    server.routes["/v1/models"] = lambda _: server.answer(content, 403, content_type=kind)
    with pytest.raises(ServerAuthenticationError, match=f"{server.url} refused with status 403: {reason}"):
        client.encode_text("a")


def test_a_web_page_is_no_server(server: Any, client: EmbeddingsClient) -> None:
    server.routes["/v1/models"] = lambda _: server.html_answer()
    with pytest.raises(BadReplyError, match=r"does not answer with JSON \(text/html\): is base_url the address"):
        client.encode_text("a")


def test_a_web_page_instead_of_vectors_may_be_of_a_proxy(server: Any, client: EmbeddingsClient) -> None:
    server.play_ours()
    failing_first(server, 9, server.html_answer())
    with pytest.raises(WrongServerError, match="answered as a stock vLLM or a proxy: nothing is returned"):
        client.encode_text("a")


def test_the_page_of_a_proxy_is_not_shown_whole(server: Any, client: EmbeddingsClient) -> None:
    server.routes["/v1/models"] = lambda _: server.html_answer(502)
    with pytest.raises(ServerFailedError, match="failed with status 502: an HTML page; is a proxy in the way"):
        client.encode_text("a")


def test_an_address_without_models_is_questioned(server: Any, client: EmbeddingsClient) -> None:
    with pytest.raises(ServerRefusedError, match="/v1/models refused with status 404: is base_url the address"):
        client.encode_text("a")


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed_with_texts_and_key(server: Any, client: EmbeddingsClient, status: int) -> None:
    server.play_ours()
    failing_first(server, 9, server.json_answer({}, status, location="https://elsewhere/v1/embeddings"))
    with pytest.raises(ServerRefusedError, match=rf"\({status}\); it points to https://elsewhere: give that as base"):
        client.encode_text("a")


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_the_address_may_end_with_v1(server: Any, ending: str) -> None:
    server.play_stock()
    with EmbeddingsClient(server.url + ending, task="retrieval") as client:
        client.encode_text("a")
    assert server.paths() == ["/v1/models", "/pooling"]


def test_the_address_may_have_a_path(server: Any) -> None:
    server.play_ours()
    server.routes = {f"/jina{path}": play for path, play in server.routes.items()}
    with EmbeddingsClient(f"{server.url}/jina/v1", task="retrieval") as client:
        client.encode_text("a")
    assert server.paths() == ["/jina/v1/models", "/jina/v1/embeddings"]


SECRETS = {
    "OPENAI_API_KEY": "sk-secret-1",
    "OPENAI_ADMIN_KEY": "sk-secret-2",
    "OPENAI_ORG_ID": "org-secret-3",
    "OPENAI_PROJECT_ID": "proj-secret-4",
    "OPENAI_CUSTOM_HEADERS": "Authorization: Bearer sk-secret-5\nX-Team: secret-6",
    "OPENAI_BASE_URL": "http://secret-7.invalid/v1",
    "OPENAI_WEBHOOK_SECRET": "secret-8",
}


@pytest.mark.parametrize("key", [None, "", "mine"])
@pytest.mark.parametrize("play", ["play_ours", "play_stock"])
def test_nothing_of_the_users_openai_settings_is_sent(
    server: Any, monkeypatch: pytest.MonkeyPatch, key: str | None, play: str
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    getattr(server, play)()
    with EmbeddingsClient(server.url, key, task="retrieval") as client:
        client.encode_text("a")
    assert len(server.seen) == 2
    for seen in server.seen:
        assert "secret" not in str(seen.headers)
        assert seen.headers["authorization"] == f"Bearer {key or 'none'}"
        assert seen.headers["user-agent"].startswith("jina-v4-client/")
        assert not {name for name in seen.headers if name.startswith(("openai", "x-stainless-os", "x-stainless-arch"))}


def test_the_key_may_come_from_the_environment(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JINA_V4_API_KEY", "from-the-environment\n")  # as a file's content often ends
    server.play_ours()
    with EmbeddingsClient(server.url, task="retrieval") as client:
        client.encode_text("a")
    assert {seen.headers["authorization"] for seen in server.seen} == {"Bearer from-the-environment"}


def test_a_closed_client_says_so(server: Any) -> None:
    client = EmbeddingsClient(server.url, task="retrieval")
    client.close()
    client.close()
    with pytest.raises(ArgumentError, match="this client is closed"):
        client.encode_text("a")


def test_an_http_client_of_the_caller_is_used(server: Any) -> None:
    """Its connections belong to the client's loop, so the client closes it; nobody else could."""
    server.play_ours()
    http_client = httpx2.AsyncClient(headers={"x-mine": "yes"})
    with EmbeddingsClient(server.url, task="retrieval", http_client=http_client) as client:
        client.encode_text("a")
        assert not http_client.is_closed
    assert http_client.is_closed
    assert {seen.headers["x-mine"] for seen in server.seen} == {"yes"}


def test_an_http_client_of_a_coroutine_is_left_open(server: Any) -> None:
    server.play_ours()

    async def call() -> None:
        async with httpx2.AsyncClient(headers={"x-mine": "yes"}) as http_client:
            async with AsyncEmbeddingsClient(server.url, task="retrieval", http_client=http_client) as client:
                await client.encode_text("a")
            assert not http_client.is_closed

    asyncio.run(call())
    assert {seen.headers["x-mine"] for seen in server.seen} == {"yes"}


def test_an_openai_client_of_the_caller_brings_address_key_and_headers(server: Any) -> None:
    server.play_ours()
    headers = {"x-team": "search"}
    mine = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="my-key", default_headers=headers, max_retries=5)
    with EmbeddingsClient(openai_client=mine, task="retrieval") as client:
        np.testing.assert_array_equal(client.encode_text("a"), server.vector("Query: a"))
    for seen in server.seen:
        assert (seen.headers["authorization"], seen.headers["x-team"]) == ("Bearer my-key", "search")
    assert server.paths() == ["/v1/models", "/v1/embeddings"]


def test_its_retries_are_not_added_to_ours(server: Any) -> None:
    server.play_ours()
    failing_first(server, 9, server.json_answer({}, 503, retry_after_ms="1"))

    async def call() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=5) as mine:
            client = AsyncEmbeddingsClient(openai_client=mine, task="retrieval", max_retries=1)
            with pytest.raises(ServerFailedError):
                await client.encode_text("a")

    asyncio.run(call())
    assert server.paths().count("/v1/embeddings") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_url": "http://127.0.0.1:9"}, "openai_client brings its own address, key and HTTP client"),
        ({"api_key": "k"}, "openai_client brings its own"),
        ({"openai_client": openai.OpenAI(api_key="k", http_client=None)}, "must be an openai.AsyncOpenAI, not OpenAI"),
        ({"openai_client": "http://127.0.0.1:9"}, "must be an openai.AsyncOpenAI, not str"),
    ],
    ids=["address", "key", "sync", "text"],
)
def test_what_does_not_go_with_an_openai_client_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        EmbeddingsClient(**{"openai_client": openai.AsyncOpenAI(api_key="k"), "task": "code"} | arguments)


@pytest.fixture
def kept_connection() -> Iterator[tuple[str, Future[bytes]]]:
    """A server that refuses one request and keeps the connection; what comes over it next, none once it is closed."""
    refusal = b"HTTP/1.1 404 Not Found\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"

    def next_bytes() -> bytes:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(100)
            connection.recv(10_000)
            connection.sendall(refusal)
            return connection.recv(10_000)

    with socket.socket() as listener, ThreadPoolExecutor(1) as pool:
        listener.settimeout(100)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", pool.submit(next_bytes)


def test_a_client_that_nobody_closed_leaves_no_connection(kept_connection: tuple[str, Future[bytes]]) -> None:
    url, next_bytes = kept_connection
    client = EmbeddingsClient(url, task="code", max_retries=0)
    with pytest.raises(ServerRefusedError):
        client.revision()
    assert not next_bytes.done()
    del client
    gc.collect()
    assert next_bytes.result() == b""


def test_a_client_for_coroutines_that_nobody_closed_leaves_no_connection(
    kept_connection: tuple[str, Future[bytes]],
) -> None:
    url, next_bytes = kept_connection

    async def use_and_forget() -> None:
        client = AsyncEmbeddingsClient(url, task="code", max_retries=0)
        with pytest.raises(ServerRefusedError):
            await client.revision()
        assert not next_bytes.done()
        del client
        gc.collect()
        assert await asyncio.wrap_future(next_bytes) == b""

    asyncio.run(use_and_forget())


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_a_server_of_this_machine_is_asked_without_a_proxy(
    server: Any, make_client: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.play_ours()
    for variable in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody is there
    assert make_client(server.url.replace("127.0.0.1", name)).encode_text("a").shape == (256,)
    with pytest.raises(ServerConnectionError):
        make_client("http://jina-v4.invalid", max_retries=0).revision()


def test_several_threads_may_use_one_client(server: Any, client: EmbeddingsClient) -> None:
    server.play_ours()
    results: dict[int, Any] = {}

    def work(number: int) -> None:
        results[number] = client.encode_text([f"{number} {n}" for n in range(10)], batch_size=3)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, vectors in results.items():
        for n, vector in enumerate(vectors):
            assert (vector == server.vector(f"Query: {number} {n}")).all()
    assert len(results) == 8
