"""Back-pressure: how many tokens are in the house, and whether more may come in. Past the budget nothing is queued."""

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.api.metrics import IN_FLIGHT_TOKENS, MAX_IN_FLIGHT_TOKENS

_WINDOW_S = 30.0
_LONGEST_WAIT_S = 30


class TokenBudget:
    """Counts the tokens of accepted requests until they are answered."""

    def __init__(self, limit: int) -> None:
        """Start empty.

        Args:
            limit: tokens in flight past which requests are refused; one request alone may have more.
        """
        self.limit = limit
        self.in_flight = 0
        MAX_IN_FLIGHT_TOKENS.set(limit)
        self._done: deque[tuple[float, int]] = deque()

    def check(self) -> None:
        """Refuse, before a body is read, when the budget is already spent.

        Raises:
            ApiError: 429 with the seconds after which to try again.
        """
        if self.in_flight >= self.limit:
            raise self._refusal()

    @contextmanager
    def spend(self, tokens: int) -> Iterator[None]:
        """Take tokens for the length of a block.

        Raises:
            ApiError: 429 when there is no room beside what is in flight.
        """
        if self.in_flight and self.in_flight + tokens > self.limit:
            raise self._refusal()
        self.in_flight += tokens
        IN_FLIGHT_TOKENS.inc(tokens)
        try:
            yield
            self._done.append((time.monotonic(), tokens))
        finally:
            self.in_flight -= tokens
            IN_FLIGHT_TOKENS.dec(tokens)

    def _refusal(self) -> ApiError:
        now = time.monotonic()
        while self._done and self._done[0][0] < now - _WINDOW_S:
            self._done.popleft()
        rate = sum(tokens for _, tokens in self._done) / _WINDOW_S  # tokens/s
        wait_s = math.ceil(self.in_flight / rate) if rate else _LONGEST_WAIT_S
        return ApiError(
            429,
            f"the server is at work on {self.in_flight} tokens, its limit is {self.limit}; try again later",
            code="OVERLOADED",
            retry_after_s=min(max(wait_s, 1), _LONGEST_WAIT_S),
        )
