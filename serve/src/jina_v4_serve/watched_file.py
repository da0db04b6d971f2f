"""Waits until a file has changed, or until a caller wants it read again."""

import asyncio
import contextlib
from pathlib import Path

_POLL_S = 1.0

Signature = tuple[int, int, int, int] | None  # None: there is no such file


def signature(path: Path) -> Signature:
    """Return values that change when a file is written, replaced, or becomes readable.

    They are the time of its content in ns, its bytes, its inode, and the time of its owner and mode in ns.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino, status.st_ctime_ns


class WatchedFile:
    """Remembers in which state a file was last read. Create it before you read the file for the first time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last_read = signature(self.path)
        self._wanted = asyncio.Event()

    def read_again(self) -> None:
        """End the wait for a change even if there is none."""
        self._wanted.set()

    async def changed(self) -> None:
        """Wait until the file should be read again.

        It is checked once a second. A change counts when two checks see the same, so that a half-written file is not
        read.
        """
        before = self._last_read
        while not self._wanted.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wanted.wait(), _POLL_S)
            now = signature(self.path)
            if now == before != self._last_read:
                break
            before = now
        self._wanted.clear()
        self._last_read = signature(self.path)
