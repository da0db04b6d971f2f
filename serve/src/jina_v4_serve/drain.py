"""How a server that is told to stop loses no request: the middleware that the supervisor talks to with SIGUSR1.

vLLM's own `--shutdown-timeout` finishes what is in the engine, but goes on accepting requests meanwhile and answers
them, and those that were still being tokenised, with errors. Here the listening socket closes first; what comes in on
connections that are open is served and told to close; when nothing is left, vLLM is stopped in its own way.
"""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from jina_v4_serve.launcher import DRAIN_S

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

DRAIN_SIGNAL = signal.SIGUSR1
# A request that a client sent before it could know: long enough to arrive, short enough for nobody to mind.
_LINGER_S = 0.5


class Drain:
    """ASGI middleware: counts the requests in flight, and on SIGUSR1 waits for them before it stops the process."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.in_flight = 0
        self.task: asyncio.Task[None] | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "lifespan":
            asyncio.get_running_loop().add_signal_handler(DRAIN_SIGNAL, self._begin, scope["app"])
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_and_close(message: Message) -> None:
            if self.task is not None and message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"connection", b"close")]
            await send(message)

        self.in_flight += 1
        try:
            await self.app(scope, receive, send_and_close)
        finally:
            self.in_flight -= 1

    def _begin(self, application: Any) -> None:
        if self.task is None:
            for listener in application.state.server.servers:  # uvicorn's; vLLM puts it there
                listener.close()
            self.task = asyncio.get_running_loop().create_task(self._finish())

    async def _finish(self) -> None:
        deadline = asyncio.get_running_loop().time() + DRAIN_S
        await asyncio.sleep(_LINGER_S)
        while self.in_flight and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
