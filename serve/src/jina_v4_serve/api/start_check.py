"""Texts of ours that a start embeds to check the server: wrong vectors keep it from serving, none end it.

A server that computes wrong vectors would after a restart too, so it stays up and says so. An engine that hangs or
fails may do so in passing: the server ends, and its supervisor starts it again.
"""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from jina_v4_serve.api.vectors import NonFiniteError
from jina_v4_serve.errors import EngineError

Result = TypeVar("Result")

# For one short text. Generous, as three servers may start at the same time on a slow machine.
TIMEOUT_S = 600.0


async def computed(vectors: Awaitable[Result], purpose: str) -> Result:
    """Return what the engine computes for one text.

    Args:
        vectors: of the text.
        purpose: of the text, for messages.

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
