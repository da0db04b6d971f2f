"""How a server that is told to stop loses no request: the middleware that takes SIGTERM over from vLLM.

vLLM's own `--shutdown-timeout` finishes what is in the engine, but goes on accepting requests meanwhile and answers
them, and those that were still being tokenised, with errors. Here the listening socket closes first; what comes in on
connections that are open is served and told to close; when nothing is left, vLLM is stopped in its own way, by SIGINT.

With several API processes (`--api-server-count`) each does so by itself: vLLM's first process, which has no
application, hands SIGTERM on to them and waits. They share a socket, which else would be open until the last has ended.
"""

import asyncio
import contextlib
import os
import signal
import socket
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jina_v4_serve.launch.arguments import DRAIN_S

# A request that a client sent before it could know: long enough to arrive, short enough for nobody to mind.
_LINGER_S = 0.5
_ALL_TOLD_S = 0.1  # until each API process has stopped accepting, give or take


class Drain:
    """ASGI middleware: counts the requests in flight, and on SIGTERM waits for them before it stops the process."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.in_flight = 0
        self.task: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "lifespan":
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._begin, scope["app"])
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
            server = application.state.server  # uvicorn's; vLLM puts it there
            for listener in server.servers:
                listener.close()
            # vLLM has these in place of listeners where several processes share one.
            for accepting in getattr(server, "_accept_tasks", ()):
                if accepting.get_coro().__name__ == "_accept":
                    accepting.cancel()
            self.task = asyncio.get_running_loop().create_task(self._finish(server.config.port))

    async def _finish(self, port: int) -> None:
        deadline = asyncio.get_running_loop().time() + DRAIN_S
        await asyncio.sleep(_ALL_TOLD_S)
        refuse_connections(port)
        await asyncio.sleep(_LINGER_S)
        while self.in_flight and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)


def refuse_connections(port: int) -> None:
    """Refuse new connections to sockets of this process that listen on a port, in every process that has them open."""
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(entry.name))) as same:  # most are no socket
            if same.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and same.getsockname()[1:2] == (port,):
                same.shutdown(socket.SHUT_RDWR)
