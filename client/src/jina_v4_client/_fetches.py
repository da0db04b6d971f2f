"""The images behind URLs: several fetched at a time, in threads, and handed over one by one as they come."""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError

from jina_v4_client.errors import ImageError

Fetch = Callable[[str, float], bytes]
Outcome = bytes | ImageError


class Fetches:
    """The fetches of one call; :meth:`cancel` ends them from any thread.

    The calling thread only waits and takes, as in ``run_in_threads`` and for the same reason: Ctrl-C and the time limit
    end the call at once. No fetch begins before the calling thread has taken what an earlier one brought, so no more
    than `max_concurrency` files wait in memory, however slow one of them is.
    """

    def __init__(self) -> None:
        self._outcomes: queue.SimpleQueue[tuple[int, Outcome | BaseException]] = queue.SimpleQueue()

    def cancel(self) -> None:
        """End :meth:`run`; what is on its way ends by itself, unheard."""
        self._outcomes.put((-1, CancelledError()))

    def run(
        self,
        urls: Mapping[int, str],
        fetch: Fetch,
        take: Callable[[int, Outcome], bool],
        *,
        max_concurrency: int,
        deadline: float,
    ) -> None:
        """Fetch what is behind URLs.

        Args:
            urls: by place, in the order of the places.
            fetch: gets a URL and the seconds left.
            take: gets every file, or why there is none, with its place, as they come. False makes this the last place
                that is of interest: those before it are still seen through, nothing behind it is given any more.
            max_concurrency: how many are on their way at a time.
            deadline: when what is left is given up, by ``time.monotonic()``.

        Raises:
            CancelledError: so told by :meth:`cancel`.
        """
        waiting = deque(urls.items())
        in_flight: set[int] = set()
        while waiting or in_flight:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                error = ImageError("not fetched, because the time limit of the call was reached")
                for place in sorted(in_flight | dict(waiting).keys()):
                    if not take(place, error):
                        break
                return
            while waiting and len(in_flight) < max_concurrency:
                place, url = waiting.popleft()
                in_flight.add(place)
                work = (fetch, place, url, left_s)
                threading.Thread(target=self._work, args=work, name="jina-v4-fetch", daemon=True).start()
            try:
                place, outcome = self._outcomes.get(timeout=min(left_s, threading.TIMEOUT_MAX))
            except queue.Empty:
                continue
            if not isinstance(outcome, Outcome):
                raise outcome
            if place not in in_flight:
                continue
            in_flight.remove(place)
            if not take(place, outcome):
                waiting.clear()  # they begin in their order, so all of these stand behind it
                in_flight = {other for other in in_flight if other < place}

    def _work(self, fetch: Fetch, place: int, url: str, left_s: float) -> None:
        try:
            outcome: Outcome | BaseException = fetch(url, left_s)
        except BaseException as error:  # whatever it is, it is for the calling thread
            outcome = error
        self._outcomes.put((place, outcome))
