"""The facts of one request, for the metrics, for its line in the log, and for its trace.

The record is a context variable (`current`), so that any module can add facts. Outside of requests, as for the canary
and the readiness probe, the facts are dropped.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

Outcome = Literal["ok", "refused", "failed", "cancelled"]
Kind = Literal["text", "image"]
Stage = Literal["body", "fetch", "preprocessing", "engine", "serialising"]

KINDS: tuple[Kind, ...] = ("text", "image")
# When several stages run at once, the time counts for the first of them in this order.
STAGES: tuple[Stage, ...] = ("fetch", "preprocessing", "engine", "serialising", "body")
# Bounds of histograms: from a short text on a GPU to 32,768 tokens on a CPU.
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
NO_TASK = "none"
CLOSED_REQUEST = 499  # the status that proxies log when the client has disconnected


@dataclass
class Record:
    """One request.

    Attributes:
        request_id: as in the header of the reply.
        task: of the request; "none" until it is known.
        status: of the reply; 500 until there is one.
        key: the name of the API key; None if no key is needed.
        code: of the error.
        param: the path of the wrong field.
        n_items: by kind, when the request has been read.
        n_tokens: by kind, when the vectors are computed.
        request_bytes: the bytes of the body that were read.
        response_bytes: the bytes of the reply's body.
        clipped: the paths of images with more than 8 bits per pixel.
        trace_headers: the W3C trace context of the request.
        stages_s: the seconds by stage; together nearly all of `duration_s`.
        duration_s: from the head of the request to the head of the reply.
    """

    request_id: str
    task: str = NO_TASK
    status: int = 500
    key: str | None = None
    code: str | None = None
    param: str | None = None
    n_items: dict[Kind, int] = field(default_factory=lambda: {"text": 0, "image": 0})
    n_tokens: dict[Kind, int] = field(default_factory=lambda: {"text": 0, "image": 0})
    request_bytes: int = 0
    response_bytes: int = 0
    clipped: list[str] = field(default_factory=list)
    trace_headers: Mapping[str, str] | None = None
    stages_s: dict[Stage, float] = field(default_factory=dict)
    duration_s: float = 0.0

    def __post_init__(self) -> None:
        """Start the clock."""
        self._begin = self._since = time.perf_counter()
        self._running: dict[Stage, int] = dict.fromkeys(STAGES, 0)

    @property
    def outcome(self) -> Outcome:
        """The outcome, from the status."""
        if self.status == CLOSED_REQUEST:
            return "cancelled"
        return "ok" if self.status < 400 else "refused" if self.status < 500 else "failed"

    def answered(self, status: int) -> None:
        """Set status and duration: the reply is about to be sent."""
        self.status = status
        self.duration_s = time.perf_counter() - self._begin

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Add the time of a block to a stage."""
        self._pass()
        self._running[name] += 1
        try:
            yield
        finally:
            self._pass()
            self._running[name] -= 1

    def _pass(self) -> None:
        now = time.perf_counter()
        for name in STAGES:
            if self._running[name]:
                self.stages_s[name] = self.stages_s.get(name, 0.0) + now - self._since
                break
        self._since = now

    def line(self) -> dict[str, Any]:
        """Return the fields of the log line. The request id is the only text from the caller."""
        return {
            "request_id": self.request_id,
            "task": self.task,
            "status": self.status,
            "outcome": self.outcome,
            "key": self.key,
            "code": self.code,
            "param": self.param,
            "n_texts": self.n_items["text"],
            "n_images": self.n_items["image"],
            "n_tokens": sum(self.n_tokens.values()),
            "request_bytes": self.request_bytes,
            "response_bytes": self.response_bytes,
            "duration_s": round(self.duration_s, 6),
            "stages_s": {name: round(seconds, 6) for name, seconds in self.stages_s.items()},
        }


_current: ContextVar[Record | None] = ContextVar("jina_v4_record", default=None)


def current() -> Record:
    """Return the record of the current request; outside of requests, one that is dropped."""
    return _current.get() or Record("")


@contextmanager
def recording(record: Record) -> Iterator[None]:
    """Make a record the current one during a block."""
    token = _current.set(record)
    try:
        yield
    finally:
        _current.reset(token)
