"""The shared table at a real server and at a real gateway before it: one status, one code, the same headers."""

import time
from collections.abc import Iterator

import pytest
from doors import BROKEN, CASES, Case, Connection, check, get, post
from servers import Server, gateway_server
from wire import ENVIRONMENT, TASK


@pytest.fixture(scope="module")
def doors(wire_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    log = tmp_path_factory.mktemp("gateway") / "log"
    with gateway_server({TASK: wire_server.base_url}, log, **ENVIRONMENT) as gateway:
        yield {"server": wire_server, "gateway": gateway}


DOORS = pytest.mark.parametrize("door", ["server", "gateway"])


@DOORS
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_door_says_the_same(case: Case, door: str, doors: dict[str, Server]) -> None:
    check(case, doors[door].base_url)


@DOORS
def test_requests_sent_at_once_are_answered_in_their_order(door: str, doors: dict[str, Server]) -> None:
    names = [f"{i:032x}" for i in range(4)]
    with Connection(doors[door].base_url) as connection:
        sent = [post(X_Request_ID=names[0]), get("/health"), post(b"{", X_Request_ID=names[2]), post()]
        connection.send(b"".join(sent))
        replies = [connection.reply() for _ in sent]
    assert [reply.status for reply in replies] == [200, 200, 400, 200]
    assert [replies[i].get("x-request-id") for i in (0, 2)] == [names[0], names[2]]


def test_a_connection_that_was_idle_for_seconds_serves_on(doors: dict[str, Server]) -> None:
    connections = [Connection(door.base_url) for door in doors.values()]
    for connection in connections:
        connection.send(post())
        assert connection.reply().status == 200
    time.sleep(6.5)  # vLLM's own end comes after 5 s
    for connection in connections:
        with connection:
            connection.send(post())
            assert connection.reply().status == 200


def test_what_is_no_http_and_what_offers_an_upgrade_leave_no_trace_in_the_log(doors: dict[str, Server]) -> None:
    before = {name: len(door.log.read_text()) for name, door in doors.items()}
    for name, door in doors.items():
        for case in (*BROKEN.values(), CASES["Java's HttpClient"]):
            check(case, door.base_url)
        said = door.log.read_text()[before[name] :]
        print(said)
        assert "Traceback" not in said
        assert "upgrade" not in said
