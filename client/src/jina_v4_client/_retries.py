"""Which failures pass if one waits, and how long to wait: no clock, no sockets."""

import email.utils
import math
import random
from collections.abc import Mapping

from jina_v4_client.errors import ServerConnectionError, ServerError

LONGEST_WAIT_S = 120.0  # that a Retry-After is followed, where the call has no time limit of its own
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 8.0
_PASSING_STATUSES = (408, 409, 429)


def may_pass(error: ServerError) -> bool:
    """Tell whether the same request may succeed a little later."""
    status = error.status_code
    if status is None:
        return isinstance(error, ServerConnectionError)
    return status in _PASSING_STATUSES or status >= 500


def choose_pause_s(error: ServerError, n_failures: int) -> float:
    """Choose how long to wait before the request is repeated.

    The server's own wish is never undercut; without one the pause doubles from failure to failure. Chance spreads
    clients that failed together.
    """
    if error.retry_after_s is not None:
        return error.retry_after_s * random.uniform(1, 1.1)  # noqa: S311 - no secret
    longest: float = min(_FIRST_PAUSE_S * 2 ** min(n_failures - 1, 10), _LONGEST_PAUSE_S)
    return longest * random.uniform(0.5, 1)  # noqa: S311 - no secret


def read_retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """Read how long a server asks to be left alone.

    Args:
        headers: of the reply.
        now: the time, in seconds since 1970, for a header that names a date.
    """
    for name, per_second in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            seconds = float(headers.get(name, "")) / per_second
        except ValueError:
            continue
        if math.isfinite(seconds) and seconds >= 0:
            return seconds
    try:
        until = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        return max(0.0, until.timestamp() - now)
    except (ValueError, TypeError, OverflowError, OSError):
        return None
