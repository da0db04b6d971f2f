"""Several images behind URLs: fetched at the same time, handed over one by one, ended together."""

import asyncio
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import httpx2
import numpy as np
import pytest
from image_files import plain
from jina_v4_client import AsyncEmbeddingsClient, EmbeddingsClient, ImageError
from jina_v4_client._fetch import fetch_image

PATIENCE_S = 100.0  # until a test gives up what never comes
N = 6

Wait = Callable[[int], object]


PICTURES = [plain((60, 40), (number, 2, 3)) for number in range(N)]


class Album:
    """A site with pictures, each of which waits before it is given; it embeds as well."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self.wait: Wait = lambda number: None
        self.missing: set[int] = set()
        self.most = 0  # fetches in flight at a time
        self._in_flight = 0
        self._lock = threading.Lock()
        server.play_ours()
        for number in range(N):
            server.routes[f"/{number}.png"] = functools.partial(self._play, number)
        self.urls = [f"{server.url}/{number}.png" for number in range(N)]

    def _play(self, number: int, _: object) -> Any:
        with self._lock:
            self._in_flight += 1
            self.most = max(self.most, self._in_flight)
        self.wait(number)
        with self._lock:
            self._in_flight -= 1
        return self.server.answer(PICTURES[number], 404 if number in self.missing else 200)

    def fetched(self) -> list[str]:
        return sorted(path for path in self.server.paths() if path.endswith(".png"))


@pytest.fixture
def album(server: Any) -> Album:
    return Album(server)


@pytest.mark.parametrize("call", ["encode_image", "encode"])
def test_urls_are_fetched_at_once_but_not_too_many(album: Album, make_client: Any, call: str) -> None:
    full, one_too_many = threading.Barrier(3), threading.Event()

    def wait(_: int) -> None:
        full.wait(PATIENCE_S)  # breaks, and the test fails, unless three come
        if album.most > 3 or one_too_many.wait(0.1):
            one_too_many.set()

    album.wait = wait
    client = make_client(album.server.url, max_concurrency=3)
    found = getattr(client, call)(album.urls)
    assert album.most == 3
    assert not full.broken
    np.testing.assert_array_equal(found, getattr(client, call)(PICTURES))


def test_a_dead_host_delays_no_other_url_and_the_order_is_kept(album: Album, make_client: Any) -> None:
    """The first, in one of two threads, breaks off when all others have been given."""
    others, held = threading.Semaphore(0), []

    def wait(number: int) -> None:
        if number == 0:
            held.append(all(others.acquire(timeout=PATIENCE_S) for _ in range(N - 1)))
        else:
            others.release()

    album.wait = wait
    album.missing = {0}
    found = make_client(album.server.url, max_concurrency=2).encode_image(album.urls, on_error="skip")
    assert held == [True]
    assert list(found.errors) == [0]
    assert found.vectors[0] is None
    expected = make_client(album.server.url).encode_image(PICTURES[1:])
    np.testing.assert_array_equal(found.vectors[1:], expected)


def test_texts_files_and_urls_keep_their_places(album: Album, make_client: Any) -> None:
    client = make_client(album.server.url)
    mixed = [album.urls[0], "a text", PICTURES[1], album.urls[2], "another"]
    found = client.encode(mixed, prompt_name="query")
    expected = client.encode([PICTURES[0], "a text", PICTURES[1], PICTURES[2], "another"], prompt_name="query")
    np.testing.assert_array_equal(found, expected)
    asked = [json.dumps(body) for body in album.server.bodies("/v1/embeddings")]  # of texts and of images, twice
    assert sorted(asked[:2]) == sorted(asked[2:])


def test_the_error_is_that_of_the_first_place(album: Album, make_client: Any) -> None:
    """The second of two missing ones, and what is no image at all, are known earlier."""
    later = threading.Event()
    album.wait = lambda number: later.wait(PATIENCE_S) if number == 1 else later.set() if number == 3 else None
    album.missing = {1, 3}
    images = [*album.urls[:5], b"no image"]
    with pytest.raises(ImageError, match=rf"^images\[1\] \('{album.urls[1]}'\): the URL answered with status 404"):
        make_client(album.server.url).encode_image(images)
    assert later.is_set()
    assert "/v1/embeddings" not in album.server.paths()


def test_nothing_behind_an_error_is_fetched(album: Album, make_client: Any) -> None:
    with pytest.raises(ImageError, match=r"^images\[2\] \(8 bytes\): not an image"):
        make_client(album.server.url).encode_image([*album.urls[:2], b"no image", *album.urls[2:]])
    assert album.fetched() == ["/0.png", "/1.png"]


def test_the_time_limit_of_the_call_ends_all(album: Album, make_client: Any) -> None:
    album.wait = lambda _: album.server.closing.wait(PATIENCE_S)
    client = make_client(album.server.url, max_concurrency=2, total_timeout_s=0.5)
    with pytest.raises(ImageError, match=r"^images\[0\] .*(time limit of the call was reached|Timeout)"):
        client.encode_image(album.urls)
    assert set(album.server.paths()) <= {"/0.png", "/1.png"}


def test_a_fetch_that_began_before_an_error_is_finished(album: Album, make_client: Any) -> None:
    """It may fail as well, and is the first then; what is behind the error is given up."""
    failed = threading.Event()
    album.wait = lambda number: failed.wait(PATIENCE_S) if number == 0 else failed.set() if number == 1 else None
    album.missing = {0, 1}
    with pytest.raises(ImageError, match=r"^images\[0\]"):
        make_client(album.server.url, max_concurrency=2).encode_image(album.urls)
    assert failed.is_set()
    assert album.fetched() == ["/0.png", "/1.png"]


def test_a_mistake_of_ours_is_not_hidden(album: Album, make_client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("_calls", "_fetch"):
        monkeypatch.setattr(f"jina_v4_client.{module}.prepare", lambda _: 1 / 0)
    for images in (album.urls, PICTURES):
        with pytest.raises(ZeroDivisionError):
            make_client(album.server.url).encode_image(images)


def test_an_event_loop_goes_on_meanwhile(album: Album) -> None:
    arrived, ticked, held = threading.Event(), threading.Event(), []

    def wait(_: int) -> None:
        arrived.set()
        held.append(ticked.wait(PATIENCE_S))

    async def tick() -> None:
        while not arrived.is_set():
            await asyncio.sleep(0.01)
        ticked.set()

    async def call() -> None:
        async with AsyncEmbeddingsClient(album.server.url, task="retrieval") as client:
            await asyncio.gather(client.encode_image(album.urls), tick())

    album.wait = wait
    asyncio.run(call())
    assert held == [True] * N


def test_a_cancelled_task_fetches_no_more_and_the_loop_ends(album: Album, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived, ended = threading.Semaphore(0), threading.Event()
    ended_in_time, begun = [], []

    def wait(_: int) -> None:
        arrived.release()
        ended_in_time.append(ended.wait(PATIENCE_S))

    async def fetch(http: httpx2.AsyncClient, url: str, time_left_s: float) -> bytes:
        begun.append(url)
        return await fetch_image(http, url, time_left_s)

    async def call() -> None:
        async with AsyncEmbeddingsClient(album.server.url, task="retrieval", max_concurrency=2) as client:
            task = asyncio.create_task(client.encode_image(album.urls))
            for _ in range(2):
                assert await asyncio.to_thread(arrived.acquire, timeout=PATIENCE_S)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    album.wait = wait
    monkeypatch.setattr("jina_v4_client._fetch.fetch_image", fetch)
    asyncio.run(call())  # waits for its threads; those that fetch are not among them
    assert not ended_in_time
    ended.set()
    assert begun == album.urls[:2]
    assert album.fetched() == ["/0.png", "/1.png"]


SCRIPT = """
import sys
from jina_v4_client import EmbeddingsClient
client = EmbeddingsClient(sys.argv[1], task="retrieval", max_concurrency=2)
try:
    client.encode_image(sys.argv[2:])
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_ends_the_call_and_the_program_at_once(album: Album) -> None:
    arrived, ended, ended_in_time = threading.Semaphore(0), threading.Event(), []

    def wait(_: int) -> None:
        arrived.release()
        ended_in_time.append(ended.wait(2 * PATIENCE_S))

    album.wait = wait
    command = [sys.executable, "-c", SCRIPT, album.server.url, *album.urls]
    environment = {**os.environ, "no_proxy": "127.0.0.1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        try:
            for _ in range(2):
                assert arrived.acquire(timeout=PATIENCE_S)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
            ended.set()
    assert (process.returncode, out, err) == (0, b"interrupted\n", b"")
    assert album.fetched() == ["/0.png", "/1.png"]


def test_a_client_of_one_request_at_a_time_fetches_one_at_a_time(album: Album) -> None:
    with EmbeddingsClient(album.server.url, task="retrieval", max_concurrency=1) as client:
        client.encode_image(album.urls)
    assert album.most == 1
