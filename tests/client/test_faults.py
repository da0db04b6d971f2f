"""A server that misbehaves: right vectors or a clear error, within the time limit, from both clients."""

import itertools
import json
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from jina_v4_client import (
    ArgumentError,
    BadReplyError,
    ServerConnectionError,
    ServerError,
    ServerFailedError,
    ServerRefusedError,
    ServerTimeoutError,
    WrongServerError,
)

pytestmark = pytest.mark.proof

TEXTS = [f"text number {n}" for n in range(30)]
Fault = Callable[[Any, Any], Any]  # gets the server and the right answer


def half(server: Any, right: Any) -> Any:
    return server.answer(right.content[: len(right.content) // 2], announced=len(right.content), **right.headers)


PASSING: dict[str, Fault] = {
    "no answer at all": lambda server, right: server.dropped(),
    "a connection that breaks in the middle": half,
    "429 with Retry-After": lambda server, right: server.json_answer({}, 429, retry_after_ms="5"),
    "503 with Retry-After": lambda server, right: server.json_answer({}, 503, retry_after="0"),
    "500": lambda server, right: server.json_answer({"error": "oh"}, 500),
    "502 of a proxy": lambda server, right: server.html_answer(502),
    "408": lambda server, right: server.json_answer({}, 408),
}


def spoil(server: Any, fault: Fault, path: str = "/v1/embeddings", *, first: int | None = None) -> None:
    """Let a route misbehave, always or the first times; a fault may give the right answer."""
    play, lock, count = server.routes[path], threading.Lock(), itertools.count()

    def spoilt(seen: Any) -> Any:
        right = play(seen)
        with lock:
            number = next(count)
        return right if first is not None and number >= first else fault(server, right)

    server.routes[path] = spoilt


def expected(server: Any, texts: list[str]) -> list[Any]:
    return [server.vector(f"Query: {text}") for text in texts]


@pytest.mark.parametrize("name", PASSING)
def test_a_fault_that_passes_leaves_no_trace(server: Any, make_client: Any, name: str) -> None:
    server.play_ours()
    spoil(server, PASSING[name], first=3)
    spoil(server, PASSING[name], "/v1/models", first=1)
    vectors = make_client(server.url, max_retries=3).encode_text(TEXTS, batch_size=4)
    np.testing.assert_array_equal(vectors, expected(server, TEXTS))
    assert server.paths().count("/v1/embeddings") == 8 + 3


@pytest.mark.parametrize("seed", range(3))
def test_faults_of_all_kinds_at_random_leave_no_trace(server: Any, make_client: Any, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - no secret
    server.play_ours()
    spoil(
        server,
        lambda server, right: right if chance.random() < 0.5 else chance.choice([*PASSING.values()])(server, right),
    )
    client = make_client(server.url, max_retries=50, max_concurrency=5)
    vectors = client.encode_text(TEXTS, batch_size=2, return_numpy=True)
    np.testing.assert_array_equal(vectors, expected(server, TEXTS))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("no answer at all", ServerConnectionError),
        ("a connection that breaks in the middle", ServerConnectionError),
        ("429 with Retry-After", ServerRefusedError),
        ("500", ServerFailedError),
        ("502 of a proxy", ServerFailedError),
    ],
)
def test_a_fault_that_stays_is_an_error(server: Any, make_client: Any, name: str, kind: type[ServerError]) -> None:
    server.play_ours()
    spoil(server, PASSING[name])
    with pytest.raises(kind):
        make_client(server.url, max_retries=2, max_concurrency=1).encode_text(TEXTS)
    assert server.paths().count("/v1/embeddings") == 3


def drop_index(document: dict[str, Any]) -> None:
    del document["data"][0]["index"]


def changed(change: Callable[[dict[str, Any]], object]) -> Fault:
    """Change what a server that speaks JSON only answers."""

    def fault(server: Any, right: Any) -> Any:
        document = json.loads(right.content)
        change(document)
        headers = {name: value for name, value in right.headers.items() if name != "content-type"}
        return server.json_answer(document, **headers)

    return fault


def set_first(value: object) -> Fault:
    return changed(lambda document: document["data"][0].update(embedding=value))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        pytest.param(lambda s, r: s.answer(r.content[:-9], **r.headers), "does not answer with JSON", id="truncated"),
        pytest.param(lambda s, r: s.answer(b"", **r.headers), "does not answer with JSON", id="empty"),
        pytest.param(lambda s, r: s.answer(b"[1]", **r.headers), "JSON that is no object", id="no object"),
        pytest.param(changed(lambda d: d.pop("data")), "lists no vectors", id="no data"),
        pytest.param(changed(lambda d: d["data"].pop()), r"items \[0\] to a request of 2", id="one too few"),
        pytest.param(changed(lambda d: d["data"].append(d["data"][0])), r"items \[0, 1, 0\]", id="one too many"),
        pytest.param(changed(lambda d: d["data"][1].update(index=0)), r"items \[0, 0\]", id="one twice"),
        pytest.param(changed(lambda d: d["data"][1].update(index=True)), r"items \[0, True\]", id="no integer"),
        pytest.param(changed(drop_index), r"items \[None, 1\]", id="no index"),
        pytest.param(set_first("AAAA="), "cannot be read", id="broken base64"),
        pytest.param(set_first("AAAAAA=="), "cannot be read|dimensions", id="half a number"),
        pytest.param(set_first([[1.0]]), "no list of numbers", id="deep"),
        pytest.param(set_first(None), "no list of numbers", id="null"),
        pytest.param(set_first({"a": 1}), "no list of numbers", id="an object"),
        pytest.param(set_first(["x"]), "cannot be read", id="a word"),
        pytest.param(set_first([1.0]), r"vectors of \[1, 256\] dimensions", id="short"),
        pytest.param(set_first([]), "dimensions", id="none"),
        pytest.param(set_first([1e300] * 256), "a vector of length inf", id="out of range"),
        pytest.param(set_first([float("nan")] * 256), "a vector of length nan", id="NaN"),
        pytest.param(set_first([0.5] * 256), "a vector of length 8 instead of 1", id="length"),
    ],
)
def test_a_wrong_json_reply_is_refused(server: Any, make_client: Any, fault: Fault, message: str) -> None:
    server.play_gateway(("retrieval",), json_only=True)
    spoil(server, fault)
    with pytest.raises(BadReplyError, match=message):
        make_client(server.url).encode_text(["a", "b"])


@pytest.mark.parametrize("multivector", [False, True], ids=["dense", "multi"])
def test_json_items_in_another_order_find_their_places(server: Any, make_client: Any, multivector: bool) -> None:
    server.play_gateway(("retrieval",), json_only=True)
    spoil(server, changed(lambda document: document["data"].reverse()))
    found = make_client(server.url).encode_text(TEXTS, return_multivector=multivector)
    make = server.token_rows if multivector else server.vector
    for vector, text in zip(found, TEXTS, strict=True):
        np.testing.assert_array_equal(vector, make(f"Query: {text}"))


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        pytest.param(lambda s, r: s.answer(r.content[:-1], **r.headers), BadReplyError, id="truncated"),
        pytest.param(lambda s, r: s.html_answer(), WrongServerError, id="a web page"),
        pytest.param(lambda s, r: s.tensors_answer({"dense": np.eye(256, dtype="f4")[:1]}), BadReplyError, id="count"),
        pytest.param(lambda s, r: s.tensors_answer({"dense": np.ones((8, 2), "f4")}), BadReplyError, id="lengths"),
        pytest.param(
            lambda s, r: s.tensors_answer({"dense": np.eye(8, dtype="f4")}, "code"), WrongServerError, id="task"
        ),
    ],
)
def test_one_wrong_reply_of_many_ends_the_call(
    server: Any, make_client: Any, fault: Fault, kind: type[ServerError]
) -> None:
    server.play_ours()
    number = itertools.count()
    spoil(server, lambda server, right: fault(server, right) if next(number) == 2 else right)
    client = make_client(server.url)
    with pytest.raises(kind):
        client.encode_text([*TEXTS, *TEXTS[:2]], batch_size=8)
    np.testing.assert_array_equal(client.encode_text(TEXTS), expected(server, TEXTS))  # the client is as good as new


SLOW: dict[str, Fault] = {
    "says nothing": lambda server, right: server.closing.wait(60) and right,
    "sends drop by drop": lambda server, right: server.slowed(right, 0.05),
    "is busy for ever": lambda server, right: server.json_answer({}, 429, retry_after_ms="30"),
    "fails for ever": lambda server, right: server.json_answer({}, 500),
    "breaks for ever": half,
}


@pytest.mark.parametrize("name", SLOW)
def test_the_total_time_limit_ends_the_call(server: Any, make_client: Any, name: str) -> None:
    """Without it each of these would take a minute at least."""
    server.play_ours()
    spoil(server, SLOW[name])
    client = make_client(server.url, total_timeout_s=0.4, max_retries=1_000_000)
    with pytest.raises(ServerError) as caught:
        client.encode_text(TEXTS * 10, batch_size=3)
    told = "did not end within total_timeout_s=0.4"
    assert told in str(caught.value) or name in ("is busy for ever", "fails for ever", "breaks for ever")
    assert not server.closing.is_set()


@pytest.mark.parametrize("name", ["says nothing", "sends drop by drop"])
def test_the_time_limit_of_a_request_ends_it(server: Any, make_client: Any, name: str) -> None:
    server.play_ours()
    spoil(server, SLOW[name], first=2)
    client = make_client(server.url, timeout_s=0.5, max_retries=0)
    with pytest.raises(ServerTimeoutError, match=r"within timeout_s=0\.5"):
        client.encode_text(TEXTS, batch_size=30)
    client = make_client(server.url, timeout_s=0.5, max_retries=20)
    np.testing.assert_array_equal(client.encode_text(TEXTS, batch_size=30), expected(server, TEXTS))


@pytest.mark.parametrize("total_timeout_s", [None, 5.0], ids=["no limit", "5 s"])
def test_a_server_that_wants_to_be_left_alone_for_longer_is_not_waited_for(
    server: Any, make_client: Any, total_timeout_s: float | None
) -> None:
    server.play_ours()
    spoil(server, lambda server, right: server.json_answer({"error": "busy"}, 429, retry_after="3600"))
    client = make_client(server.url, total_timeout_s=total_timeout_s)
    with pytest.raises(ServerRefusedError, match="refused with status 429: busy") as caught:
        client.encode_text("a")
    assert caught.value.retry_after_s == 3600
    assert server.paths().count("/v1/embeddings") == 1


def test_several_requests_are_in_flight_and_no_more_than_allowed(server: Any, make_client: Any) -> None:
    server.play_ours()
    together, lock, counts = threading.Barrier(3), threading.Lock(), {"now": 0, "most": 0}

    def meet(server: Any, right: Any) -> Any:
        with lock:
            counts["now"] += 1
            counts["most"] = max(counts["most"], counts["now"])
        together.wait(30)  # for ever, unless three come at a time
        with lock:
            counts["now"] -= 1
        return right

    spoil(server, meet)
    texts = [f"text {n}" for n in range(9)]
    vectors = make_client(server.url, max_concurrency=3).encode_text(texts, batch_size=1)
    np.testing.assert_array_equal(vectors, expected(server, texts))
    assert counts["most"] == 3


def test_a_closed_client_says_so(server: Any, make_client: Any) -> None:
    server.play_ours()
    client = make_client(server.url)
    client.close()
    with pytest.raises(ArgumentError, match="this client is closed"):
        client.encode_text("a")
    assert server.seen == []
