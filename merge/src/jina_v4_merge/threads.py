"""Threads: one for torch while it works on small blocks, one a core for work that can be done side by side."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


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
    """Give a thread for each core; what has not begun is dropped when the block is left early."""
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
