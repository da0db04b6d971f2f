"""Back-pressure: counts the tokens in flight, and refuses requests over the limit. Nothing is queued.

Requests of priority 0 (live queries) only compete with each other. Requests of other priorities (bulk work) compete
with all requests in flight, so they are refused first. A large request is accepted when half of the limit is free;
otherwise a steady stream of small ones would always keep it out.
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
        limit: the tokens in flight above which requests are refused; one large request may exceed it.
        in_flight: the tokens of all requests that are accepted and not answered yet.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_flight = 0
        self._live = 0  # the tokens of priority 0
        MAX_IN_FLIGHT_TOKENS.set(limit)
        self._done: deque[tuple[float, int]] = deque()

    def check(self) -> None:
        """Refuse a request before its body is read, if no priority has room.

        Raises:
            ApiError: 429 with the seconds after which to try again.
        """
        if self._ahead(FIRST) >= self.limit:
            raise self._refusal(FIRST)

    @contextmanager
    def spend(self, tokens: int, priority: int = FIRST) -> Iterator[None]:
        """Count a request's tokens as in flight during a block.

        Raises:
            ApiError: 429 when there is no room for them.
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
        """Return the tokens in flight with which a request of this priority competes."""
        return self._live if priority == FIRST else self.in_flight

    def _forget(self) -> None:
        """Forget requests that were finished before the time window of the rate."""
        begin = time.monotonic() - _WINDOW_S
        while self._done and self._done[0][0] < begin:
            self._done.popleft()

    def _refusal(self, priority: int, tokens: int = 0) -> ApiError:
        ahead = self._ahead(priority)
        self._forget()
        rate = sum(tokens for _, tokens in self._done) / _WINDOW_S  # tokens/s
        wait_s = math.ceil(ahead / rate) if rate else _LONGEST_WAIT_S
        message = f"the server has {ahead} tokens in flight, its limit is {self.limit}; try again later"
        if tokens > self.limit // 2:
            message += f", or send fewer items in one request: this one has about {tokens} tokens"
        return ApiError(429, message, code="OVERLOADED", retry_after_s=min(max(wait_s, 1), _LONGEST_WAIT_S))
