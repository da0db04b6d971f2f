"""Checks at the start of a server. If vectors are wrong, it does not serve; if the engine returns none, it ends.

A server with wrong vectors would compute them after a restart too, so it stays up and reports the error. An engine that
hangs or fails may work the next time, so the server ends and its supervisor restarts it.

The canary checks the vectors. The check here is for adapters next to a base (`--one-base`): each adapter must return
another vector than the base and the other adapters, as vLLM may silently leave an adapter out. A canary finds that too,
but not every checkpoint has one.
"""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import numpy as np

from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.api.vectors import Floats, NonFiniteError
from jina_v4_serve.errors import EngineError

logger = logging.getLogger("jina_v4_serve")

Result = TypeVar("Result")

# For one short text; long, as three servers may start at the same time on a slow machine.
TIMEOUT_S = 600.0
TEXT = "The lighthouse keeper counted 17 ships before the fog came in, and wrote down the names of nine."
# The least 1 - cosine. A vector that is computed twice differs by 1e-7; two adapters with random weights by 0.5.
LEAST = 1e-4


async def computed(vectors: Awaitable[Result], purpose: str) -> Result:
    """Await the engine's result for one text; the purpose is for messages.

    Raises:
        NonFiniteError: the vectors have NaN or infinity.
        ApiError: 4xx, as a caller would get it: this server does not embed such an item.
        EngineError: the engine fails or hangs.
    """
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await vectors
    except Exception as error:  # of whatever kind: no vector was computed
        cause = error
        while isinstance(cause, ExceptionGroup):  # of the one prompt
            cause = cause.exceptions[0]
        if isinstance(cause, NonFiniteError):
            raise NonFiniteError(purpose) from error
        if isinstance(cause, ApiError) and cause.status < 500:
            raise cause from None
        reason = f"no answer for {TIMEOUT_S:g} s" if isinstance(error, TimeoutError) else repr(error)
        message = f"the engine computed no vectors for {purpose} ({reason}); the server ends, as a restart may help"
        raise EngineError(message) from error


async def adapters_failure(tasks: Sequence[str], embed: Callable[[str | None], Awaitable[Floats]]) -> str | None:
    """Embed one text with each adapter and without one, and check that all vectors differ.

    Args:
        tasks: the tasks of the adapters.
        embed: returns the dense vector of `TEXT`, shape (hidden,), with the adapter of a task, or without one for None.

    Returns:
        What is wrong, as callers may read it; None if all vectors differ.

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
            logger.info("every adapter has an effect: 1 - cosine is %.1e or more", min(distances.values()))
            return None
        failure = f"the vectors of {', and of '.join(same)} are the same: an adapter is not applied"
    logger.error("not serving: %s", failure)
    return failure
