"""The bodies of requests, each in memory from its first byte to its answer: there is a limit for all together."""

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from contextlib import contextmanager

from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.gateway.forward import RETRY_AFTER_S

Count = Callable[[AsyncIterable[bytes]], AsyncIterator[bytes]]


class Bodies:
    """Counts the bytes that are held.

    Attributes:
        limit_bytes: of all requests together; a single one may always be as large as a body may be.
        held_bytes: now.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0

    @contextmanager
    def of_request(self) -> Iterator[Count]:
        """Hold the body of a request for the length of a block: yield what counts its parts as they arrive.

        Counting raises an ApiError, 429, where there is no room beside the other requests.
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
