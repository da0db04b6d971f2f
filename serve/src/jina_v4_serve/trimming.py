"""Returns memory that a process has freed, and that glibc keeps, to the system every minute.

Tensors and pictures of many sizes leave holes between the blocks in use. What fits no hole is put behind the last
block, so a process grows by the hour though it holds no more than at first. The pages of the holes can be returned.
"""

import ctypes
import threading

INTERVAL_S = 60.0  # the next step waits until the system has cleared new pages: about 0.1 s for 500 MB
_NAME = "memory-trim"


def trim_regularly(interval_s: float = INTERVAL_S) -> None:
    """Start a thread that returns freed memory to the system until the process ends.

    A second call in a process, or a C library other than glibc, changes nothing.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None or any(thread.name == _NAME for thread in threading.enumerate()):
        return
    never = threading.Event()

    def run() -> None:
        while not never.wait(interval_s):
            trim(ctypes.c_size_t(0))

    threading.Thread(target=run, name=_NAME, daemon=True).start()
