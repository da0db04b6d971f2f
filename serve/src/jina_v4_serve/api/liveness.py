"""Whether the engine still works: the one rule by which a hung server is found, and restarted.

**The rule.** The engine is hung when this process has waited for it, for `bound_s` in all, and it has not finished one
scheduling step since. Then `/health` is 503 in every API process, the supervisor kills the server and restarts it.

Why a step, and not a request: a step is at most 2,048 tokens on a CPU and 8,192 on a GPU, whatever is asked. The
longest prompt is sixteen steps or more, a batch of pictures hundreds: they may take an hour, and the beat goes on. A
request can wait behind those of other API processes, which this one does not see: their steps beat too.

**The bound** is FACTOR times what a full step takes. That is computed from a short text which is embedded before the
server listens: so few tokens take longer each than in a full step. FACTOR is for what the text does not show: pictures
(the vision tower is as much work again), attention over the longest prompt (2.3 times the work of a short one), and
other programs or servers on the same cores. At least FLOOR_S, as a restart costs a minute itself, and kernels may be
compiled at the first step of their size; at most CEILING_S. Two slow cores, 75 ms a token: 26 minutes.
JINA_V4_HUNG_AFTER_S replaces it.

**What does not count.** Time in which no request waits for the engine: an idle server is alive, and so is one that the
canary keeps from serving. Time in which this process did not run either: the machine was suspended or overloaded.
A cancelled request does not reset the account: an engine that works would have finished a step meanwhile.
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
PROBE = "a short text " * 40  # some 120 tokens
PROBE_TIMEOUT_S = 300.0
_TICK_S = 1.0


def bound_s(seconds_per_token: float, step_tokens: int) -> float:
    """Return how long an engine with work may go without finishing a step of at most `step_tokens`."""
    return min(max(FACTOR * seconds_per_token * step_tokens, FLOOR_S), CEILING_S)


class Liveness:
    """Watches the engine for one API process.

    Attributes:
        bound_s: see the rule.
    """

    def __init__(self, heartbeat: Heartbeat | None, n_waiting: Callable[[], int]) -> None:
        """Start the account at 0; `start` begins to watch.

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
        """What is wrong, for everybody to read; None while the engine works."""
        if self._heartbeat is None or not self._heartbeat.hung:
            return None
        return f"the engine has work, and has finished no step of it for {self.bound_s:g} s"

    @property
    def age_s(self) -> float:
        """How long ago the engine finished a step, whoever's it was."""
        return float("inf") if self._heartbeat is None else time.monotonic() - self._heartbeat.last / 1e9

    async def start(
        self, embed: Callable[[str], Awaitable[Sequence[Vectors]]], step_tokens: int, set_s: float | None
    ) -> None:
        """Measure the bound, then watch in the event loop that is running.

        Args:
            embed: returns the vectors of a text.
            step_tokens: the most tokens that a scheduling step computes.
            set_s: the bound that the operator has set; None for the measured one.
        """
        begin = time.monotonic()
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                n_tokens = sum(vectors.n_tokens for vectors in await embed(PROBE))
            self.bound_s = bound_s((time.monotonic() - begin) / n_tokens, step_tokens)
        except Exception:  # whatever it is, nothing is known of this machine's speed
            logger.warning("the text by which the engine's speed is measured could not be embedded", exc_info=True)
        self.bound_s = set_s or self.bound_s
        if self._heartbeat is None or not self._heartbeat.last:
            logger.warning("the engine has no heartbeat: nobody restarts it when it hangs")
            return
        logger.info("an engine that finishes no step of its work for %.0f s is hung", self.bound_s)
        metrics.HUNG_AFTER.set(self.bound_s)
        self._task = asyncio.create_task(self._watch(self._heartbeat))

    async def _watch(self, heartbeat: Heartbeat) -> None:
        while True:
            self.look(heartbeat, time.monotonic())
            await asyncio.sleep(_TICK_S)

    def look(self, heartbeat: Heartbeat, now: float) -> None:
        """Look whether the engine has finished a step; `now` is a monotonic time in seconds."""
        # A tick that comes late says that this process did not run. The engine may not have run either.
        passed_s, self._seen_at = min(now - self._seen_at, 2 * _TICK_S), now
        if (beat := heartbeat.last) != self._beat:
            self._beat, self._silent_s = beat, 0.0
            metrics.LAST_STEP.set_to_current_time()
        elif self._n_waiting():
            self._silent_s += passed_s
            if self._silent_s > self.bound_s and not heartbeat.hung:
                heartbeat.condemn(beat)
                logger.error("%s: /health is 503 from now on", self.failure)
