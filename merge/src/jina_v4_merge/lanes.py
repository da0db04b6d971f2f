"""Work that goes on beside the main thread, in order: writing and hashing one checkpoint's files, say.

torch, hashlib and file writes let go of Python's lock while they work, so that a few threads keep all cores busy.
"""

from collections.abc import Callable
from queue import Queue
from threading import Thread
from types import TracebackType

# A piece of work holds a block of rows of about a megabyte: enough to ride out a slow write, little in memory.
_WAITING_AT_MOST = 16


class Lane:
    """A thread that does what it is given, one thing after the other; who gives it too much waits.

    What its work raises is raised by the next call. When the block of its `with` ends, all is done; when that block
    raises, what has not begun is left undone.
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
