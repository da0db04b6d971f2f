"""Where a client with an event loop of its own could break: other loops, threads, forks, exits, and swapped replies."""

import asyncio
import contextlib
import gc
import itertools
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from jina_v4_client import (
    ArgumentError,
    AsyncEmbeddingsClient,
    BadReplyError,
    EmbeddingsClient,
    ServerConnectionError,
)
from jina_v4_client._transport import Transport
from PIL import Image

pytestmark = pytest.mark.proof

PATIENCE_S = 100.0


def client_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "jina-v4-client"]


def until(found: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE_S
    while not found() and time.monotonic() < end:
        time.sleep(0.01)
    return found()


def right(server: Any, client: Any, text: str) -> bool:
    return bool((client.encode_text(text) == server.vector(f"Query: {text}")).all())


# --- loops ---


def test_a_running_loop_may_wait_for_it_as_in_a_notebook(server: Any, client: EmbeddingsClient) -> None:
    server.play_ours()

    async def cell() -> bool:
        return right(server, client, "a")

    assert asyncio.run(cell())
    assert right(server, client, "b")


@pytest.mark.parametrize("n_calls", [1, 3])
def test_one_client_serves_one_loop_after_another(server: Any, n_calls: int) -> None:
    server.play_ours()
    client = AsyncEmbeddingsClient(server.url, task="retrieval", max_retries=0)

    async def call(number: int) -> None:
        texts = [f"{number} {n}" for n in range(n_calls)]
        found = await asyncio.gather(*map(client.encode_text, texts))
        np.testing.assert_array_equal(found, [server.vector(f"Query: {text}") for text in texts])

    for number in range(4):
        asyncio.run(call(number))


def test_two_loops_at_a_time_do_not_disturb_each_other(server: Any) -> None:
    server.play_ours()
    client = AsyncEmbeddingsClient(server.url, task="retrieval", max_retries=0)

    async def call(name: str) -> None:
        for n in range(20):
            vector = await client.encode_text(f"{name} {n}")
            np.testing.assert_array_equal(vector, server.vector(f"Query: {name} {n}"))

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(asyncio.run, call(f"loop {n}")) for n in range(4)]:
            done.result()


# --- threads ---


def test_32_threads_share_a_client(server: Any, client: EmbeddingsClient) -> None:
    server.play_ours()
    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(lambda n: right(server, client, f"text {n}"), range(320)))
    assert len(client_threads()) == 1


def test_the_caller_is_told_how_far_it_is_in_its_own_thread(server: Any, client: EmbeddingsClient) -> None:
    server.play_ours()
    told: list[tuple[str, int]] = []
    client.encode_text(
        ["a", "b"], batch_size=1, progress=lambda done, _: told.append((threading.current_thread().name, done))
    )
    assert told == [(threading.current_thread().name, 1), (threading.current_thread().name, 2)]


def test_a_progress_function_may_use_the_client_or_end_the_call(server: Any, client: EmbeddingsClient) -> None:
    server.play_ours()
    inner: list[bool] = []
    client.encode_text("a", progress=lambda *_: inner.append(right(server, client, "b")))
    assert inner == [True]
    with pytest.raises(ZeroDivisionError):
        client.encode_text(["a"] * 9, batch_size=1, progress=lambda *_: 1 / 0)
    assert right(server, client, "c")


def test_a_client_that_is_closed_in_the_middle_of_a_call_says_so(server: Any) -> None:
    server.play_ours()
    arrived = threading.Event()
    server.routes["/v1/embeddings"] = lambda _: (arrived.set(), server.closing.wait(PATIENCE_S))[0] or server.dropped()
    client = EmbeddingsClient(server.url, task="retrieval")
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.encode_text, "a")
        assert arrived.wait(PATIENCE_S)
        client.close()
        with pytest.raises(ArgumentError, match="this client was closed in the middle of the call"):
            call.result(PATIENCE_S)
    assert client_threads() == []


def test_a_client_that_is_closed_in_the_middle_of_a_coroutine_says_so_too(server: Any) -> None:
    server.play_ours()
    embed, arrived, release = server.routes["/v1/embeddings"], threading.Event(), threading.Event()
    server.routes["/v1/embeddings"] = lambda seen: (arrived.set(), release.wait(PATIENCE_S), embed(seen))[2]

    async def call() -> None:
        client = AsyncEmbeddingsClient(server.url, task="retrieval", max_concurrency=1)
        task = asyncio.create_task(client.encode_text(["a", "b"], batch_size=1))
        assert await asyncio.to_thread(arrived.wait, PATIENCE_S)
        await client.close()
        release.set()
        with pytest.raises((ArgumentError, ServerConnectionError)):
            await task

    asyncio.run(call())
    assert server.paths().count("/v1/embeddings") == 1


def test_the_tasks_of_the_http_library_are_ended_by_their_call(server: Any) -> None:
    """It knows the order that they need; ended by somebody else, they may leave warnings at a program's end."""
    arrived, running = threading.Event(), []

    class Waiting(httpx2.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            task = asyncio.create_task(asyncio.sleep(PATIENCE_S))
            try:
                await asyncio.to_thread(arrived.set)
                return await asyncio.Future()
            finally:
                running.append(not task.cancelling())
                task.cancel()

    client = EmbeddingsClient(server.url, task="retrieval", http_client=httpx2.AsyncClient(transport=Waiting()))
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.encode_text, "a")
        assert arrived.wait(PATIENCE_S)
        client.close()
        with pytest.raises(ArgumentError):
            call.result(PATIENCE_S)
    assert running == [True]
    assert client_threads() == []


def hooked(server: Any, act: Callable[[], object]) -> EmbeddingsClient:
    """A client whose requests do something in its own loop first."""

    async def hook(_: object) -> None:
        act()

    http_client = httpx2.AsyncClient(event_hooks={"request": [hook]})
    return EmbeddingsClient(server.url, task="retrieval", http_client=http_client)


def test_what_ends_a_program_does_not_end_the_loop_of_others(server: Any) -> None:
    server.play_ours()
    ends = iter([True])
    with hooked(server, lambda: sys.exit(7) if next(ends, False) else None) as client:
        with pytest.raises(SystemExit, match="7"):
            client.encode_text("a")
        assert right(server, client, "b")


def test_a_client_that_would_wait_for_itself_says_so(server: Any) -> None:
    server.play_ours()
    client = hooked(server, lambda: client.encode_text("inner"))
    with client, pytest.raises(ArgumentError, match="called from its own event loop"):
        client.encode_text("a")


class OfOneThread(Sequence[str]):
    """Texts that are read in the thread that made them, as those of a database's connection are."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def __len__(self) -> int:
        return 2

    def __getitem__(self, place: Any) -> Any:
        assert threading.get_ident() == self._thread
        return "ab"[place]


def test_a_sequence_is_read_in_the_callers_thread(server: Any, client: EmbeddingsClient) -> None:
    server.play_ours()
    assert len(client.encode_text(OfOneThread())) == 2


def test_connections_of_the_callers_are_of_one_client_only(server: Any) -> None:
    """They belong to one event loop: a pool in two of them can wait for ever."""
    server.play_ours()
    http_client = httpx2.AsyncClient()
    with EmbeddingsClient(server.url, task="retrieval", http_client=http_client) as client:
        assert right(server, client, "a")
        with pytest.raises(ArgumentError, match="AsyncClient is used by another EmbeddingsClient"):
            EmbeddingsClient(server.url, http_client=http_client)
    with pytest.raises(ArgumentError, match="this client is closed"):
        client.encode_text("a")


def test_connections_that_the_caller_closed_are_an_error_in_words(server: Any) -> None:
    server.play_ours()

    async def call() -> None:
        async with httpx2.AsyncClient() as http_client:
            client = AsyncEmbeddingsClient(server.url, task="retrieval", http_client=http_client)
            await client.encode_text("a")
        with pytest.raises(ArgumentError, match="this client is closed"):
            await client.encode_text("a", on_error="skip")

    asyncio.run(call())


@pytest.mark.parametrize("n_bad", [0, 3])
def test_a_result_goes_when_the_caller_lets_go_of_it(server: Any, make_client: Any, n_bad: int) -> None:
    """At once, and not with the next garbage collection: large arrays do not make that come sooner."""
    server.play_ours()
    embed = server.routes["/v1/embeddings"]

    def play(seen: Any) -> Any:
        bad = [n for n, item in enumerate(seen.body["input"]) if item["text"].startswith("bad")]
        return (
            server.json_answer({"error": {"message": "no", "param": f"input[{bad[0]}]"}}, 422) if bad else embed(seen)
        )

    server.routes["/v1/embeddings"] = play
    client = make_client(server.url)
    gc.collect()
    gc.disable()
    try:
        found = client.encode_text(["good", *["bad"] * n_bad], on_error="skip", batch_size=2)
        assert len(found.errors) == n_bad
        vector = weakref.ref(found.vectors[0])
        del found
        assert until(lambda: vector() is None)
    finally:
        gc.enable()


class SlowPath(os.PathLike[str]):
    """The path of a picture on a file system that does not answer for a while."""

    def __init__(self, path: Path) -> None:
        self.opened = threading.Event()
        self.n_opened = self.most = 0
        self._path, self._lock = path, threading.Lock()

    def __fspath__(self) -> str:
        with self._lock:
            self.n_opened += 1
            self.most = max(self.most, self.n_opened)
        assert self.opened.wait(PATIENCE_S)
        with self._lock:
            self.n_opened -= 1
        return str(self._path)


@pytest.fixture
def slow(tmp_path: Path) -> SlowPath:
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    return SlowPath(tmp_path / "a.png")


def image_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("jina-v4-images")]


def test_the_name_of_a_host_is_looked_up_while_images_are_read(server: Any, slow: SlowPath) -> None:
    """asyncio does it in the threads of the loop, here one, in which images must not be read."""
    server.play_ours()

    async def call() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        url = server.url.replace("127.0.0.1", "localhost")
        async with AsyncEmbeddingsClient(url, task="retrieval", max_retries=0) as client:
            images = asyncio.create_task(client.encode_image([slow]))
            while not slow.n_opened:
                await asyncio.sleep(0.01)
            try:
                np.testing.assert_array_equal(await client.encode_text("a"), server.vector("Query: a"))
            finally:
                slow.opened.set()
            assert len(await images) == 1

    asyncio.run(call())


def test_the_images_of_many_calls_are_read_in_few_threads_that_end(
    server: Any, client: EmbeddingsClient, slow: SlowPath
) -> None:
    server.play_ours()
    with ThreadPoolExecutor(16) as pool:
        calls = [pool.submit(client.encode_image, [slow] * 3) for _ in range(16)]
        assert right(server, client, "a")
        assert until(lambda: slow.n_opened == (os.cpu_count() or 1))
        slow.opened.set()
        assert [len(call.result()) for call in calls] == [3] * 16
    assert slow.most == os.cpu_count()
    assert until(lambda: not image_threads())


# --- forks ---


def embed_in_child(server: Any, client: Any, name: str, n_calls: int, outcomes: Any) -> None:
    errors, wrong = [], 0
    for n in range(n_calls):
        try:
            wrong += not right(server, client, f"{name} {n}")
        except Exception as error:
            errors.append(repr(error))
    outcomes.put((wrong, errors))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # that is the point here
def test_a_thousand_calls_of_eight_forked_workers_and_their_parent_are_all_right(server: Any) -> None:
    """Forked while the parent uses the client: its connections are warm, and some calls are on their way."""
    server.play_ours()
    context = multiprocessing.get_context("fork")
    outcomes = context.SimpleQueue()
    with EmbeddingsClient(server.url, task="retrieval") as client, ThreadPoolExecutor(2) as pool:
        assert right(server, client, "before")
        parents = [
            pool.submit(lambda n=n: [right(server, client, f"parent {n} {i}") for i in range(60)]) for n in (0, 1)
        ]
        workers = [
            context.Process(target=embed_in_child, args=(server, client, f"child {n}", 110, outcomes)) for n in range(8)
        ]
        for worker in workers:
            worker.start()
        found = [outcomes.get() for _ in workers]
        for worker in workers:
            worker.join(PATIENCE_S)
        assert found == [(0, [])] * 8
        assert [worker.exitcode for worker in workers] == [0] * 8
        assert all(all(done.result()) for done in parents)
        assert right(server, client, "after")


FORKED_COROUTINES = """
import asyncio, os, sys
from jina_v4_client import AsyncEmbeddingsClient
client = AsyncEmbeddingsClient(sys.argv[1], task="retrieval", max_retries=0)
async def call(): return (await client.encode_text("a")).shape
def say(shape): os.write(1, f"{shape}\\n".encode())  # in one write, so that two processes' lines never mix
say(asyncio.run(call()))
child = os.fork()
say(asyncio.run(call()))
if child: sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def run(script: str, server: Any, *options: str) -> str:
    """Run a program, every warning an error; return what it prints."""
    command = [sys.executable, "-W", "error", *options, "-c", script, server.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=4 * PATIENCE_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_client_for_coroutines_may_be_forked_too(server: Any) -> None:
    server.play_ours()
    assert run(FORKED_COROUTINES, server) == "(256,)\n" * 3


# --- ends ---

NEVER_CLOSED = """
import sys
from jina_v4_client import EmbeddingsClient
client = EmbeddingsClient(sys.argv[1], task="retrieval")
print(client.encode_text("a").shape)
"""
IN_A_FUNCTION = """
import sys
from jina_v4_client import EmbeddingsClient
def embed(): return EmbeddingsClient(sys.argv[1], task="retrieval").encode_text("a")
print(embed().shape)
"""
FORKED = """
import os, sys
from jina_v4_client import EmbeddingsClient
client = EmbeddingsClient(sys.argv[1], task="retrieval")
client.encode_text("a")
child = os.fork()
shape = client.encode_text("a").shape
if child: os.waitpid(child, 0); print(shape)
"""
FORKED_WHILE_IMAGES_ARE_READ = """
import os, sys, threading
from PIL import Image
from jina_v4_client import EmbeddingsClient
client = EmbeddingsClient(sys.argv[1], task="retrieval")
reading, go_on = threading.Event(), threading.Event()
class Path(os.PathLike):
    def __fspath__(self): reading.set(); go_on.wait(); return "nowhere.png"
thread = threading.Thread(target=client.encode_image, args=[[Path()] * 40], kwargs={"on_error": "skip"})
thread.start()
reading.wait()
child = os.fork()
if child == 0: print(client.encode_image(Image.new("RGB", (30, 30))).shape); sys.exit()
go_on.set()
thread.join()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


PASSED = """
import asyncio, os, sys, httpx2
from jina_v4_client import ArgumentError, AsyncEmbeddingsClient
client = AsyncEmbeddingsClient(sys.argv[1], task="retrieval", http_client=httpx2.AsyncClient())
child = os.fork()
if child: sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
try: asyncio.run(client.encode_text("a"))
except ArgumentError as error: print(error)
"""


def test_a_child_does_not_use_the_connections_that_were_passed_to_its_parent(server: Any) -> None:
    server.play_ours()
    assert run(PASSED, server) == (
        "the connections that were passed to this client are the parent's; make a new client\n"
    )


@pytest.mark.parametrize(
    "script",
    [NEVER_CLOSED, IN_A_FUNCTION, FORKED, FORKED_WHILE_IMAGES_ARE_READ],
    ids=["never closed", "dropped", "forked", "forked while images are read"],
)
def test_a_program_ends_in_silence(server: Any, script: str) -> None:
    server.play_ours()
    fork = ["-W", "ignore::DeprecationWarning"] if "fork" in script else []  # from 3.12 on: forked with threads
    assert run(script, server, *fork) == "(256,)\n"


@pytest.fixture
def open_sockets(server: Any) -> Iterator[Callable[[], int]]:
    """How many sockets this process has more than at first."""

    def count() -> int:
        found = 0
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                found += str(entry.readlink()).startswith("socket:")
        return found

    before = count()
    yield lambda: count() - before


def test_a_dropped_client_leaves_no_thread_and_no_socket(server: Any, open_sockets: Callable[[], int]) -> None:
    server.play_ours()
    client = EmbeddingsClient(server.url, task="retrieval")
    assert right(server, client, "a")
    assert len(client_threads()) == 1
    gone = weakref.ref(client)
    del client
    gc.collect()
    assert gone() is None
    assert client_threads() == []
    assert until(lambda: open_sockets() <= 0)


def test_a_thousand_clients_leave_nothing(server: Any, open_sockets: Callable[[], int]) -> None:
    server.play_ours()
    for number in range(1000):
        client = EmbeddingsClient(server.url, task="retrieval")
        if number % 50 == 0:
            assert right(server, client, f"text {number}")
    del client
    gc.collect()
    assert client_threads() == []
    assert until(lambda: open_sockets() <= 0)


# --- replies of others ---


class Swapping:
    """A proxy that gives two requests, which come at a time over two connections, each other's replies."""

    def __init__(self, server: Any) -> None:
        self.pairs = 0
        self._server = server
        self._second: Any = None
        self._lock = threading.Lock()
        self._meet = threading.Barrier(2, timeout=5)

    def play(self, embed: Callable[[Any], Any]) -> Callable[[Any], Any]:
        answers: dict[int, Any] = {}

        def swapped(seen: Any) -> Any:
            answer = embed(seen)
            answer.headers["x-request-id"] = seen.headers["x-request-id"]
            try:
                place = self._meet.wait()
                answers[place] = answer
                self._meet.wait()
            except threading.BrokenBarrierError:
                return answer
            other = answers[1 - place]
            self.pairs += 1
            return self._server.answer(other.content, other.status, **other.headers)

        return swapped


def test_swapped_replies_are_noticed(server: Any, make_client: Any) -> None:
    server.play_ours()
    embed = server.routes["/v1/embeddings"]
    client = make_client(server.url, max_concurrency=2)
    client.encode_text("a")
    proxy = Swapping(server)
    server.routes["/v1/embeddings"] = proxy.play(embed)
    with pytest.raises(BadReplyError, match="this is the reply to another request; nothing is returned"):
        client.encode_text(["b", "c"], batch_size=1)
    assert proxy.pairs
    server.routes["/v1/embeddings"] = embed
    np.testing.assert_array_equal(client.encode_text(["b", "c"]), [server.vector(f"Query: {t}") for t in "bc"])


@pytest.mark.parametrize("path", ["/v1/models", "/v1/embeddings"])
@pytest.mark.parametrize("told", ["another", "", None])
def test_a_reply_without_the_id_that_was_sent_is_refused(server: Any, make_client: Any, path: str, told: Any) -> None:
    server.play_ours()
    play = server.routes[path]

    def answer(seen: Any) -> Any:
        given = play(seen)
        return server.answer(given.content, given.status, **given.headers | {"x-request-id": told})

    server.routes[path] = answer
    with pytest.raises(BadReplyError, match=f"answered with X-Request-ID: {told}, and "):
        make_client(server.url).encode_text("a")


@pytest.mark.parametrize("end", ["_disconnect", "close"])
def test_connections_that_end_before_a_request_of_another_call_are_an_error_in_words(
    server: Any, make_client: Any, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """As when another call got a reply that was not its own, or somebody closed the client."""
    server.play_ours()
    connect, n_ends = Transport._connected, itertools.count()

    async def connect_and_end(transport: Transport) -> Any:
        api = await connect(transport)
        if next(n_ends) == 0:
            await getattr(transport, end)()
        return api

    monkeypatch.setattr(Transport, "_connected", connect_and_end)
    client = make_client(server.url, max_retries=1)
    if end == "close":
        with pytest.raises(ArgumentError, match="this client was closed in the middle of the call"):
            client.encode_text("a")
        return
    assert right(server, client, "a")
    n_ends = itertools.count()
    with pytest.raises(ServerConnectionError, match=rf"the connections to {server.url} were closed"):
        make_client(server.url, max_retries=0).encode_text("a")


def test_a_stock_server_need_not_repeat_the_id_but_must_not_change_it(server: Any, make_client: Any) -> None:
    server.play_stock()
    play = server.routes["/pooling"]
    for told, fine in ((None, True), ("another", False)):

        def answer(seen: Any, told: Any = told) -> Any:
            given = play(seen)
            return server.answer(given.content, given.status, **given.headers | {"x-request-id": told})

        server.routes["/pooling"] = answer
        client = make_client(server.url)
        if fine:
            assert client.encode_text("a").shape == (256,)
        else:
            with pytest.raises(BadReplyError, match="reply to another request"):
                client.encode_text("a")


def test_replies_that_are_one_behind_on_a_connection_are_refused() -> None:
    """As when a forked child has read one: each reply belongs to the request before, and nothing in it says so."""
    server = socket.create_server(("127.0.0.1", 0))
    cards = b'{"data": [{"id": "jina-embeddings-v4-retrieval", "max_model_len": 4096}]}'

    def serve() -> None:
        late = ""
        for _ in range(2):
            connection, _ = server.accept()
            with connection:
                while received := connection.recv(65536):
                    ids = [
                        line.split(b":")[1].strip() for line in received.split(b"\r\n") if b"equest-id" in line.lower()
                    ]
                    shown, late = (late or ids[0].decode()), ids[0].decode()
                    head = "HTTP/1.1 200 OK\r\nx-jina-v4-task: retrieval\r\nx-jina-v4-pooling: engine\r\n"
                    head += f"x-request-id: {shown}\r\ncontent-length: {len(cards)}\r\n\r\n"
                    connection.sendall(head.encode() + cards)
            late = ""

    thread = threading.Thread(target=serve)
    thread.start()
    with server, EmbeddingsClient(f"http://127.0.0.1:{server.getsockname()[1]}", task="retrieval") as client:
        client.revision()
        with pytest.raises(BadReplyError, match="reply to another request"):
            client.revision()
        client.revision()  # over a new connection
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
