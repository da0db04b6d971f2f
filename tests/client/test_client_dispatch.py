"""When requests are sent, repeated and given up: the state machine, with a clock that the test turns."""

from collections import deque
from collections.abc import Mapping

import pytest
from jina_v4_client import ServerConnectionError, ServerError, ServerFailedError, ServerRefusedError, ServerTimeoutError
from jina_v4_client._dispatch import Attempt, Dispatcher, Job, Limits
from jina_v4_client._retries import choose_pause_s, may_pass, read_retry_after_s
from jina_v4_client._wire import Reply, Request

REPLY = Reply({}, b"")
BROKEN = ServerConnectionError("broken")
BUSY = ServerRefusedError("busy", status_code=429, retry_after_s=10)


class Agenda:
    """So many jobs; remembers what became of them."""

    def __init__(self, n_jobs: int) -> None:
        self.waiting = deque(Job(Request(f"/{n}")) for n in range(n_jobs))
        self.ended: list[tuple[str, object]] = []
        self.n_left = n_jobs

    @property
    def done(self) -> bool:
        return self.n_left == 0

    def take(self) -> Job | None:
        return self.waiting.popleft() if self.waiting else None

    def receive(self, job: Job, reply: Reply) -> None:
        self.end(job.request.path, reply)

    def fail(self, job: Job, error: ServerError) -> None:
        self.end(job.request.path, error)

    def abandon(self, error: ServerError) -> None:
        self.ended.append(("rest", error))
        self.n_left = 0

    def end(self, path: str, outcome: object) -> None:
        self.ended.append((path, outcome))
        self.n_left -= 1


def turned(
    n_jobs: int, total_timeout_s: float | None = None, max_retries: int = 2, max_concurrency: int = 2
) -> tuple[Agenda, Dispatcher]:
    agenda = Agenda(n_jobs)
    return agenda, Dispatcher(agenda, Limits(30, total_timeout_s, max_retries, max_concurrency), begun_at=100)


def paths(attempts: list[Attempt]) -> list[str]:
    return [attempt.job.request.path for attempt in attempts]


def test_no_more_are_taken_than_may_be_in_flight() -> None:
    agenda, dispatcher = turned(4)
    first, second = dispatcher.start(100)
    assert dispatcher.start(100) == []
    dispatcher.receive(second, REPLY, 101)
    assert paths(dispatcher.start(101)) == ["/2"]
    dispatcher.receive(first, REPLY, 102)
    assert paths(dispatcher.start(102)) == ["/3"]
    assert not dispatcher.done
    assert agenda.ended == [("/1", REPLY), ("/0", REPLY)]


def test_what_waits_to_be_repeated_keeps_its_place() -> None:
    """Else a server that fails for long would have every request of the call written and kept."""
    agenda, dispatcher = turned(4)
    for attempt in dispatcher.start(100):
        dispatcher.receive(attempt, BROKEN, 100)
    assert dispatcher.start(100) == []
    assert len(agenda.waiting) == 2
    wait_s = dispatcher.wait_s(100)
    assert 0.25 <= wait_s <= 0.5
    assert dispatcher.start(100 + wait_s * 0.9) == []
    assert len(dispatcher.start(100.5)) == 2


def test_pauses_grow_to_a_limit_and_differ_by_chance() -> None:
    for n_failures, longest_s in ((1, 0.5), (2, 1), (3, 2), (5, 8), (9, 8), (5000, 8)):
        pauses = {choose_pause_s(BROKEN, n_failures) for _ in range(50)}
        assert len(pauses) > 40
        assert longest_s / 2 <= min(pauses) <= max(pauses) <= longest_s


def test_a_request_is_repeated_so_often_and_then_given_up() -> None:
    agenda, dispatcher = turned(1, max_retries=3)
    now = 100.0
    for _ in range(4):
        (attempt,) = dispatcher.start(now)
        dispatcher.receive(attempt, BROKEN, now)
        now += 10
    assert agenda.ended == [("/0", BROKEN)]


def test_a_refusal_is_not_repeated() -> None:
    agenda, dispatcher = turned(1)
    error = ServerRefusedError("no", status_code=400)
    dispatcher.receive(dispatcher.start(100)[0], error, 100)
    assert agenda.ended == [("/0", error)]


def test_a_busy_server_is_left_alone_by_all_requests_of_the_call() -> None:
    _, dispatcher = turned(6, max_concurrency=3)
    busy, right, _ = dispatcher.start(100)
    dispatcher.receive(busy, BUSY, 100)
    dispatcher.receive(right, REPLY, 101)
    assert dispatcher.start(101) == []
    assert dispatcher.start(109.9) == []
    assert 9 <= dispatcher.wait_s(101) <= 10
    assert paths(dispatcher.start(111)) == ["/0", "/3"]


def test_a_pause_that_ends_after_the_call_is_not_begun() -> None:
    agenda, dispatcher = turned(1, total_timeout_s=9)
    dispatcher.receive(dispatcher.start(100)[0], BUSY, 100)
    assert agenda.ended == [("/0", BUSY)]


def test_a_long_time_limit_lets_a_long_pause_be_kept() -> None:
    patient = ServerFailedError("down", status_code=503, retry_after_s=600)
    agenda, dispatcher = turned(1, total_timeout_s=3600)
    dispatcher.receive(dispatcher.start(100)[0], patient, 100)
    assert dispatcher.start(699) == []
    assert paths(dispatcher.start(761)) == ["/0"]
    agenda, dispatcher = turned(1)
    dispatcher.receive(dispatcher.start(100)[0], patient, 100)
    assert agenda.ended == [("/0", patient)]


def test_a_request_that_is_never_whole_is_given_up_and_repeated() -> None:
    agenda, dispatcher = turned(1)
    (attempt,) = dispatcher.start(100)
    assert attempt.timeout_s == 30
    assert dispatcher.expire(130) == []
    assert dispatcher.wait_s(130) == 0.5
    assert dispatcher.expire(130.5) == [attempt]
    dispatcher.receive(attempt, REPLY, 130.6)  # too late
    assert agenda.ended == []
    (again,) = dispatcher.start(140)
    dispatcher.receive(again, REPLY, 141)
    assert agenda.ended == [("/0", REPLY)]


def test_at_the_end_of_the_total_time_everything_is_given_up() -> None:
    agenda, dispatcher = turned(5, total_timeout_s=20)
    attempts = dispatcher.start(100)
    assert [attempt.timeout_s for attempt in attempts] == [21, 21]
    assert dispatcher.wait_s(110) == 10
    assert dispatcher.expire(119.9) == []
    assert dispatcher.start(120) == []
    assert dispatcher.expire(120) == attempts
    ((rest, error),) = agenda.ended
    assert rest == "rest"
    assert isinstance(error, ServerTimeoutError)
    assert dispatcher.done


def test_a_call_whose_time_is_over_before_it_begins_sends_nothing() -> None:
    """Reading its images may have taken so long."""
    agenda, dispatcher = turned(1, total_timeout_s=20)
    assert dispatcher.start(130) == []
    assert dispatcher.wait_s(130) == 0
    assert dispatcher.expire(130) == []
    assert dispatcher.done
    assert len(agenda.waiting) == 1


def test_waiting_for_nothing_is_an_error_and_not_for_ever() -> None:
    _, dispatcher = turned(1)
    with pytest.raises(RuntimeError, match="waits for nothing"):
        dispatcher.wait_s(100)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "0"}, 0),
        ({"retry-after-ms": "20", "retry-after": "7"}, 0.02),
        ({"retry-after-ms": "soon", "retry-after": "7"}, 7),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 30),
        ({"retry-after": "Wed, 21 Oct 2015 07:27:00 GMT"}, 0),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
    ],
    ids=str,
)
def test_retry_after_is_read_in_every_form(headers: Mapping[str, str], seconds: float | None) -> None:
    assert read_retry_after_s(headers, now=1445412450) == seconds


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (BROKEN, True),
        (ServerTimeoutError("late"), True),
        *((ServerRefusedError("", status_code=status), status in (408, 409, 429)) for status in range(400, 430)),
        *((ServerFailedError("", status_code=status), True) for status in (500, 502, 503, 504)),
        (ServerError("another"), False),
    ],
    ids=lambda value: f"{type(value).__name__} {getattr(value, 'status_code', value)}",
)
def test_only_what_may_pass_is_repeated(error: ServerError, passes: bool) -> None:
    assert may_pass(error) is passes
