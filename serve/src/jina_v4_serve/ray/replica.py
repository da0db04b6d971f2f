"""A replica: one server of one task. It passes bytes to the server and back, and lives exactly as long.

Ray Serve watches and replaces replicas, so the server inside is not restarted here. When it ends, the replica ends at
once, and Ray's routers send it nothing more. A replica that only failed its requests would go on to attract them.
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

_PIECE_BYTES = 2**20  # of an answer; each costs a message
_FAILED = 1  # exit code
_PATIENCE_S = 60.0  # with a server that lives and is not ready: Ray Serve kills what is not healthy
_ADDED = ("X-Request-ID", "Date", "Server")  # by Ray's proxy, to every answer


@dataclass(frozen=True)
class Head:
    """Status and headers of an answer, which come before its bytes."""

    status: int
    headers: list[tuple[str, str]]


class Replica:
    """What Ray Serve deploys for each task."""

    def __init__(self, settings: ServerSettings, task: Task) -> None:
        """Start the server, and wait for it.

        Raises:
            ServeError: it cannot be started.
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
        """Ask the server for its own check: vectors are computed, and are right.

        Raises:
            ServeError: it has not been ready for longer than one that is only busy would be.
        """
        page = await self.get("/ready", {})
        now = time.monotonic()
        if page is not None and page.status == HTTPStatus.OK:
            self._ready_at = now
        elif now - self._ready_at > _PATIENCE_S:
            raise ServeError(f"the {self._task} server has not been ready for {_PATIENCE_S:g} s")

    async def get(self, path: str, headers: dict[str, str]) -> Page | None:
        """Get a page of the server; None if it does not answer."""
        servers = self._connected()
        servers.states[self._task] = "ready"
        page = (await servers.get_all(path, headers)).get(self._task)
        return None if page is None else Page(page.status, CIMultiDict(page.headers), page.body)

    async def embed(
        self, headers: list[tuple[str, str]], body: bytes, request_id: str, path: str
    ) -> AsyncIterator[Head | bytes]:
        """Answer a request: first an empty sign that it has arrived, then a head, then bytes.

        Raises:
            ServeError: the server broke off after the head; half an answer must not look like a whole one.
        """
        yield b""
        begun = False
        try:
            async with forward(self._connected(), self._task, path, CIMultiDict(headers), body) as answer:
                begun = True
                yield Head(answer.status, list(end_to_end(answer.headers, *_ADDED).items()))
                async for piece in _pieces(answer.content):
                    yield piece
        except ApiError as error:
            if begun:
                raise ServeError(f"the {self._task} server broke off in the middle of its answer") from None
            yield Head(error.status, [*error.headers().items(), ("Content-Type", "application/json")])
            yield error_body(error, request_id, path)

    def __del__(self) -> None:
        """End the server: Ray Serve calls this when what was in flight is answered."""
        self._is_stopping = True
        with contextlib.suppress(AttributeError):  # it was never started
            self._child.stop()

    def _connected(self) -> Servers:
        # Not in the constructor, which runs outside of the event loop.
        if self._servers is None:
            self._servers = Servers({self._task: self._child.url}, self._timeout_s)
        return self._servers

    def _follow(self) -> None:
        self._child.wait()
        if not self._is_stopping:
            say(f"error: the {self._task} server ended; so does its replica, for Ray Serve to start another")
            os._exit(_FAILED)


async def _pieces(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    while True:
        try:
            yield await content.readexactly(_PIECE_BYTES)
        except asyncio.IncompleteReadError as end:
            if end.partial:
                yield end.partial
            return
