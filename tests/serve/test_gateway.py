"""The gateway between real HTTP servers and real HTTP clients; SIGTERM through the real command."""

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import time
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from conftest import TASKS
from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.api.tasks import task_of_model
from jina_v4_serve.errors import OptionError
from jina_v4_serve.gateway import GatewaySettings, parse_servers
from jina_v4_serve.gateway.metrics import GatewayMetrics, merge
from jina_v4_serve.gateway.routing import find_task
from jina_v4_serve.gateway.run import running
from jina_v4_serve.gateway.servers import may_answer
from servers import BIN, PATIENCE_S, free_port
from upstreams import Upstream, listening

pytestmark = pytest.mark.proof

URL = "/v1/embeddings"
JSON = {"Content-Type": "application/json"}
MODEL = "jina-embeddings-v4"


# --- which task


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"task": "retrieval"}, "retrieval"),
        ({"task": "retrieval.query"}, "retrieval"),
        ({"task": "retrieval.passage"}, "retrieval"),
        ({"task": "text-matching"}, "text-matching"),
        ({"task": "code"}, "code"),
        ({"task_type": "code.query"}, "code"),
        ({"task_type": "code", "task": "retrieval"}, "retrieval"),  # its server names the contradiction
        ({"task": "code.passage"}, "code"),
        ({"model": f"{MODEL}-code"}, "code"),
        ({"model": f"{MODEL}-code-query"}, "code"),
        ({"model": f"{MODEL}-text-matching-passage"}, "text-matching"),
        ({"model": f"jinaai/{MODEL}-retrieval"}, "retrieval"),
        ({"model": MODEL, "task": "code.query"}, "code"),
        ({"model": f"{MODEL}-code-none"}, "code"),
        ({"model": f"{MODEL}-query", "task": "code"}, "code"),
        ({"model": f"{MODEL}-retrieval-query", "task": "retrieval.query"}, "retrieval"),
        ({"model": "the-servers-own-name", "task": "code"}, "code"),
        ({"task": None, "model": f"{MODEL}-code"}, "code"),
        ({"input": [{"text": '"task": "code"'}, {"task": "code"}], "task": "retrieval"}, "retrieval"),
        ({"x": {"task": "code", "model": f"{MODEL}-code"}, "model": f"{MODEL}-retrieval"}, "retrieval"),
    ],
    ids=str,
)
def test_the_task_is_read_from_a_body(body: dict[str, Any], expected: str) -> None:
    assert find_task(json.dumps(body).encode(), TASKS) == expected


@pytest.mark.parametrize(
    "text",
    ["half \\ud83d", "\\ude00", "\\ude00\\ud83d", "\\ud83d\\u0041", "\\\\\\ud83d", "\\ud83d\\ude00 \\\\ud83d \\ud83d"],
)
def test_half_a_character_is_left_to_the_server_which_names_its_item(text: str) -> None:
    assert find_task(f'{{"input": ["x", "{text}"], "task": "code", "{text}": 1}}'.encode(), TASKS) == "code"
    with pytest.raises(ApiError, match=r"task=.* is not served here"):
        find_task(f'{{"task": "{text}"}}'.encode(), TASKS)
    with pytest.raises(ApiError, match="not JSON"):
        find_task(f'{{"input": "{text}", "task": "code"'.encode(), TASKS)


def test_a_long_text_of_escapes_does_not_hold_the_gateway() -> None:
    body = b'{"task": "code", "input": "\\ud83d' + b"\\n" * 2**21 + b'"}'
    began = time.process_time()
    assert find_task(body, TASKS) == "code"
    assert time.process_time() - began < 0.3


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"task": "code", "task": "retrieval"}', "retrieval"),
        (b'{"model": "x", "model": "jina-embeddings-v4-code"}', "code"),
        (b'{"t\\u0061sk": "c\\u006fde"}', "code"),
        (b' \n{"input":"\xc3\xa4","task":"code"} \n', "code"),
    ],
    ids=["the last task counts", "the last model counts", "escapes", "white space"],
)
def test_the_task_of_unusual_json_is_that_which_python_reads(body: bytes, expected: str) -> None:
    assert find_task(body, TASKS) == expected
    read = json.loads(body)
    assert expected in (read.get("task"), task_of_model(read.get("model", "")))


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "the body is not JSON: "),
        (b"{", 400, "the body is not JSON: "),
        (b'{"task": "code"} {}', 400, "the body is not JSON: "),
        (b"task=code", 400, "the body is not JSON: "),
        (b'{"task": NaN}', 400, "the body is not JSON: "),
        (b'{"task": "\xff"}', 400, "the body is not JSON: "),
        (b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "the body is not JSON: "),
        (b"[]", 400, "the body is JSON, but not an object"),
        (b'"code"', 400, "the body is JSON, but not an object"),
        (b"null", 400, "the body is JSON, but not an object"),
        (b'{"task": 5}', 422, "task is a string"),
        (b'{"task": ["code"]}', 422, "task is a string"),
        (b'{"model": {}}', 422, "model is a string"),
        (b"{}", 422, "the request names no task; send task (retrieval, retrieval.query, retrieval.passage, text-"),
        (b'{"model": "jina-embeddings-v4"}', 422, "or a model (jina-embeddings-v4-retrieval, "),
        (b'{"model": "jinaai/jina-embeddings-v4"}', 422, "the request names no task"),
        (b'{"model": "jina-embeddings-v4-query"}', 422, "the request names no task"),
        (b'{"task": ""}', 422, "task= is not served here; choose retrieval, "),
        (b'{"task": "separation"}', 422, "task=separation is not served here; choose retrieval, retrieval.query"),
        (b'{"task": "Code"}', 422, "task=Code is not served here"),
        (b'{"model": "text-embedding-3-small"}', 404, "there is no model text-embedding-3-small here; choose jina-"),
        (b'{"model": "jina-embeddings-v3"}', 404, "there is no model jina-embeddings-v3 here"),
        (b'{"model": "jina-embeddings-v4-"}', 404, "there is no model jina-embeddings-v4- here"),
        (
            b'{"task": "code.query", "model": "jina-embeddings-v4-retrieval"}',
            422,
            "the request contradicts itself: task=code.query, model=jina-embeddings-v4-retrieval",
        ),
    ],
)
def test_a_body_without_one_task_is_refused(body: bytes, status: int, message: str) -> None:
    with pytest.raises(ApiError) as error:
        find_task(body, TASKS)
    assert message in error.value.message
    assert error.value.status == status


def test_what_is_not_served_is_not_offered() -> None:
    with pytest.raises(ApiError, match=r"choose code, code\.query, code\.passage$"):
        find_task(b'{"task": "retrieval"}', ["code"])
    with pytest.raises(ApiError, match="choose jina-embeddings-v4-code, or jina-embeddings-v4 and a task"):
        find_task(b'{"model": "jina-embeddings-v4-retrieval"}', ["code"])


@pytest.mark.parametrize(
    "body",
    [{"input": "x"}, {"model": "jina-embeddings-v4"}, {"model": "jinaai/jina-embeddings-v4-query", "input": "x"}],
    ids=lambda body: body.get("model", "no model"),
)
def test_a_body_without_a_task_has_the_default_one(body: dict[str, Any]) -> None:
    assert find_task(json.dumps(body).encode(), TASKS, "text-matching") == "text-matching"
    with pytest.raises(ApiError, match="names no task"):
        find_task(json.dumps(body).encode(), ("code",), "text-matching")


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({"task": "code.query"}, "code"),
        ({"task_type": "retrieval"}, "retrieval"),
        ({"model": "jina-embeddings-v4-code"}, "code"),
        ({"model": "gpt-4"}, None),
        ({"task": "nonsense"}, None),
    ],
    ids=lambda value: str(value),
)
def test_the_default_task_takes_nothing_from_a_body_that_names_one(body: dict[str, Any], found: str | None) -> None:
    if found is None:
        with pytest.raises(ApiError):
            find_task(json.dumps(body).encode(), TASKS, "text-matching")
    else:
        assert find_task(json.dumps(body).encode(), TASKS, "text-matching") == found


def test_the_task_may_stand_behind_megabytes() -> None:
    body = json.dumps({"input": [{"image": "A" * 2**20}] * 60, "task": "code"}).encode()
    assert find_task(body, TASKS) == "code"


# --- between servers and clients


@asynccontextmanager
async def gateway(*upstreams: Upstream, **settings: Any) -> AsyncIterator[aiohttp.ClientSession]:
    """Run servers, the gateway before them, and a client of it."""
    port = free_port()
    urls = {upstream.task: upstream.url for upstream in upstreams}
    options = GatewaySettings(urls, port=port, **settings)
    async with (
        running(options, asyncio.Event()),
        aiohttp.ClientSession(f"http://127.0.0.1:{port}", auto_decompress=False, headers=JSON) as client,
    ):
        yield client


def embed(client: aiohttp.ClientSession) -> Any:
    return client.post(URL, data=b'{"task": "code"}')


def check_error(body: dict[str, Any], headers: Any, code: str) -> None:
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == code
    assert body["detail"]["message"] == body["error"]["message"]
    assert body["detail"]["request_id"] == headers["x-request-id"]


async def test_each_task_goes_to_its_server_byte_by_byte() -> None:
    upstreams = [Upstream(task) for task in TASKS]
    one, two, three = upstreams
    async with listening(one), listening(two), listening(three), gateway(*upstreams) as client:
        for upstream in upstreams:
            body = b'{ "input":"\xc3\xa4",  "task" :"%s"}' % upstream.task.encode()
            async with client.post(URL, data=body) as answer:
                assert (answer.status, await answer.json()) == (200, {"from": upstream.task})
                assert answer.headers["x-jina-v4-task"] == upstream.task
            assert [seen[2] for seen in upstream.seen] == [body]


async def test_coheres_form_goes_to_coheres_route_and_its_errors_are_in_coheres_shape() -> None:
    upstreams = [Upstream(task) for task in TASKS]
    one, two, three = upstreams
    async with listening(one), listening(two), listening(three), gateway(*upstreams) as client:
        for upstream in upstreams:
            body = json.dumps({"texts": ["x"], "model": f"{MODEL}-{upstream.task}-query"}).encode()
            async with client.post("/v2/embed", data=body) as answer:
                assert (answer.status, await answer.json()) == (200, {"from": upstream.task})
            assert [(path, sent) for path, _, sent in upstream.seen] == [("/v2/embed", body)]
        for sent, status in ((b'{"texts": ["x"], "model": "embed-v4.0"}', 404), (b"{}", 422), (b"{", 400)):
            async with client.post("/v2/embed", data=sent) as answer:
                assert answer.status == status
                content = await answer.json()
                assert content.keys() == {"id", "message"}
                assert content["id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/v1/score"])
async def test_a_ranking_goes_to_the_server_of_its_task(path: str) -> None:
    upstreams = [Upstream(task) for task in TASKS]
    one, two, three = upstreams
    async with listening(one), listening(two), listening(three), gateway(*upstreams) as client:
        for upstream in upstreams:
            for name in ({"model": f"{MODEL}-{upstream.task}"}, {"task": upstream.task}):
                body = json.dumps({"query": "q", "documents": ["a"], **name}).encode()
                async with client.post(path, data=body) as answer:
                    assert (answer.status, await answer.json()) == (200, {"from": upstream.task})
                assert upstream.seen[-1][0] == path
                assert upstream.seen[-1][2] == body
        async with client.post(path, data=b'{"query": "q", "documents": ["a"]}') as answer:
            assert answer.status == 422
            assert ("message" if path == "/v2/rerank" else "error") in await answer.json()
        async with client.get(path) as answer:
            assert answer.status == 405


async def test_headers_for_the_other_end_pass_and_those_between_neighbours_do_not() -> None:
    async def answer(_: web.Request) -> web.Response:
        hidden = {"Connection": "X-Private", "X-Private": "1", "Keep-Alive": "timeout=9", "Proxy-Authenticate": "x"}
        return web.Response(
            status=429, reason="Slow", body=b"{}", headers={**hidden, "Retry-After": "7", "X-Kept": "e", "Server": "s"}
        )

    upstream = Upstream("code", answer)
    sent = {
        "Authorization": "Bearer theirs",
        "X-Request-ID": "abc-1",
        "Accept": "application/x-safetensors",
        "Content-Type": "application/json; charset=utf-8",
        "User-Agent": "me",
        "Connection": "keep-alive, X-Hop",
        "X-Hop": "1",
        "TE": "trailers",
        "Proxy-Authorization": "secret",
        "Expect": "100-continue",
    }
    async with listening(upstream), gateway(upstream) as client:
        async with client.post(URL, data=b'{"task": "code"}', headers=sent) as answer_:
            assert (answer_.status, answer_.reason) == (429, "Slow")
            kept = {"Retry-After": "7", "X-Kept": "e", "X-Request-ID": "abc-1"}
            assert {name: answer_.headers.get(name) for name in kept} == kept
            assert not {"X-Private", "Keep-Alive", "Proxy-Authenticate"} & set(answer_.headers)
        (_, headers, _) = upstream.seen[0]
        for name in ("Authorization", "X-Request-ID", "Accept", "Content-Type", "User-Agent"):
            assert headers[name] == sent[name]
        assert not {"X-Hop", "TE", "Proxy-Authorization", "Expect", "Transfer-Encoding"} & set(headers)
        assert headers["Host"] == upstream.url.removeprefix("http://")
        assert "Accept-Encoding" in headers  # the client's own; nothing is added here
        for sent_id in ("", "a b", "x" * 129):
            async with client.post(URL, data=b'{"task": "code"}', headers={"X-Request-ID": sent_id}) as answer_:
                made = answer_.headers["X-Request-ID"]
            assert len(made) == 32
            assert upstream.seen[-1][1]["X-Request-ID"] == made


@pytest.mark.parametrize("chunked", [False, True], ids=["of a known length", "in chunks"])
async def test_a_large_answer_is_streamed(chunked: bool) -> None:
    first_part, rest = b"a" * 300_000, b"b" * 30_000_000
    go_on = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Encoding": "identity"})
        if not chunked:
            response.content_length = len(first_part) + len(rest)
        await response.prepare(request)
        await response.write(first_part)
        await go_on.wait()  # the client has the first part before the server makes the rest
        await response.write(rest)
        return response

    upstream = Upstream("code", answer)
    async with listening(upstream), gateway(upstream) as client, embed(client) as answer_:
        assert await answer_.content.readexactly(len(first_part)) == first_part
        go_on.set()
        assert await answer_.read() == rest


async def test_a_large_request_arrives_whole_and_a_larger_one_is_refused() -> None:
    upstream = Upstream("code")
    async with listening(upstream), gateway(upstream, max_body_bytes=20_000_000) as client:
        body = json.dumps({"input": "x" * 19_000_000, "task": "code"}).encode()
        async with client.post(URL, data=body_in_pieces(body)) as answer:
            assert answer.status == 200
        assert upstream.seen[0][2] == body
        assert upstream.seen[0][1]["Content-Length"] == str(len(body))
        larger = json.dumps({"input": "x" * 20_000_000, "task": "code"}).encode()
        # Without a length too: then the limit is found while reading.
        for headers in ({"Content-Length": str(len(larger))}, {}):
            try:
                async with client.post(URL, data=body_in_pieces(larger), headers=headers) as answer:
                    assert answer.status == 413
                    check_error(await answer.json(), answer.headers, "BODY_TOO_LARGE")
            except aiohttp.ClientOSError as error:  # it hung up before the client had sent all
                print(f"hung up: {error}")
        assert len(upstream.seen) == 1


async def test_the_bodies_in_flight_have_a_limit_together() -> None:
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def answer(_: web.Request) -> web.Response:
        reached.set()
        await go_on.wait()
        return web.Response()

    upstream = Upstream("code", answer)
    body = json.dumps({"input": "x" * 2_000_000, "task": "code"}).encode()
    async with listening(upstream), gateway(upstream, max_bodies_bytes=1_500_000) as client:

        async def post() -> int:
            async with client.post(URL, data=body_in_pieces(body)) as answer_:
                if answer_.status == 429:
                    assert answer_.headers["Retry-After"] == "5"
                    check_error(await answer_.json(), answer_.headers, "OVERLOADED")
                return answer_.status

        first = asyncio.create_task(post())  # alone, it may be larger
        await reached.wait()
        assert await post() == 429
        go_on.set()
        assert await first == 200
        assert await post() == 200  # the first body is not held any more
        assert [sent for _, _, sent in upstream.seen] == [body, body]


async def test_a_large_body_is_held_once() -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def waits(request: web.Request) -> web.Response:
        if request.path == URL:  # nothing of the body is read meanwhile
            begun.set()
            await go_on.wait()
        return web.Response()

    upstream = Upstream("code")
    upstream.handle = waits  # type: ignore[method-assign] # the test needs an answer of its own
    body = json.dumps({"input": "x" * 30_000_000, "task": "code"}).encode()
    async with listening(upstream), gateway(upstream) as client:
        tracemalloc.start()
        request = asyncio.create_task(client.post(URL, data=body_in_pieces(body)).__aenter__())
        await begun.wait()
        await asyncio.sleep(1)
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        print(f"{held / len(body):.2f} of a body")
        assert held < 1.5 * len(body)
        go_on.set()
        await request


async def body_in_pieces(body: bytes) -> AsyncIterator[bytes]:
    for begin in range(0, len(body), 2**16):
        yield body[begin : begin + 2**16]


async def test_a_slow_body_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JINA_V4_BODY_TIMEOUT_S", "1")

    async def slowly() -> AsyncIterator[bytes]:
        yield b'{"task": '
        await asyncio.sleep(3)
        yield b'"code"}'

    upstream = Upstream("code")
    async with listening(upstream), gateway(upstream) as client:
        async with client.post(URL, data=slowly()) as answer:
            assert answer.status == 408
            check_error(await answer.json(), answer.headers, "BODY_TOO_SLOW")
        assert upstream.seen == []


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "code"),
    [
        ("POST", "/v1/embeddings", {}, 422, "VALIDATION_ERROR"),
        ("POST", "/v1/embeddings", {"Content-Encoding": "gzip"}, 415, "UNSUPPORTED_ENCODING"),
        ("GET", "/v1/embeddings", {}, 405, "METHOD_NOT_ALLOWED"),
        ("POST", "/health", {}, 405, "METHOD_NOT_ALLOWED"),
        ("POST", "/pooling", {}, 404, "NOT_FOUND"),
        ("GET", "/", {}, 404, "NOT_FOUND"),
        ("GET", "/v1/models/x", {}, 404, "NOT_FOUND"),
        ("GET", "/docs", {}, 404, "NOT_FOUND"),
        ("POST", "/v1/../v1/pooling", {}, 404, "NOT_FOUND"),
    ],
)
async def test_errors_are_of_one_shape(method: str, path: str, headers: dict[str, str], status: int, code: str) -> None:
    upstream = Upstream("code")
    async with listening(upstream), gateway(upstream) as client:
        data = b"{}" if method == "POST" else None
        async with client.request(method, path, data=data, headers=headers) as answer:
            assert answer.status == status
            assert answer.headers["Content-Type"] == "application/json"
            assert answer.headers["Server"] == "jina-v4-gateway"
            check_error(await answer.json(), answer.headers, code)
        assert upstream.seen == []


async def test_the_key_guards_every_route_but_health_and_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JINA_V4_API_KEY", "right")

    upstream = Upstream("code", pages={"/v1/models": '{"data": [{"id": "m"}]}', "/metrics": "", "/version": "{}"})
    async with listening(upstream), gateway(upstream) as client:
        for path in ("/v1/models", "/metrics", "/version", "/nothing"):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "right"}):
                async with client.get(path, headers=headers) as answer:
                    body = await answer.json()
                    assert (answer.status, body["code"]) == (401, "UNAUTHORIZED")
                    assert body["detail"] == body["error"]["message"]
        async with embed(client) as answer:
            assert answer.status == 401
        assert upstream.seen == []
        for path in ("/health", "/ready"):
            async with client.get(path) as answer:
                assert answer.status == 200
        good = {"Authorization": "Bearer right"}
        async with client.post(URL, data=b'{"task": "code"}', headers=good) as answer:
            assert answer.status == 200
        for path in ("/v1/models", "/metrics", "/version"):
            async with client.get(path, headers=good) as answer:
                assert answer.status == 200
        assert {seen[1]["Authorization"] for seen in upstream.seen} == {"Bearer right"}


async def test_a_key_that_only_the_servers_know_is_asked_for_by_them() -> None:
    async def refuse(_: web.Request) -> web.Response:
        return web.json_response({"detail": "no key"}, status=401)

    upstream = Upstream("code", refuse)
    async with listening(upstream), gateway(upstream) as client:
        async with embed(client) as answer:
            assert (answer.status, await answer.json()) == (401, {"detail": "no key"})
        async with client.get("/v1/models") as answer:
            assert answer.status == 401


# --- when servers or clients fail


async def test_a_client_that_leaves_has_its_work_dropped() -> None:
    events: list[str] = []
    reached = asyncio.Event()

    async def answer(_: web.Request) -> web.Response:
        reached.set()
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            events.append("cancelled")
            raise
        return web.Response()

    upstream = Upstream("code", answer, pages={"/metrics": ""})
    async with listening(upstream), gateway(upstream) as client:
        request = asyncio.create_task(embed(client))
        await reached.wait()
        request.cancel()
        begin = time.monotonic()
        while not events and time.monotonic() - begin < PATIENCE_S / 4:
            await asyncio.sleep(0.01)
        print(f"dropped after {1000 * (time.monotonic() - begin):.0f} ms")
        assert events == ["cancelled"]
        async with client.get("/metrics") as page:
            assert 'jina_v4_gateway_answers_total{status="499",task="code"} 1.0' in await page.text()


async def test_one_server_that_is_down_is_503_at_once_and_the_others_answer() -> None:
    live, dead = Upstream("code"), Upstream("retrieval")
    async with listening(live):
        async with listening(dead):
            pass
        async with gateway(live, dead) as client:
            begin = time.monotonic()
            async with client.post(URL, data=b'{"task": "retrieval.query"}') as answer:
                elapsed_s = time.monotonic() - begin
                assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
                body = await answer.json()
                check_error(body, answer.headers, "SERVER_NOT_READY")
                assert body["error"]["message"] == "the retrieval server is not ready"
            print(f"refused after {1000 * elapsed_s:.1f} ms")
            async with embed(client) as answer:
                assert answer.status == 200
            async with client.get("/health") as answer:
                assert answer.status == 200
            async with client.get("/ready") as answer:
                assert answer.status == 503
                assert await answer.json() == {"ready": False, "tasks": {"code": "ready", "retrieval": "down"}}
                assert answer.headers["Retry-After"] == "5"


async def test_a_server_that_dies_between_two_checks_is_503_and_comes_back() -> None:
    upstream = Upstream("code")
    port = free_port()
    async with listening(upstream):
        stand = gateway(upstream)
        client = await stand.__aenter__()
        port = int(upstream.url.rpartition(":")[2])
        async with embed(client) as answer:
            assert answer.status == 200
    try:
        for _ in range(2):
            async with embed(client) as answer:
                assert answer.status == 503
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", upstream.handle)
        application.on_response_prepare.append(upstream.name_task)
        runner = web.AppRunner(application)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        begin = time.monotonic()
        status = 503
        while status == 503 and time.monotonic() - begin < PATIENCE_S / 4:
            await asyncio.sleep(0.05)
            async with embed(client) as answer:
                status = answer.status
        print(f"back after {time.monotonic() - begin:.1f} s")
        assert status == 200
        await runner.cleanup()
    finally:
        await stand.__aexit__(None, None, None)


async def test_a_server_that_is_not_ready_gets_no_requests() -> None:
    starting, live = Upstream("code", ready=503), Upstream("retrieval")
    async with listening(starting), listening(live), gateway(starting, live) as client:
        async with embed(client) as answer:
            assert answer.status == 503
        assert starting.seen == []
        async with client.get("/ready") as answer:
            assert (await answer.json())["tasks"] == {"code": "not ready", "retrieval": "ready"}
        starting.ready = 200
        async with client.get("/ready") as answer:
            assert answer.status == 200


@pytest.mark.parametrize("probed_as", ["code", "retrieval"], ids=["its probe says so", "its reply says so"])
async def test_a_server_of_another_task_is_not_used(probed_as: str) -> None:
    code = Upstream("code", probed_as=probed_as)
    async with listening(code):
        wrong = Upstream("retrieval", url=code.url)
        async with gateway(wrong, default_task="retrieval") as client:
            async with client.post(URL, json={"input": ["a text"]}) as answer:
                assert answer.status == 503
                assert (await answer.json())["error"]["code"] == "SERVER_NOT_READY"
            async with client.get("/ready") as answer:
                state = "wrong server" if probed_as == "code" else "ready"
                assert (await answer.json())["tasks"] == {"retrieval": state}
            assert bool(code.seen) is (probed_as == "retrieval")


async def test_a_stock_vllm_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    """Its `/health` is 200, it has no `/ready`, and it pools in another way."""

    stock = Upstream("code", ready=404, names_task=False)
    async with listening(stock), gateway(stock) as client:
        async with embed(client) as answer:
            assert answer.status == 503
        for _ in range(2):
            async with client.get("/ready") as answer:
                assert (answer.status, await answer.json()) == (
                    503,
                    {"ready": False, "tasks": {"code": "wrong server"}},
                )
        assert stock.seen == []
        message = f"{stock.url} is not a server of jina-v4-serve: not used for code. Correct the address"
        assert caplog.text.count(message) == 1


async def test_vectors_of_a_server_that_names_no_task_are_not_passed_on() -> None:
    """Since it was probed, another program has come to the address."""

    other = Upstream("code", names_task=False, probed_as="code")
    async with listening(other), gateway(other) as client, embed(client) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (503, "SERVER_NOT_READY")
        assert len(other.seen) == 1


@pytest.mark.parametrize(
    ("status", "tasks", "passed"),
    [
        (200, "retrieval,code", True),
        (401, "code", True),
        (429, "retrieval", False),
        (200, None, False),
        (302, None, False),
        (404, None, False),
        (413, None, True),  # of a proxy before our server
        (502, None, True),
    ],
)
def test_answers_of_the_task_or_of_a_proxy_are_passed_on(status: int, tasks: str | None, passed: bool) -> None:
    assert may_answer("code", status, {} if tasks is None else {"x-jina-v4-task": tasks}) is passed


@pytest.mark.parametrize("when", ["before its answer", "in its headers"])
async def test_a_server_that_hangs_up_before_it_answers_is_503(when: str) -> None:
    async def answer(request: web.Request) -> web.Response:
        assert request.transport is not None
        if when == "in its headers":
            request.transport.write(b"HTTP/1.1 200 OK\r\nContent-")
            await asyncio.sleep(0.05)
        request.transport.abort()
        return web.Response()

    upstream = Upstream("code", answer)
    async with listening(upstream), gateway(upstream) as client, embed(client) as answer_:
        assert (answer_.status, answer_.headers["Retry-After"]) == (503, "5")


@pytest.mark.parametrize("length", ["1000000", "100", None], ids=["large", "small", "in chunks"])
async def test_half_an_answer_does_not_look_whole(length: str | None) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={} if length is None else {"Content-Length": length})
        await response.prepare(request)
        await response.write(b"half of it")
        await asyncio.sleep(0.1)
        assert request.transport is not None
        request.transport.abort()
        return response

    upstream = Upstream("code", answer)
    async with listening(upstream), gateway(upstream) as client:
        if length == "100":  # nothing had gone out yet: a clean refusal
            async with embed(client) as answer_:
                assert answer_.status == 503
            return
        async with embed(client) as answer_:
            assert answer_.status == 200
            with pytest.raises(aiohttp.ClientError):
                await answer_.read()


async def test_a_server_that_hangs_is_given_up() -> None:
    async def answer(_: web.Request) -> web.Response:
        await asyncio.sleep(30)
        return web.Response()

    upstream = Upstream("code", answer)
    async with listening(upstream), gateway(upstream, timeout_s=0.3) as client, embed(client) as answer_:
        assert answer_.status == 504
        check_error(await answer_.json(), answer_.headers, "SERVER_TIMEOUT")


# --- merged pages


async def test_models_and_tasks_are_those_of_all_live_servers() -> None:
    def listed(task: str) -> dict[str, str]:
        cards = [{"id": f"{MODEL}-{task}", "max_model_len": 4096}, {"id": MODEL, "max_model_len": 4096}]
        return {"/v1/models": json.dumps({"object": "list", "data": cards})}

    one, two = (Upstream(task, pages=listed(task)) for task in ("retrieval", "code"))
    async with listening(one):
        async with listening(two), gateway(one, two) as client, client.get("/v1/models") as answer:
            cards = [card["id"] for card in (await answer.json())["data"]]
            assert answer.headers["X-Jina-V4-Task"] == "retrieval, code"
            assert answer.headers["X-Jina-V4-Pooling"] == "engine"
            assert answer.headers["X-Jina-V4-Revision"] == "of-retrieval, of-code"
        assert cards == [f"{MODEL}-retrieval", MODEL, f"{MODEL}-code"]
        async with gateway(one, two) as client, client.get("/v1/models") as answer:
            assert [card["id"] for card in (await answer.json())["data"]] == [f"{MODEL}-retrieval", MODEL]
    async with gateway(one, two) as client, client.get("/v1/models") as answer:
        assert answer.status == 503


PAGE = """# HELP vllm:success_total Finished requests
# TYPE vllm:success_total counter
vllm:success_total{engine="0",reason="a \\"b\\" \\\\ c"} 3.0
# HELP latency_seconds Latency
# TYPE latency_seconds histogram
latency_seconds_bucket{le="0.1"} 1.0
latency_seconds_bucket{le="+Inf"} 2.0
latency_seconds_count 2.0
latency_seconds_sum 0.5
# HELP jobs Jobs
# TYPE jobs gauge
jobs{task="x"} NaN
"""


def test_metrics_of_all_servers_are_one_page_with_each_family_once() -> None:
    page = merge(GatewayMetrics().registry, {"code": PAGE, "retrieval": PAGE}).decode()
    lines = page.splitlines()
    for family in ("vllm:success_total", "latency_seconds", "jobs"):
        assert [line.split()[1] for line in lines if line.startswith("#") and line.split()[2] == family] == [
            "HELP",
            "TYPE",
        ]
    for task in ("code", "retrieval"):
        assert f'vllm:success_total{{engine="0",reason="a \\"b\\" \\\\ c",task="{task}"}} 3.0' in lines
        assert f'latency_seconds_bucket{{le="+Inf",task="{task}"}} 2.0' in lines
        assert f'jobs{{exported_task="x",task="{task}"}} NaN' in lines
    # Samples of a family stand together.
    families = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(families) == len(set(families))


async def test_metrics_and_versions_are_there_without_any_server() -> None:
    dead = Upstream("code", url=f"http://127.0.0.1:{free_port()}")
    async with gateway(dead) as client:
        async with client.get("/metrics") as answer:
            assert 'jina_v4_gateway_server_ready{task="code"} 0.0' in await answer.text()
        async with client.get("/version") as answer:
            assert set(await answer.json()) == {"version", "servers"}
        async with client.head("/health") as answer:
            assert (answer.status, await answer.read()) == (200, b"")


# --- the command


@pytest.mark.parametrize(("host", "names"), [("::1", ["[::1]"]), ("::", ["[::1]", "127.0.0.1"])])
async def test_an_ipv6_address_is_listened_on(host: str, names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    port = free_port()
    options = GatewaySettings({"code": "http://127.0.0.1:1"}, host=host, port=port)
    async with running(options, asyncio.Event()), aiohttp.ClientSession() as client:
        assert f"http://[::1]:{port}/v1 " in "".join(capsys.readouterr())
        for name in names:
            async with client.get(f"http://{name}:{port}/health") as answer:
                assert answer.status == 200


async def wait_ready(client: aiohttp.ClientSession, url: str) -> None:
    while True:
        try:
            async with client.get(f"{url}/ready") as ready:
                assert ready.status == 200
            return
        except aiohttp.ClientConnectionError:
            await asyncio.sleep(0.05)


async def test_sigterm_finishes_what_is_in_flight_and_refuses_what_is_new() -> None:
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def answer(_: web.Request) -> web.Response:
        reached.set()
        await go_on.wait()
        return web.json_response({"late": True})

    upstream = Upstream("code", answer)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    async with listening(upstream), aiohttp.ClientSession(headers=JSON) as client:
        process = await asyncio.create_subprocess_exec(
            BIN / "jina-v4-serve", "gateway", "--server", f"code={upstream.url}", "--port", str(port)
        )
        await wait_ready(client, url)
        request = asyncio.create_task(client.post(f"{url}{URL}", data=b'{"task": "code"}'))
        await reached.wait()
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(ConnectionError):
            while True:  # until it refuses
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                await asyncio.sleep(0.02)
        assert process.returncode is None
        go_on.set()
        async with await request as late:
            assert (late.status, await late.json()) == (200, {"late": True})
            assert late.headers["Connection"] == "close"
        assert await process.wait() == 0


async def test_the_gateway_opens_as_many_files_as_its_user_may() -> None:
    """Each request is two connections; services and containers often begin with 1,024 files."""
    n_requests, port = 100, free_port()

    async def late(_: web.Request) -> web.Response:
        await asyncio.sleep(1)
        return web.json_response({})

    async def embed_one(client: aiohttp.ClientSession) -> int:
        async with client.post(f"http://127.0.0.1:{port}{URL}", data=b'{"task": "code"}') as answer:
            return answer.status

    upstream = Upstream("code", late)
    connector = aiohttp.TCPConnector(limit=0)
    async with listening(upstream), aiohttp.ClientSession(headers=JSON, connector=connector) as client:
        process = await asyncio.create_subprocess_exec(
            *("sh", "-c", 'ulimit -Sn 128 && exec "$@"', "sh"),
            *(BIN / "jina-v4-serve", "gateway", "--server", f"code={upstream.url}", "--port", str(port)),
        )
        try:
            await wait_ready(client, f"http://127.0.0.1:{port}")
            assert await asyncio.gather(*(embed_one(client) for _ in range(n_requests))) == [200] * n_requests
        finally:
            process.terminate()
            await process.wait()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--server", "x=http://h"], 1, "the task before the = must be one of retrieval, text-matching, code"),
        (["--server", "code"], 1, "write an address such as http://127.0.0.1:8001 after the ="),
        (["--server", "code=ftp://h"], 1, "write an address such as"),
        (["--server", "code=http://h/v1"], 1, "write an address such as"),
        (["--server", "code=http://h", "--server", "code=http://i"], 1, "there is a server for code already"),
        (["--server", "code=http://h", "--port", "99999"], 1, "cannot listen on 127.0.0.1:99999"),
        (["--server", "code=http://h", "--default-task", "retrieval"], 1, "--default-task retrieval has no server"),
        ([], 2, "--server"),
    ],
)
def test_a_bad_call_of_the_gateway_fails_at_once(arguments: list[str], code: int, message: str) -> None:
    done = subprocess.run(
        [BIN / "jina-v4-serve", "gateway", *arguments], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_servers_are_read_from_arguments() -> None:
    assert parse_servers(["code=http://h:1/", "retrieval=https://i"]) == {
        "code": "http://h:1",
        "retrieval": "https://i",
    }
    with pytest.raises(OptionError):
        parse_servers(["code=http://h:1?x=1"])
