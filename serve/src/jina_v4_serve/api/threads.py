"""Work of a request that takes long leaves the event loop; what is short stays in it, where it takes less time."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

# Tokenising so much takes some milliseconds at most (emoji are the slowest texts), reading or writing it less. To hand
# it to a thread and back takes a tenth of one.
SHORT_BYTES = 4096


async def run(n_bytes: int, work: Callable[..., Result], *arguments: object) -> Result:
    """Return what a function returns.

    Args:
        n_bytes: that it works on; over `SHORT_BYTES` it runs in a thread.
        work: the function.
        arguments: of the function.
    """
    return work(*arguments) if n_bytes <= SHORT_BYTES else await asyncio.to_thread(work, *arguments)
