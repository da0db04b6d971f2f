"""Middleware that handles SIGTERM instead of vLLM, so that a server loses no request when it stops.

vLLM's own `--shutdown-timeout` finishes the work in the engine, but still accepts requests meanwhile and answers them,
and those that were being tokenised, with errors. Here the listening socket closes first. Requests on open connections
are still served, with `Connection: close`. When none is left, SIGINT stops vLLM in its own way.

With several API processes (`--api-server-count`) each does this. vLLM's first process, which has no application, sends
SIGTERM on to them and waits. Their shared socket is shut down explicitly: it would stay open until the last has ended.
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

_LINGER_S = 0.5  # for requests that were sent before their client could notice
_SIGNALLED_S = 0.1  # until each API process has about stopped accepting


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
            # vLLM has these instead of listeners if several processes share a socket.
            for accepting in getattr(server, "_accept_tasks", ()):
                if accepting.get_coro().__name__ == "_accept":
                    accepting.cancel()
            self.task = asyncio.get_running_loop().create_task(self._finish(server.config.port))

    async def _finish(self, port: int) -> None:
        deadline = asyncio.get_running_loop().time() + DRAIN_S
        await asyncio.sleep(_SIGNALLED_S)
        refuse_connections(port)
        await asyncio.sleep(_LINGER_S)
        while self.in_flight and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)


def refuse_connections(port: int) -> None:
    """Shut down this process's sockets that listen on a port, in every process that shares them."""
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(entry.name))) as same:  # most are no socket
            if same.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and same.getsockname()[1:2] == (port,):
                same.shutdown(socket.SHUT_RDWR)
