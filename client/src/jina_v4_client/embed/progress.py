"""How far a run is: a bar on a terminal, elsewhere a line now and then; always on stderr."""

import sys
import time
from typing import Self

from tqdm import tqdm  # type: ignore[import-untyped] # its types are a package of their own

_LINE_EVERY_S = 30.0


class Progress:
    """Tells the rows that are done, their rate and the time left.

    Args:
        total: how many rows there are, about; None if nobody knows.
        done: how many were done before.
    """

    def __init__(self, total: int | None, done: int, *, quiet: bool) -> None:
        self._total, self._before, self._done, self._quiet = total, done, done, quiet
        self._start = self._last_line = time.monotonic()
        self._bar = None
        if not quiet and sys.stderr.isatty():
            self._bar = tqdm(desc="embedding", total=total, initial=done, unit=" rows", dynamic_ncols=True)

    def add(self, n_rows: int) -> None:
        """Count rows that were done."""
        self._done += n_rows
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(n_rows)
        elif not self._quiet and now - self._last_line >= _LINE_EVERY_S:
            self._last_line = now
            sys.stderr.write(f"embedding: {self.line()}\n")

    def line(self) -> str:
        """Say how far it is."""
        elapsed_s = max(time.monotonic() - self._start, 1e-9)
        rate = (self._done - self._before) / elapsed_s
        line = f"{self._done:,} rows" if self._total is None else f"{self._done:,} of {self._total:,} rows"
        line += f", {rate:,.1f} rows/s"
        if self._total is not None and rate and self._total > self._done:
            line += f", {tqdm.format_interval((self._total - self._done) / rate)} left"
        return line

    def summary(self) -> str:
        """Say what this run did."""
        n_rows, elapsed_s = self._done - self._before, max(time.monotonic() - self._start, 1e-9)
        return f"{n_rows:,} rows in {elapsed_s:,.1f} s, {n_rows / elapsed_s:,.1f} rows/s"

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        """Give this progress."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bar as it is."""
        self.close()
