"""Runs long work in a thread, and short work in the event loop, where it is faster."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

# Tokenising this much takes a few milliseconds at most (emoji are slowest); reading or writing it takes less. Using a
# thread costs 0.1 ms.
SHORT_BYTES = 4096


async def run(n_bytes: int, work: Callable[..., Result], *arguments: object) -> Result:
    """Call a function, in a thread if it works on more than `SHORT_BYTES`; return its result."""
    return work(*arguments) if n_bytes <= SHORT_BYTES else await asyncio.to_thread(work, *arguments)
