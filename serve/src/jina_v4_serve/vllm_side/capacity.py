"""How many tokens a server takes in before it answers 429: as many as it computes within some seconds.

A queue is bounded by time, for that is what callers wait. How fast the engine is nobody knows before it runs, so a
step or two are computed and timed before the server listens. API processes do so at one time, and each sees its share
of the engine: the measured rate is the engine's or less, never more.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

logger = logging.getLogger("jina_v4_serve")

BUDGET_S = 10.0  # of work in flight
BUDGET_STEPS = 32  # scheduling steps' worth of tokens in flight, at most
TEXT_TOKENS = 512  # of the texts that are timed
TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Capacity:
    """What decides how much a server takes in.

    Attributes:
        step_tokens: of one engine's scheduling step.
        longest: the longest text, in tokens; two of them are taken in by the slowest server.
        n_engines: data-parallel ones, which this server's API processes feed.
        n_processes: API processes, which share what is taken in.
    """

    step_tokens: int
    longest: int
    n_engines: int = 1
    n_processes: int = 1

    @property
    def is_fixed(self) -> bool:
        """Whether the rate cannot matter: the most steps are no more than two of the longest texts."""
        return BUDGET_STEPS * self.step_tokens <= 2 * self.longest

    def budget(self, tokens_a_second: float = float("inf")) -> int:
        """Return the tokens that one API process may have in flight.

        Args:
            tokens_a_second: of all engines, as measured.
        """
        by_time = BUDGET_S * tokens_a_second / self.n_engines
        tokens = max(2 * self.longest, min(BUDGET_STEPS * self.step_tokens, by_time))
        return max(1, int(self.n_engines * tokens) // self.n_processes)

    async def measure(self, embed: Callable[[int, int], Awaitable[None]]) -> float:
        """Return how many tokens the engines compute in a second; infinite where that cannot be found out.

        Args:
            embed: embeds so many texts of so many tokens, all at once.
        """
        length = min(TEXT_TOKENS, self.longest)
        n_texts = -(-self.n_engines * self.step_tokens // length)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await embed(n_texts, length)  # kernels are compiled
                begin = time.monotonic()
                await embed(n_texts, length)
        except Exception:  # whatever it is, nothing is known of this machine's speed
            logger.warning("the texts by which the engine's rate is measured could not be embedded", exc_info=True)
            return float("inf")
        rate = n_texts * length / (time.monotonic() - begin)
        logger.info("the engine computes %.0f tokens a second or more", rate)
        return rate
