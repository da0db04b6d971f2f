"""The shared table at doors that ask for a key: our guard on uvicorn, and the gateway before it, without a model."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from doors import KEY, KEYS, ORIGIN, Case, check, get
from servers import BIN, Server, free_port, started

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
    port, front = free_port(), free_port()
    with contextlib.ExitStack() as stack:
        command = [sys.executable, TESTS / "door_server.py", str(port)]
        server = stack.enter_context(started(command, port, folder / "server", **ENVIRONMENT))
        server.wait_ready()
        command = [BIN / "jina-v4-serve", "gateway", "--server", f"retrieval={server.base_url}", "--port", str(front)]
        gateway = stack.enter_context(started(command, front, folder / "gateway", **ENVIRONMENT))
        gateway.wait_ready()
        yield {"server": server, "gateway": gateway}


@pytest.mark.parametrize("door", ["server", "gateway"])
@pytest.mark.parametrize("case", KEYS.values(), ids=KEYS.keys())
def test_every_door_asks_for_the_key_alike(case: Case, door: str, doors: dict[str, Server]) -> None:
    check(case, doors[door].base_url)


def test_a_route_that_fails_answers_as_other_errors_do(doors: dict[str, Server]) -> None:
    check(Case(get("/metrics", Authorization=f"Bearer {KEY}"), 500, "INTERNAL"), doors["server"].base_url)
    assert "RuntimeError: a route that fails" in doors["server"].log.read_text()
