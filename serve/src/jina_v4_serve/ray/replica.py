"""A replica: one server of one task. It forwards requests to the server, and ends with it.

Ray Serve watches and replaces replicas, so the server is not restarted here. When it ends, the replica ends at once,
and Ray's routers send it nothing more. A replica that failed its requests quickly would attract more of them.
"""

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from http import HTTPStatus

import aiohttp
from multidict import CIMultiDict

from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.api.forms.errors import error_body
from jina_v4_serve.errors import ServeError
from jina_v4_serve.gateway.forward import end_to_end, forward
from jina_v4_serve.gateway.servers import Page, Servers
from jina_v4_serve.launch.screen import say
from jina_v4_serve.ray.child import Child, arguments, environment
from jina_v4_serve.ray.settings import ServerSettings, Task

_PIECE_BYTES = 2**20  # of a reply; each piece costs a message
_FAILED = 1  # exit code
_UNREADY_S = 60.0  # after this time without being ready, the replica is unhealthy and Ray Serve kills it
_ADDED = ("X-Request-ID", "Date", "Server")  # Ray's proxy adds these to every reply


@dataclass(frozen=True)
class Head:
    """Status and headers of a reply; sent before its bytes."""

    status: int
    headers: list[tuple[str, str]]


class Replica:
    """The class that Ray Serve deploys for each task."""

    def __init__(self, settings: ServerSettings, task: Task) -> None:
        """Start the server, and wait until it is ready.

        Raises:
            ServeError: the server cannot be started.
        """
        self._task = task
        self._timeout_s = settings.timeout_s
        self._is_stopping = False
        self._child = Child(task, arguments(settings, task), environment(settings, task))
        self._servers: Servers | None = None
        try:
            self._child.wait_ready()
        except BaseException:
            self._child.stop()
            raise
        self._ready_at = time.monotonic()
        threading.Thread(target=self._follow, name="child-watch", daemon=True).start()

    async def check_health(self) -> None:
        """Check that the server is ready: it computes vectors, and they are right.

        Raises:
            ServeError: the server has not been ready for so long that it cannot just be busy.
        """
        page = await self.get("/ready", {})
        now = time.monotonic()
        if page is not None and page.status == HTTPStatus.OK:
            self._ready_at = now
        elif now - self._ready_at > _UNREADY_S:
            raise ServeError(f"the {self._task} server has not been ready for {_UNREADY_S:g} s")

    async def get(self, path: str, headers: dict[str, str]) -> Page | None:
        """Get a page from the server; None if it does not answer."""
        servers = self._connected()
        servers.states[self._task] = "ready"
        page = (await servers.get_all(path, headers)).get(self._task)
        return None if page is None else Page(page.status, CIMultiDict(page.headers), page.body)

    async def embed(
        self, headers: list[tuple[str, str]], body: bytes, request_id: str, path: str
    ) -> AsyncIterator[Head | bytes]:
        """Answer a request: first b"" to show that it has arrived, then a head, then bytes.

        Raises:
            ServeError: the server broke off after the head, and a partial reply must not look complete.
        """
        yield b""
        has_head = False
        try:
            async with forward(self._connected(), self._task, path, CIMultiDict(headers), body) as answer:
                has_head = True
                yield Head(answer.status, list(end_to_end(answer.headers, *_ADDED).items()))
                async for piece in _pieces(answer.content):
                    yield piece
        except ApiError as error:
            if has_head:
                raise ServeError(f"the {self._task} server broke off in the middle of its answer") from None
            yield Head(error.status, [*error.headers().items(), ("Content-Type", "application/json")])
            yield error_body(error, request_id, path)

    def __del__(self) -> None:
        """Stop the server. Ray Serve calls this when the requests in flight are answered."""
        self._is_stopping = True
        with contextlib.suppress(AttributeError):  # the server was never started
            self._child.stop()

    def _connected(self) -> Servers:
        # Not in the constructor, as that runs outside of the event loop.
        if self._servers is None:
            self._servers = Servers({self._task: self._child.url}, self._timeout_s)
        return self._servers

    def _follow(self) -> None:
        self._child.wait()
        if not self._is_stopping:
            say(f"error: the {self._task} server ended; its replica ends too, and Ray Serve starts another")
            os._exit(_FAILED)


async def _pieces(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    while True:
        try:
            yield await content.readexactly(_PIECE_BYTES)
        except asyncio.IncompleteReadError as end:
            if end.partial:
                yield end.partial
            return
