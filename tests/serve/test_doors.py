"""The shared table at doors that ask for a key: our guard on uvicorn, and the gateway before it, without a model."""

import contextlib
import select
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from doors import KEY, KEYS, ORIGIN, Case, check, get
from servers import Server, free_port, gateway_server, started

TESTS = Path(__file__).parents[1]
ENVIRONMENT = {
    "JINA_V4_API_KEY": f" {KEY}\n",  # as `export KEY="$(cat file; echo)"` leaves it
    "JINA_V4_ALLOWED_ORIGINS": f"{ORIGIN.upper()}:443, http://localhost:5173",
    "JINA_V4_BODY_TIMEOUT_S": "1",
    "JINA_V4_SERVED_TASKS": "retrieval",
}


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    folder = tmp_path_factory.mktemp("doors")
    port = free_port()
    with started(
        [sys.executable, TESTS / "door_server.py", str(port)], port, folder / "server", **ENVIRONMENT
    ) as server:
        server.wait_ready()
        with gateway_server({"retrieval": server.base_url}, folder / "gateway", **ENVIRONMENT) as gateway:
            yield {"server": server, "gateway": gateway}


@pytest.mark.parametrize("door", ["server", "gateway"])
@pytest.mark.parametrize("case", KEYS.values(), ids=KEYS.keys())
def test_every_door_asks_for_the_key_alike(case: Case, door: str, doors: dict[str, Server]) -> None:
    check(case, doors[door].base_url)


def test_a_route_that_fails_answers_as_other_errors_do(doors: dict[str, Server]) -> None:
    check(Case(get("/metrics", Authorization=f"Bearer {KEY}"), 500, "INTERNAL"), doors["server"].base_url)
    assert "RuntimeError: a route that fails" in doors["server"].log.read_text()


@pytest.mark.parametrize(
    ("sent", "more"),
    [
        (b"", b""),
        (b"POST /v1/embeddings HTT", b""),
        (get("/health"), b"G"),
        (get("/nothing", "POST", Transfer_Encoding="chunked"), b"1\r\nx\r\n"),
    ],
    ids=["nothing", "half a head", "a second head by drops", "a body that was refused"],
)
def test_a_connection_that_waits_for_no_reply_is_closed(sent: bytes, more: bytes, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, TESTS / "door_server.py", str(port), "1"]
    with started(command, port, tmp_path / "log", **ENVIRONMENT) as server:
        server.wait_ready()
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(sent)
            began = time.monotonic()
            while time.monotonic() - began < 60:
                readable, _, _ = select.select([connection], [], [], 0.1)
                with contextlib.suppress(ConnectionError):
                    if readable and not connection.recv(2**16):
                        break
                    connection.sendall(more)
            assert 0.9 < time.monotonic() - began < 60
