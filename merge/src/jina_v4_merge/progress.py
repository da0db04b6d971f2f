"""The progress bar: on stderr, counting bytes, silent where stderr is no terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm  # type: ignore[import-untyped] # its types are a package of their own


@contextmanager
def progress(what: str, n_bytes: int) -> Iterator[Callable[[int], object]]:
    """Show a bar, and give what tells it of so many bytes more."""
    with tqdm(desc=what, total=n_bytes, unit="B", unit_scale=True, disable=None) as bar:
        yield bar.update
