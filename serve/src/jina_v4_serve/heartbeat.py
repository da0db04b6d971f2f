"""The engine's heartbeat: a few bytes of memory that all processes of one server share.

After each scheduling step the engine's process writes the time there. Every API process reads it, and so also sees the
steps for requests of other API processes. The one that finds the engine hung notes this in the same memory, so that
`/health` is the same in all of them.

The memory is not a file on disk: nothing is left when the server is killed, and a full disk does not stop the beat.
"""

import os
import time

HUNG = "hung"  # the status in `/health` at which the supervisor kills the server
HEARTBEAT = "JINA_V4_HEARTBEAT"  # the launcher sets it, for the processes of its server
_WORD_BYTES = 8


class Heartbeat:
    """Two numbers: the time of the last beat, and the last beat of an engine that was found hung."""

    def __init__(self, path: str) -> None:
        """Open the shared memory.

        Raises:
            OSError: this machine has no such memory.
        """
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def beat(self) -> None:
        """Record that the engine has finished a step."""
        self._write(0, time.monotonic_ns())

    @property
    def last(self) -> int:
        """The monotonic time of the last beat in nanoseconds; 0 before the first."""
        return self._read(0)

    def condemn(self, beat: int) -> None:
        """Record that the engine has hung since a beat. The next beat, if it comes, cancels this."""
        self._write(1, beat)

    @property
    def hung(self) -> bool:
        """Whether an API process has found the engine hung."""
        return 0 != self._read(1) == self._read(0)

    def _read(self, i: int) -> int:
        return int.from_bytes(os.pread(self._file, _WORD_BYTES, i * _WORD_BYTES), "little")

    def _write(self, i: int, value: int) -> None:
        os.pwrite(self._file, value.to_bytes(_WORD_BYTES, "little"), i * _WORD_BYTES)


def create() -> None:
    """Create the shared memory of a server. Processes that this one starts find it by an environment variable."""
    file = os.memfd_create("jina-v4-heartbeat")
    os.write(file, bytes(2 * _WORD_BYTES))
    os.environ[HEARTBEAT] = f"/proc/{os.getpid()}/fd/{file}"  # open as long as this process lives


def find() -> Heartbeat | None:
    """Open the shared memory of this process's server; None if the launcher did not start it on this machine."""
    try:
        return Heartbeat(os.environ[HEARTBEAT])
    except (KeyError, OSError):
        return None
