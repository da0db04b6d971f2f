"""A file that is read again when it has changed, or when somebody says so."""

import asyncio
import contextlib
from pathlib import Path

_POLL_S = 1.0

Signature = tuple[int, int, int, int] | None  # None: there is no such file


def signature(path: Path) -> Signature:
    """Return what changes when a file is written, replaced, or becomes readable.

    That is the time of its content in ns, its bytes, its inode, and the time of its owner and mode in ns.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino, status.st_ctime_ns


class WatchedFile:
    """Knows in which state a file was read last. To be made before the file is read for the first time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = signature(self.path)
        self._told = asyncio.Event()

    def read_again(self) -> None:
        """End the wait for a change, whether there is one or not."""
        self._told.set()

    async def changed(self) -> None:
        """Wait until the file is to be read again.

        It is looked at once a second, and has changed when two looks agree: half a file, which somebody still writes,
        is not read.
        """
        before = self._read
        while not self._told.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._told.wait(), _POLL_S)
            found = signature(self.path)
            if found == before != self._read:
                break
            before = found
        self._told.clear()
        self._read = signature(self.path)
