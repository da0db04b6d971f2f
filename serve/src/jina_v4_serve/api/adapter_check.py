"""Checks that adapters beside a base are applied: each must return another vector than the base and the others.

Elsewhere adapters were left out silently, and answers with status 200 held the base's vectors. A canary finds that too,
and more; this check needs none.
"""

import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from jina_v4_serve.api.start_check import computed
from jina_v4_serve.api.vectors import Floats, NonFiniteError

logger = logging.getLogger("jina_v4_serve")

TEXT = "The lighthouse keeper counted 17 ships before the fog came in, and wrote down the names of nine."
# 1 - cosine. The same vector computed twice differs by 1e-7; vectors of two adapters of random weights by 0.5.
LEAST = 1e-4


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
        logger.error("not serving: %s", failure)
        return failure
    distances = {
        f"{one} and {other}": 1 - float(np.sum(rows[one] * rows[other], dtype=np.float64))
        for one, other in itertools.combinations(rows, 2)
    }
    if same := [pair for pair, distance in distances.items() if not distance >= LEAST]:
        failure = f"the same vector comes of {', and of '.join(same)}: an adapter is not applied"
        logger.error("not serving: %s", failure)
        return failure
    logger.info("every adapter does something: 1 - cosine is %.1e or more", min(distances.values()))
    return None
