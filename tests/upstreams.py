"""Servers as a gateway sees them, in this process and without a model."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from servers import free_port


@dataclass
class Upstream:
    """A server behind the gateway; what it was asked, and what it answers."""

    task: str
    answer: Callable[[web.Request], Awaitable[web.StreamResponse]] | None = None
    ready: int = 200
    names_task: bool = True  # in every answer, as our guard does; a stock vLLM does not, and has no /ready
    probed_as: str = ""  # the task in its answers to probes, where that is another
    pages: dict[str, str] = field(default_factory=dict)
    seen: list[tuple[str, Any, bytes]] = field(default_factory=list)
    url: str = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.path in ("/ready", "/health"):
            status = self.ready if request.path == "/ready" else 200
            return web.Response(status=status, headers={"x-jina-v4-task": self.probed_as} if self.probed_as else {})
        self.seen.append((request.path, request.headers.copy(), await request.read()))
        if request.path in self.pages:
            told = {"x-jina-v4-pooling": "engine", "x-jina-v4-revision": f"of-{self.task}"}
            return web.Response(text=self.pages[request.path], headers=told)
        if self.answer is not None:
            return await self.answer(request)
        return web.json_response({"from": self.task})

    async def name_task(self, _: web.Request, response: web.StreamResponse) -> None:
        if self.names_task:
            response.headers.setdefault("x-jina-v4-task", self.task)


@asynccontextmanager
async def listening(upstream: Upstream) -> AsyncIterator[None]:
    application = web.Application(client_max_size=2**30)
    application.router.add_route("*", "/{path:.*}", upstream.handle)
    application.on_response_prepare.append(upstream.name_task)
    runner = web.AppRunner(application, handler_cancellation=True, auto_decompress=False, shutdown_timeout=0.1)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    upstream.url = f"http://127.0.0.1:{port}"
    try:
        yield
    finally:
        await runner.cleanup()
