"""How many tokens a server accepts before it answers 429: as many as it computes within some seconds.

The queue is limited by time, as that is what callers notice. The speed of the engine is unknown before it runs, so a
step or two are timed before the server listens. All API processes do this at the same time and share the engine: the
measured rate may be too low, but never too high.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

logger = logging.getLogger("jina_v4_serve")

BUDGET_S = 10.0  # seconds of work in flight
BUDGET_STEPS = 32  # the most scheduling steps of work in flight
TEXT_TOKENS = 512  # the length of the texts that are timed
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Capacity:
    """The facts that decide how many tokens a server accepts.

    Attributes:
        step_tokens: the most tokens of one engine's scheduling step.
        longest: the tokens of the longest text; even the slowest server accepts two of them.
        n_engines: the data-parallel engines that this server's API processes feed.
        n_processes: the API processes, which share the budget.
    """

    step_tokens: int
    longest: int
    n_engines: int = 1
    n_processes: int = 1

    @property
    def is_fixed(self) -> bool:
        """Whether the rate does not matter: two of the longest texts are already BUDGET_STEPS steps or more."""
        return BUDGET_STEPS * self.step_tokens <= 2 * self.longest

    def budget(self, tokens_a_second: float = float("inf")) -> int:
        """Return the tokens that one API process may have in flight.

        Args:
            tokens_a_second: the measured rate of all engines.
        """
        by_time = BUDGET_S * tokens_a_second / self.n_engines
        tokens = max(2 * self.longest, min(BUDGET_STEPS * self.step_tokens, by_time))
        return max(1, int(self.n_engines * tokens) // self.n_processes)

    async def measure(self, embed: Callable[[int, int], Awaitable[None]]) -> float:
        """Return how many tokens the engines compute in a second; infinite if the measurement fails.

        Args:
            embed: embeds a number of texts, of a number of tokens each, all at once.
        """
        length = min(TEXT_TOKENS, self.longest)
        n_texts = -(-self.n_engines * self.step_tokens // length)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await embed(n_texts, length)  # this compiles the kernels
                begin = time.monotonic()
                await embed(n_texts, length)
        except Exception:  # of whatever kind: the rate stays unknown
            logger.warning("the texts that measure the engine's rate could not be embedded", exc_info=True)
            return float("inf")
        rate = n_texts * length / (time.monotonic() - begin)
        logger.info("the engine computes %.0f tokens a second or more", rate)
        return rate
