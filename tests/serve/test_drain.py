"""The middleware by which a server finishes what is in flight, under a real uvicorn as vLLM runs it."""

import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from servers import PATIENCE_S, free_port

pytestmark = pytest.mark.proof

PROGRAM = """
    import asyncio, sys
    import uvicorn
    from jina_v4_serve.vllm_side.drain import Drain
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    async def slow(request):
        await asyncio.sleep(float(request.query_params["s"]))
        return PlainTextResponse("answered")

    app = Starlette(routes=[Route("/slow", slow)])
    app.add_middleware(Drain)
    http = "jina_v4_serve.api.protocol:PlainHttp"
    server = uvicorn.Server(uvicorn.Config(app, port=int(sys.argv[1]), http=http, log_level="error"))
    app.state.server = server
    asyncio.run(server.serve())
"""


def connect(port: int) -> socket.socket:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=60)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def ask(connection: socket.socket, seconds: float) -> None:
    connection.sendall(f"GET /slow?s={seconds} HTTP/1.1\r\nHost: x\r\n\r\n".encode())


def read(connection: socket.socket) -> bytes:
    answer = b""
    while not answer.endswith(b"answered"):
        part = connection.recv(65536)
        assert part, answer
        answer += part
    return answer


def test_what_is_in_flight_or_comes_on_an_open_connection_is_answered_and_nothing_else(tmp_path: Path) -> None:
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(PROGRAM), str(port)])
    with connect(port) as busy, connect(port) as idle:
        ask(idle, 0)
        assert b"connection: close" not in read(idle)
        ask(busy, 4)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except ConnectionRefusedError:
            pass
        else:
            raise AssertionError("it still accepts connections")
        ask(idle, 0)  # sent before the client could know
        assert b"connection: close" in read(idle)
        assert process.poll() is None
        assert b"connection: close" in read(busy)
        assert process.wait(PATIENCE_S) in (0, -signal.SIGINT)
