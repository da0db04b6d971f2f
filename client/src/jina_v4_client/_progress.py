"""Reports the progress of a call, to the caller's function or as a bar of tqdm if that is installed."""

from collections.abc import Callable
from typing import Any

from jina_v4_client.errors import ArgumentError

Progress = bool | Callable[[int, int], object]
# Runs a function where the caller waits for the call: at once in coroutines, in the caller's thread otherwise.
Post = Callable[[Callable[[], object]], object]


class Meter:
    """Reports how many of a call's items are done."""

    def __init__(self, progress: object, n_items: int, post: Post) -> None:
        self._n_items = n_items
        self._n_done = 0
        self._post = post
        self._bar: Any = None
        self._report: Callable[[int, int], object] | None = None
        if progress is True:
            try:
                from tqdm.auto import tqdm  # type: ignore[import-untyped] # its types are a package of their own
            except ImportError as error:
                raise ArgumentError(
                    "progress=True needs tqdm: pip install 'jina-v4-client[progress]', or pass a function (done, total)"
                ) from error
            self._bar = tqdm(total=n_items, unit="item")
            self._report = lambda done, _: self._bar.update(done - self._bar.n)
        elif callable(progress):
            self._report = progress
        elif progress is not False and progress is not None:
            raise ArgumentError(f"progress={progress!r} is not allowed; give True, False or a function (done, total)")

    def advance(self, n_items: int) -> None:
        """Count items that are done, with or without success."""
        self._n_done += n_items
        if (report := self._report) is not None and n_items:
            n_done = self._n_done
            self._post(lambda: report(n_done, self._n_items))

    def close(self) -> None:
        """End the bar where it is."""
        if self._bar is not None:
            self._post(self._bar.close)
