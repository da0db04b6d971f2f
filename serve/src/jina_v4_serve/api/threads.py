"""Work of a request that takes long leaves the event loop; what is short stays in it, where it takes less time."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

# Tokenising so much takes some milliseconds at most (emoji are the slowest texts), reading or writing it less. To hand
# it to a thread and back takes a tenth of one.
SHORT_BYTES = 4096


async def run(n_bytes: int, work: Callable[..., Result], *arguments: object) -> Result:
    """Return what a function returns; it runs in a thread where it works on more than `SHORT_BYTES`."""
    return work(*arguments) if n_bytes <= SHORT_BYTES else await asyncio.to_thread(work, *arguments)
