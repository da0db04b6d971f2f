"""Texts of ours that a start embeds to check the server: wrong vectors keep it from serving, none end it.

A server that computes wrong vectors would after a restart too, so it stays up and says so. An engine that hangs or
fails may do so in passing: the server ends, and its supervisor starts it again.

The check of vectors is the canary's. The one here is of adapters beside a base: each must return another vector than
the base and the others. Elsewhere adapters were left out silently, and answers with status 200 held the base's vectors.
A canary finds that too, and more; this check needs none.
"""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import numpy as np

from jina_v4_serve.api.vectors import Floats, NonFiniteError
from jina_v4_serve.errors import EngineError

logger = logging.getLogger("jina_v4_serve")

Result = TypeVar("Result")

# For one short text. Generous, as three servers may start at the same time on a slow machine.
TIMEOUT_S = 600.0
TEXT = "The lighthouse keeper counted 17 ships before the fog came in, and wrote down the names of nine."
# 1 - cosine. The same vector computed twice differs by 1e-7; vectors of two adapters of random weights by 0.5.
LEAST = 1e-4


async def computed(vectors: Awaitable[Result], purpose: str) -> Result:
    """Return what the engine computes for one text, whose purpose is for messages.

    Raises:
        NonFiniteError: NaN or infinity: the vectors are wrong.
        EngineError: the engine fails, or hangs: nothing is known of its vectors.
    """
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await vectors
    except Exception as error:  # whatever it is, no vector was computed
        if isinstance(error, NonFiniteError) or (
            isinstance(error, ExceptionGroup) and error.subgroup(NonFiniteError) is not None
        ):
            raise NonFiniteError(purpose) from error
        reason = f"none within {TIMEOUT_S:g} s" if isinstance(error, TimeoutError) else repr(error)
        message = f"the engine computed no vectors for {purpose} ({reason}); the server ends, for a new start may work"
        raise EngineError(message) from error


async def adapters_failure(tasks: Sequence[str], embed: Callable[[str | None], Awaitable[Floats]]) -> str | None:
    """Embed one text with every task's adapter and without one, one after the other, and compare all pairs.

    Args:
        tasks: that have adapters.
        embed: returns the dense vector of `TEXT`, shape (hidden,), with the adapter of a task; with none for None.

    Returns:
        What is wrong, for any caller to read; None if all differ.

    Raises:
        EngineError: the engine computed no vectors.
    """
    try:
        rows = {
            task or "no adapter": await computed(embed(task), "the comparison of adapters") for task in (*tasks, None)
        }
    except NonFiniteError:
        failure = "a text embeds to NaN or infinity with some adapter: a damaged file, or a dtype that is too small"
    else:
        distances = {
            f"{one} and {other}": 1 - float(np.sum(rows[one] * rows[other], dtype=np.float64))
            for one, other in itertools.combinations(rows, 2)
        }
        same = [pair for pair, distance in distances.items() if not distance >= LEAST]
        if not same:
            logger.info("every adapter does something: 1 - cosine is %.1e or more", min(distances.values()))
            return None
        failure = f"the same vector comes of {', and of '.join(same)}: an adapter is not applied"
    logger.error("not serving: %s", failure)
    return failure
