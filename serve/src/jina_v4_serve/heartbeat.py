"""The engine's heartbeat: a few bytes of memory that all processes of one server share.

The engine's process writes the time into them after each scheduling step. Every API process reads them, and so knows
of steps for another one's requests too. The API process that finds the engine hung writes its verdict beside the beat:
then all of them say so, whichever of them is asked.

The memory has no name in any file system: nothing is left when the server is killed, and no full disk stops the beat.
"""

import os
import time

HUNG = "hung"  # the status in `/health` by which the supervisor knows the verdict
HEARTBEAT = "JINA_V4_HEARTBEAT"  # the launcher sets it, for the processes of its server
_WORD_BYTES = 8


class Heartbeat:
    """Two numbers: the time of the last beat, and the beat after which the engine was found hung."""

    def __init__(self, path: str) -> None:
        """Open the shared memory.

        Raises:
            OSError: it is not there, or it is another machine's.
        """
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def beat(self) -> None:
        """Say that the engine has finished a step."""
        self._write(0, time.monotonic_ns())

    @property
    def last(self) -> int:
        """The monotonic time of the last beat in nanoseconds; 0 before the first."""
        return self._read(0)

    def condemn(self, beat: int) -> None:
        """Say that the engine is hung since a beat. The next beat, if there is one, takes that back."""
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
    """Make the shared memory of a server; the processes that this one starts find it in their environment."""
    file = os.memfd_create("jina-v4-heartbeat")
    os.write(file, bytes(2 * _WORD_BYTES))
    os.environ[HEARTBEAT] = f"/proc/{os.getpid()}/fd/{file}"  # open as long as this process lives


def find() -> Heartbeat | None:
    """Open the shared memory of this process's server; None where the launcher did not start it on this machine."""
    try:
        return Heartbeat(os.environ[HEARTBEAT])
    except (KeyError, OSError):
        return None
