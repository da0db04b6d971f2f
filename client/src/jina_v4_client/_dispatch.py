"""When each request of a call is sent, repeated and given up: a state machine without sockets and without a clock.

The clients turn it: they send what :meth:`Dispatcher.start` gives, wait no longer than :meth:`Dispatcher.wait_s` says,
and hand back what came. What is asked, and what the replies mean, is the agenda's.
"""

import heapq
import itertools
import math
from dataclasses import dataclass, field
from typing import Protocol

from jina_v4_client._batches import Batch
from jina_v4_client._retries import LONGEST_WAIT_S, choose_pause_s, may_pass
from jina_v4_client._wire import Reply, Request, WireFormat
from jina_v4_client.errors import ServerError, ServerTimeoutError

# The HTTP library's own time limit comes first: it can tell what it waited for.
_GRACE_S = 0.5


@dataclass(frozen=True)
class Limits:
    """How long, how often and how many at a time.

    Attributes:
        timeout_s: of one request.
        total_timeout_s: of the whole call; None for none.
        max_retries: of one request.
        max_concurrency: requests that are in flight or wait to be repeated.
    """

    timeout_s: float
    total_timeout_s: float | None
    max_retries: int
    max_concurrency: int


@dataclass(eq=False)
class Job:
    """A request to be answered.

    Attributes:
        batch: whose vectors it asks for; None for a question about the server.
        wire_format: that it asks for.
    """

    request: Request
    batch: Batch | None = None
    wire_format: WireFormat = "safetensors"


class Agenda(Protocol):
    """What a call has to ask; any of these may raise, which ends the call."""

    @property
    def done(self) -> bool:
        """Whether nothing is left to ask or to wait for."""

    def take(self) -> Job | None:
        """Give what is to be sent next; None if a reply must come first, or nothing is left."""

    def receive(self, job: Job, reply: Reply) -> None:
        """Take in a reply."""

    def fail(self, job: Job, error: ServerError) -> None:
        """Take in that a job was refused, or not answered, for good."""

    def abandon(self, error: ServerError) -> None:
        """Take in that nothing more can be sent."""


@dataclass(eq=False)
class Attempt:
    """A job on its way.

    Attributes:
        timeout_s: the time limit for the HTTP library.
        ends_at: when it is given up whatever the HTTP library says.
    """

    job: Job
    timeout_s: float
    ends_at: float


@dataclass(order=True)
class _Pause:
    ends_at: float
    order: int
    job: Job = field(compare=False)


class Dispatcher:
    """Sees one call through.

    Args:
        agenda: what is to be asked.
        limits: how long, how often, how many at a time.
        begun_at: when the call began; this and every `now` are seconds of one clock.
    """

    def __init__(self, agenda: Agenda, limits: Limits, begun_at: float) -> None:
        self._agenda = agenda
        self._limits = limits
        self._deadline = math.inf if limits.total_timeout_s is None else begun_at + limits.total_timeout_s
        self._in_flight: dict[Attempt, None] = {}
        self._pauses: list[_Pause] = []
        self._n_failures: dict[Job, int] = {}
        self._order = itertools.count()
        self._quiet_until = begun_at

    @property
    def done(self) -> bool:
        """Whether the call is over."""
        return self._agenda.done

    def start(self, now: float) -> list[Attempt]:
        """Give what is to be sent now."""
        started: list[Attempt] = []
        while self._quiet_until <= now < self._deadline and (job := self._next(now)) is not None:
            # The total limit is enforced here; of its own accord the HTTP library ends a request soon after it.
            timeout_s = min(self._limits.timeout_s, self._deadline - now + 1)
            attempt = Attempt(job, timeout_s, now + self._limits.timeout_s + _GRACE_S)
            self._in_flight[attempt] = None
            started.append(attempt)
        return started

    def wait_s(self, now: float) -> float:
        """Tell how long to wait for a reply, until :meth:`expire` and :meth:`start` are due.

        Args:
            now: the same as that of :meth:`start` just before.

        Raises:
            RuntimeError: nothing is on its way and nothing is planned.
        """
        times = [attempt.ends_at for attempt in self._in_flight]
        times += [max(pause.ends_at, self._quiet_until) for pause in self._pauses[:1]]
        if now < self._quiet_until:
            times.append(self._quiet_until)
        if not times and now < self._deadline:
            raise RuntimeError("a call waits for nothing")
        return max(0.0, min([self._deadline, *times]) - now)

    def receive(self, attempt: Attempt, outcome: Reply | ServerError, now: float) -> None:
        """Take in what came of an attempt; what was given up before is of no concern any more."""
        if attempt not in self._in_flight or self.done:
            return
        del self._in_flight[attempt]
        if isinstance(outcome, Reply):
            self._n_failures.pop(attempt.job, None)
            self._agenda.receive(attempt.job, outcome)
        else:
            self._fail(attempt.job, outcome, now)

    def expire(self, now: float) -> list[Attempt]:
        """Give up what takes too long.

        Returns:
            What is to be cancelled.
        """
        if now >= self._deadline:
            cancelled = list(self._in_flight)
            self._in_flight.clear()
            self._pauses.clear()
            if not self._agenda.done:
                limit = f"total_timeout_s={self._limits.total_timeout_s:g}"
                self._agenda.abandon(ServerTimeoutError(f"the call did not end within {limit}"))
            return cancelled
        overdue = [attempt for attempt in self._in_flight if now >= attempt.ends_at]
        for attempt in overdue:
            path, limit = attempt.job.request.path, f"timeout_s={self._limits.timeout_s:g}"
            self.receive(attempt, ServerTimeoutError(f"the answer of {path} was not whole within {limit}"), now)
        return overdue

    def _next(self, now: float) -> Job | None:
        if self._pauses and self._pauses[0].ends_at <= now:
            return heapq.heappop(self._pauses).job
        if len(self._in_flight) + len(self._pauses) >= self._limits.max_concurrency:
            return None
        return self._agenda.take()

    def _fail(self, job: Job, error: ServerError, now: float) -> None:
        n_failures = self._n_failures[job] = self._n_failures.get(job, 0) + 1
        pause_s = choose_pause_s(error, n_failures)
        longest_s = 1.1 * LONGEST_WAIT_S if self._deadline == math.inf else self._deadline - now
        if n_failures > self._limits.max_retries or not may_pass(error) or pause_s > longest_s:
            del self._n_failures[job]
            self._agenda.fail(job, error)
            return
        if error.retry_after_s is not None:
            # A server that asks to be left alone means all of this call's requests.
            self._quiet_until = max(self._quiet_until, now + pause_s)
        heapq.heappush(self._pauses, _Pause(now + pause_s, next(self._order), job))
