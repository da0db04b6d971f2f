"""A call that is cancelled ends at once: tasks, Ctrl-C, and what becomes of the connections."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from jina_v4_client import AsyncEmbeddingsClient, ServerConnectionError, ServerRefusedError, ServerTimeoutError

CARD = b'{"data": [{"id": "jina-embeddings-v4-retrieval", "max_model_len": 4096}]}'
HEAD = b"HTTP/1.1 200 OK\r\nx-jina-v4-task: retrieval\r\nx-jina-v4-pooling: engine\r\ncontent-length: %d\r\n"
REQUEST_ID = re.compile(rb"x-request-id: \w+\r\n", re.IGNORECASE)


class Mute:
    """Says what it serves and never answers a request for vectors; counts those, and the connections that ended."""

    def __init__(self) -> None:
        self.asked = threading.Semaphore(0)
        self.ended = threading.Semaphore(0)
        self._closing = False
        self._waiting: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()
            if self._closing:
                return

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            while True:
                received = connection.recv(65536)
                if received.startswith(b"GET"):
                    connection.sendall(HEAD % len(CARD) + REQUEST_ID.findall(received)[0] + b"\r\n" + CARD)
                elif received.startswith(b"POST"):
                    self._waiting.append(connection)
                    self.asked.release()
                elif not received:
                    self.ended.release()
                    return

    def hang_up(self) -> None:
        """End the connection of one of the requests."""
        self._waiting[0].shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._closing = True
        socket.create_connection(self._listener.getsockname()).close()
        for thread in self._threads:
            thread.join(100)
        self._listener.close()


@pytest.fixture
def mute() -> Iterator[Mute]:
    server = Mute()
    yield server
    server.close()


def test_a_cancelled_task_closes_the_connections_of_its_requests(mute: Mute) -> None:
    async def call() -> None:
        async with AsyncEmbeddingsClient(mute.url, task="retrieval", max_concurrency=3) as client:
            task = asyncio.create_task(client.encode_text(["a", "b", "c", "d"], batch_size=1))
            for _ in range(3):
                assert await asyncio.to_thread(mute.asked.acquire, timeout=100)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            for _ in range(3):
                assert await asyncio.to_thread(mute.ended.acquire, timeout=100)
            assert not mute.asked.acquire(blocking=False)  # the fourth was never sent

    asyncio.run(call())


def test_a_time_limit_of_the_callers_closes_them_too(mute: Mute) -> None:
    async def reach(limit: asyncio.Timeout) -> None:
        assert await asyncio.to_thread(mute.asked.acquire, timeout=100)
        limit.reschedule(0)

    async def call() -> None:
        async with AsyncEmbeddingsClient(mute.url, task="retrieval") as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(None) as limit:
                    reaching = asyncio.create_task(reach(limit))
                    await client.encode_text("a")
            await reaching
            assert await asyncio.to_thread(mute.ended.acquire, timeout=100)

    asyncio.run(call())


def test_the_total_time_limit_closes_them_too(mute: Mute) -> None:
    async def call() -> None:
        async with AsyncEmbeddingsClient(mute.url, task="retrieval", total_timeout_s=3) as client:
            with pytest.raises(ServerTimeoutError, match="did not end within"):
                await client.encode_text("a")
            assert await asyncio.to_thread(mute.ended.acquire, timeout=100)

    asyncio.run(call())


def test_an_error_closes_the_connections_of_the_other_requests(mute: Mute) -> None:
    async def call() -> None:
        async with AsyncEmbeddingsClient(mute.url, task="retrieval", max_retries=0) as client:
            task = asyncio.create_task(client.encode_text(["a", "b", "c"], batch_size=1))
            for _ in range(3):
                assert await asyncio.to_thread(mute.asked.acquire, timeout=100)
            mute.hang_up()
            with pytest.raises(ServerConnectionError):
                await task
            for _ in range(3):
                assert await asyncio.to_thread(mute.ended.acquire, timeout=100)

    asyncio.run(call())


def test_when_an_error_comes_the_other_requests_have_ended(server: Any) -> None:
    server.play_ours()

    def refuse_one(seen: Any) -> Any:
        if "bad" in str(seen.body):
            return server.json_answer({"error": {"message": "a bad text"}}, 400)
        server.closing.wait(100)
        return server.json_answer({}, 500)

    server.routes["/v1/embeddings"] = refuse_one

    async def call() -> None:
        async with AsyncEmbeddingsClient(server.url, task="retrieval", max_retries=0) as client:
            with pytest.raises(ServerRefusedError):
                await client.encode_text(["a", "b", "bad"], batch_size=1)
            assert len(asyncio.all_tasks()) == 1

    asyncio.run(call())


SCRIPT = """
import sys
from jina_v4_client import EmbeddingsClient
client = EmbeddingsClient(sys.argv[1], task="retrieval", max_concurrency=3)
try:
    client.encode_text(["a", "b", "c", "d"], batch_size=1)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_ends_a_call_and_the_program_at_once(mute: Mute) -> None:
    """Its requests would be waited for ten minutes."""
    command = [sys.executable, "-c", SCRIPT, mute.url]
    environment = {**os.environ, "no_proxy": "127.0.0.1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        try:
            for _ in range(3):
                assert mute.asked.acquire(timeout=100)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=100)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (0, b"interrupted\n", b"")
    for _ in range(3):
        assert mute.ended.acquire(timeout=100)
