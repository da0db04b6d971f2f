"""The middleware by which a server finishes what is in flight, under a real uvicorn as vLLM runs it."""

import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from servers import PATIENCE_S, free_port, wait_until

pytestmark = pytest.mark.proof

PROGRAM = """
    import asyncio, sys
    from pathlib import Path
    import uvicorn
    from jina_v4_serve.vllm_side.drain import Drain
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    async def answer(request):
        name = request.path_params["name"]
        (folder / f"{name} has arrived").touch()
        while name == "busy" and not (folder / "go on").exists():
            await asyncio.sleep(0.01)
        return PlainTextResponse("answered")

    folder = Path(sys.argv[2])
    app = Starlette(routes=[Route("/{name}", answer)])
    app.add_middleware(Drain)
    http = "jina_v4_serve.api.protocol:PlainHttp"
    server = uvicorn.Server(uvicorn.Config(app, port=int(sys.argv[1]), http=http, log_level="error"))
    app.state.server = server
    asyncio.run(server.serve())
"""


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionError:
        return False
    return True


def ask(connection: socket.socket, name: str) -> None:
    connection.sendall(f"GET /{name} HTTP/1.1\r\nHost: x\r\n\r\n".encode())


def read(connection: socket.socket) -> bytes:
    answer = b""
    while not answer.endswith(b"answered"):
        part = connection.recv(65536)
        assert part, answer
        answer += part
    return answer


def test_what_is_in_flight_or_comes_on_an_open_connection_is_answered_and_nothing_else(tmp_path: Path) -> None:
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(PROGRAM), str(port), str(tmp_path)])
    wait_until(lambda: accepts(port))
    address = ("127.0.0.1", port)
    with socket.create_connection(address, PATIENCE_S) as busy, socket.create_connection(address, PATIENCE_S) as idle:
        ask(idle, "idle")
        assert b"connection: close" not in read(idle)
        ask(busy, "busy")
        wait_until((tmp_path / "busy has arrived").exists)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: not accepts(port))
        ask(idle, "idle")  # sent before the client could know
        assert b"connection: close" in read(idle)
        assert process.poll() is None
        (tmp_path / "go on").touch()
        assert b"connection: close" in read(busy)
        assert process.wait(PATIENCE_S) in (0, -signal.SIGINT)
