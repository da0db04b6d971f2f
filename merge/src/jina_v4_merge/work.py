"""How long work is spread over threads and shown: torch on one thread, files in lanes, a progress bar.

torch, hashlib and file writes release Python's lock while they work, so a few threads keep all cores busy.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import Queue
from threading import Thread
from types import TracebackType

import torch
from tqdm import tqdm  # type: ignore[import-untyped] # its types are a package of their own

# A piece of work holds a block of rows of about a megabyte: enough to ride out a slow write, little in memory.
_WAITING_AT_MOST = 16


@contextmanager
def progress(what: str, n_bytes: int) -> Iterator[Callable[[int], object]]:
    """Show a bar on stderr, if that is a terminal; the function that is yielded adds a number of bytes."""
    with tqdm(desc=what, total=n_bytes, unit="B", unit_scale=True, disable=None) as bar:
        yield bar.update


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, then as before.

    A block takes about a millisecond: threads wait for one another longer than they work. Folding the real shapes on
    two busy cores took 42 s of CPU time with one thread and 248 s with two. It also makes the sums of a fold the same
    on every number of cores.
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


@contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """Yield a pool with a thread for each core; what has not begun is dropped when the block is left early."""
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


class Lane:
    """A thread that does pieces of work one after the other, such as writing and hashing one checkpoint's files.

    `do` waits while too many pieces are due. What a piece raises is raised by the next call. When the block of its
    `with` ends, all is done; when that block raises, what has not begun is left undone.
    """

    def __init__(self) -> None:
        self._waiting: Queue[Callable[[], object] | None] = Queue(_WAITING_AT_MOST)
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Lane":
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Wait until all is done, and raise what the work raised unless something else is on its way."""
        if error is not None:
            self._error = self._error or error
        self._waiting.put(None)
        self._thread.join()
        if error is None and self._error is not None:
            raise self._error

    def do(self, work: Callable[[], object]) -> None:
        """Hand over one more piece of work."""
        if self._error is not None:
            raise self._error
        self._waiting.put(work)

    def _run(self) -> None:
        while (work := self._waiting.get()) is not None:
            if self._error is not None:
                continue
            try:
                work()
            except BaseException as error:
                self._error = error
