"""Limits the memory of all request bodies together. Each is held from its first byte to its reply."""

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from contextlib import contextmanager

from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.gateway.forward import RETRY_AFTER_S

Count = Callable[[AsyncIterable[bytes]], AsyncIterator[bytes]]


class Bodies:
    """Counts the bytes of bodies in memory.

    Attributes:
        limit_bytes: of all bodies together; a single request is never refused.
        held_bytes: the bytes in memory now.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0

    @contextmanager
    def of_request(self) -> Iterator[Count]:
        """Account for the body of a request during a block; yield a function that counts its parts as they arrive.

        The function raises ApiError 429 if there is no room besides the other requests.
        """
        own_bytes = 0

        async def counted(parts: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
            nonlocal own_bytes
            async for part in parts:
                own_bytes += len(part)
                self.held_bytes += len(part)
                if own_bytes < self.held_bytes > self.limit_bytes:
                    message = f"the requests in flight have over {self.limit_bytes} bytes; try again later"
                    raise ApiError(429, message, code="OVERLOADED", retry_after_s=RETRY_AFTER_S)
                yield part

        try:
            yield counted
        finally:
            self.held_bytes -= own_bytes
