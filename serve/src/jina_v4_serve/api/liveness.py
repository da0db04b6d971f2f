"""Finds out whether the engine hangs, so that the supervisor restarts the server.

**The rule.** The engine is hung when it has not finished a scheduling step while requests of this process waited for it
for `bound_s`. Then `/health` is 503 in every API process, and the supervisor kills and restarts the server.

Steps are watched, not requests, because a step has at most 2,048 tokens on a CPU and 8,192 on a GPU. The longest prompt
takes sixteen steps or more, and a batch of pictures hundreds: the request may take an hour while the engine is fine. It
may also wait behind requests of other API processes, which this one does not see; their steps count too.

**The bound** is FACTOR times the time of a full step. A short text that is embedded before the server listens measures
the time of a token, which is longer than in a full step. FACTOR allows for what this text does not show: pictures (the
vision tower doubles the work), attention over the longest prompt (2.3 times the work of a short one), and other
programs on the same cores. The bound is at least FLOOR_S, as a restart costs a minute and kernels may be compiled at
the first step of their size, and at most CEILING_S. Two slow cores with 75 ms per token: 26 minutes.
JINA_V4_HUNG_AFTER_S replaces the bound.

**What does not count.** Time in which no request waits for the engine: an idle server is alive, and so is one whose
canary failed. Time in which this process did not run, as the machine was suspended or overloaded. A cancelled request
does not reset the time: a working engine would have finished a step meanwhile.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from jina_v4_serve.api import metrics
from jina_v4_serve.api.vectors import Vectors
from jina_v4_serve.heartbeat import Heartbeat

logger = logging.getLogger("jina_v4_serve")

FACTOR = 10
FLOOR_S = 120.0
CEILING_S = 3600.0
PROBE = "a short text " * 40  # about 120 tokens
PROBE_TIMEOUT_S = 300.0
_TICK_S = 1.0


def bound_s(seconds_per_token: float, step_tokens: int) -> float:
    """Return how long an engine with work may go without finishing a step of at most `step_tokens`."""
    return min(max(FACTOR * seconds_per_token * step_tokens, FLOOR_S), CEILING_S)


class Liveness:
    """Watches the engine for one API process.

    Attributes:
        bound_s: see "The bound" above.
    """

    def __init__(self, heartbeat: Heartbeat | None, n_waiting: Callable[[], int]) -> None:
        """Watch nothing yet; see `start`.

        Args:
            heartbeat: of the engine.
            n_waiting: returns how many prompts of this process the engine has not finished.
        """
        self.bound_s = CEILING_S
        self._heartbeat = heartbeat
        self._n_waiting = n_waiting
        self._beat = 0
        self._silent_s = 0.0
        self._seen_at = time.monotonic()
        self._task: asyncio.Task[None] | None = None

    @property
    def failure(self) -> str | None:
        """What is wrong, as callers may read it; None while the engine works."""
        if self._heartbeat is None or not self._heartbeat.hung:
            return None
        return f"the engine has work, and has finished no step of it for {self.bound_s:g} s"

    @property
    def age_s(self) -> float:
        """How long ago the engine finished a step, for any API process."""
        return float("inf") if self._heartbeat is None else time.monotonic() - self._heartbeat.last / 1e9

    async def start(
        self, embed: Callable[[str], Awaitable[Sequence[Vectors]]], step_tokens: int, set_s: float | None
    ) -> None:
        """Measure the bound, then watch in the event loop that is running.

        Args:
            embed: returns the vectors of a text.
            step_tokens: the most tokens that a scheduling step computes.
            set_s: the operator's bound; None for the measured one.
        """
        begin = time.monotonic()
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                n_tokens = sum(vectors.n_tokens for vectors in await embed(PROBE))
            self.bound_s = bound_s((time.monotonic() - begin) / n_tokens, step_tokens)
        except Exception:  # of whatever kind: the speed stays unknown
            logger.warning("the text that measures the engine's speed could not be embedded", exc_info=True)
        self.bound_s = set_s or self.bound_s
        if self._heartbeat is None or not self._heartbeat.last:
            logger.warning("the engine has no heartbeat: it is not restarted when it hangs")
            return
        logger.info("an engine that finishes no step of its work for %.0f s is hung", self.bound_s)
        metrics.HUNG_AFTER.set(self.bound_s)
        self._task = asyncio.create_task(self._watch(self._heartbeat))

    async def _watch(self, heartbeat: Heartbeat) -> None:
        while True:
            self.look(heartbeat, time.monotonic())
            await asyncio.sleep(_TICK_S)

    def look(self, heartbeat: Heartbeat, now: float) -> None:
        """Check whether the engine has finished a step; `now` is a monotonic time in seconds."""
        # If a tick is late, this process did not run. The engine may not have run either.
        passed_s, self._seen_at = min(now - self._seen_at, 2 * _TICK_S), now
        if (beat := heartbeat.last) != self._beat:
            self._beat, self._silent_s = beat, 0.0
            metrics.LAST_STEP.set_to_current_time()
        elif self._n_waiting():
            self._silent_s += passed_s
            if self._silent_s > self.bound_s and not heartbeat.hung:
                heartbeat.condemn(beat)
                logger.error("%s: /health is 503 from now on", self.failure)
