"""Back-pressure: counts the tokens in flight, and refuses requests past the budget. Nothing is queued.

Live queries, of priority 0, count themselves alone; any other priority counts all that is in flight, so bulk work is
refused first. A request counts as half of the limit at most, so that a large one is accepted while others come and go:
it needs no more than half of the limit to be free.
"""

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.api.metrics import IN_FLIGHT_TOKENS, MAX_IN_FLIGHT_TOKENS
from jina_v4_serve.api.request import FIRST

_WINDOW_S = 30.0
_LONGEST_WAIT_S = 30


class TokenBudget:
    """Counts the tokens of accepted requests until they are answered.

    Attributes:
        limit: tokens in flight past which a priority's requests are refused; a large request may go past it.
        in_flight: tokens of all requests that are accepted and not answered yet.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_flight = 0
        self._live = 0  # those of priority 0
        MAX_IN_FLIGHT_TOKENS.set(limit)
        self._done: deque[tuple[float, int]] = deque()

    def check(self) -> None:
        """Refuse, before a body is read, when the budget is already spent for every priority.

        Raises:
            ApiError: 429 with the seconds after which to try again.
        """
        if self._ahead(FIRST) >= self.limit:
            raise self._refusal(FIRST)

    @contextmanager
    def spend(self, tokens: int, priority: int = FIRST) -> Iterator[None]:
        """Take a request's tokens for the length of a block.

        Raises:
            ApiError: 429 when there is no room beside what is in flight.
        """
        ahead = self._ahead(priority)
        if ahead and ahead + min(tokens, self.limit // 2) > self.limit:
            raise self._refusal(priority, tokens)
        live = tokens if priority == FIRST else 0
        self.in_flight += tokens
        self._live += live
        IN_FLIGHT_TOKENS.inc(tokens)
        try:
            yield
            self._done.append((time.monotonic(), tokens))
            self._forget()
        finally:
            self.in_flight -= tokens
            self._live -= live
            IN_FLIGHT_TOKENS.dec(tokens)

    def _ahead(self, priority: int) -> int:
        """Return the tokens in flight that count against a priority's next request."""
        return self._live if priority == FIRST else self.in_flight

    def _forget(self) -> None:
        """Forget what was finished before the window of time that the rate is of."""
        begin = time.monotonic() - _WINDOW_S
        while self._done and self._done[0][0] < begin:
            self._done.popleft()

    def _refusal(self, priority: int, tokens: int = 0) -> ApiError:
        ahead = self._ahead(priority)
        self._forget()
        rate = sum(tokens for _, tokens in self._done) / _WINDOW_S  # tokens/s
        wait_s = math.ceil(ahead / rate) if rate else _LONGEST_WAIT_S
        message = f"the server is at work on {ahead} tokens, its limit is {self.limit}; try again later"
        if tokens > self.limit // 2:
            message += f", or send fewer items in one request: this one has about {tokens} tokens"
        return ApiError(429, message, code="OVERLOADED", retry_after_s=min(max(wait_s, 1), _LONGEST_WAIT_S))
