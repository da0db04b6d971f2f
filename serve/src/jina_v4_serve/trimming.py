"""Memory that a process has freed and glibc keeps for it: given back to the system now and then.

Tensors and pictures of many sizes leave holes between the blocks in use. What fits no hole is put behind the last
block, and a process grows by the hour though it holds no more than at first. The holes' pages can be given back.
"""

import ctypes
import threading

INTERVAL_S = 60.0  # the next step waits for pages to be cleared again, some 0.1 s for 500 MB
_NAME = "memory-trim"


def give_back_regularly(interval_s: float = INTERVAL_S) -> None:
    """Start a thread that gives freed memory back until the process ends; one a process.

    Nothing is done where the C library is not glibc.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None or any(thread.name == _NAME for thread in threading.enumerate()):
        return
    never = threading.Event()

    def run() -> None:
        while not never.wait(interval_s):
            trim(ctypes.c_size_t(0))

    threading.Thread(target=run, name=_NAME, daemon=True).start()
