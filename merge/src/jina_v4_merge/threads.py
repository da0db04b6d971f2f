"""Keeping torch to one thread while it works on small blocks."""

from collections.abc import Iterator
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
