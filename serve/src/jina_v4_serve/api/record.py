"""The record of one request while it is served: for the metrics, for its line in the log, for its trace.

It is in the context (`current`), so that any module that works on the request can add facts. Where there is no request,
as for the canary and the readiness probe, the facts are lost.
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

# Several can run at once: a moment counts for the first of these. The engine's time is when nothing but it is at work.
KINDS: tuple[Kind, ...] = ("text", "image")
STAGES: tuple[Stage, ...] = ("fetch", "preprocessing", "engine", "serialising", "body")
# Bounds of histograms: from a short text on a GPU to 32,768 tokens on a CPU.
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
NO_TASK = "none"
CLOSED_REQUEST = 499  # as proxies write it: the client has left


@dataclass
class Record:
    """One request.

    Attributes:
        request_id: as in the answer's header.
        task: that it is for; "none" until that is known.
        status: of its answer; 500 until there is one.
        key: the name of its API key; None where no key is needed.
        code: of its refusal or failure.
        param: the field at fault, as a path.
        n_items: by kind, once the request was read.
        n_tokens: by kind, once there are vectors.
        request_bytes: of its body, as far as it was read.
        response_bytes: of the answer's body.
        clipped: images of more than 8 bits a pixel, as paths.
        trace_headers: the W3C trace context that came with it.
        stages_s: where its time went; together nearly all of `duration_s`.
        duration_s: from its head to the answer's.
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
        """What became of it."""
        if self.status == CLOSED_REQUEST:
            return "cancelled"
        return "ok" if self.status < 400 else "refused" if self.status < 500 else "failed"

    def answered(self, status: int) -> None:
        """Take the time: the answer begins to be sent."""
        self.status = status
        self.duration_s = time.perf_counter() - self._begin

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Count the time of a block for a stage."""
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
        """Return what the log says of it: nothing that the caller wrote but the request id."""
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
    """Return the record of the request that is being served; where there is none, one that nobody reads."""
    return _current.get() or Record("")


@contextmanager
def recording(record: Record) -> Iterator[None]:
    """Make a record the context's for the length of a block."""
    token = _current.set(record)
    try:
        yield
    finally:
        _current.reset(token)
