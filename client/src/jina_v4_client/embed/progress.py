"""The progress of a run: a bar on a terminal, a line every 30 seconds elsewhere; on stderr."""

import sys
import time
from typing import Self

from tqdm import tqdm  # type: ignore[import-untyped] # its types are a package of their own

_LINE_EVERY_S = 30.0


class Progress:
    """Shows the rows that are done, their rate and the time left.

    Args:
        total: how many rows there are, about; None if that is not known.
        done: how many were done before this run.
    """

    def __init__(self, total: int | None, done: int, *, quiet: bool) -> None:
        self._total, self._before, self._done, self._quiet = total, done, done, quiet
        self._start = self._last_line = time.monotonic()
        # With None, tqdm shows no bar where there is no terminal.
        self._bar = tqdm(
            desc="embedding", total=total, initial=done, unit=" rows", dynamic_ncols=True, disable=quiet or None
        )

    def add(self, n_rows: int) -> None:
        """Count rows that were done."""
        self._done += n_rows
        self._bar.update(n_rows)
        now = time.monotonic()
        if self._bar.disable and not self._quiet and now - self._last_line >= _LINE_EVERY_S:
            self._last_line = now
            sys.stderr.write(f"embedding: {self._line()}\n")

    def summary(self) -> str:
        """Say what this run did."""
        n_rows, elapsed_s = self._done - self._before, max(time.monotonic() - self._start, 1e-9)
        return f"{n_rows:,} rows in {elapsed_s:,.1f} s, {n_rows / elapsed_s:,.1f} rows/s"

    def __enter__(self) -> Self:
        """Return this progress."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def _line(self) -> str:
        rate = (self._done - self._before) / max(time.monotonic() - self._start, 1e-9)
        if self._total is None:
            return f"{self._done:,} rows, {rate:,.1f} rows/s"
        line = f"{self._done:,} of {self._total:,} rows, {rate:,.1f} rows/s"
        if rate and self._total > self._done:
            line += f", {tqdm.format_interval((self._total - self._done) / rate)} left"
        return line
