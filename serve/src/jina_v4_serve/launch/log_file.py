"""The log file of one server: vLLM's log, and everything that the server's processes print.

The file is the standard output and error of the processes, so a line costs no more than on a screen, and a crash loses
nothing. Only its owner can read it. When it reaches MAX_BYTES, it is copied to `FILE.1` and emptied; a line that is
written at that moment may be lost, as with logrotate's `copytruncate`.
"""

import contextlib
import os
import re
import shutil
from pathlib import Path

MAX_BYTES = 16 * 2**20
_ENDS = re.compile(rb"[\r\n]+")  # progress bars end their lines with a carriage return
_COLOUR = re.compile(rb"\x1b\[[\d;]*m")  # vLLM's, if FORCE_COLOR is set


class LogFile:
    """A log file, and how far it has been read.

    Attributes:
        path: of the file.
        file: its descriptor. All writers append, so the file can be emptied while they write.
    """

    def __init__(self, path: Path) -> None:
        """Create the file; an older one is renamed to `FILE.1`.

        Raises:
            OSError: the file cannot be created.
        """
        self.path = path
        self._former = path.with_name(f"{path.name}.1")
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists():
            path.replace(self._former)
        self.file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._at = 0
        self._rest = b""

    def new_lines(self) -> list[str]:
        """Return the lines that were completed since the last call; empty the file when it is full."""
        size = os.fstat(self.file).st_size
        if size < self._at:  # another program has emptied it
            self._at = 0
        content = os.pread(self.file, size - self._at, self._at)
        self._at += len(content)
        *lines, self._rest = _ENDS.split(self._rest + content)
        if self._at == size > MAX_BYTES:
            self._empty()
        return [_COLOUR.sub(b"", line).decode(errors="replace") for line in lines if line]

    def _empty(self) -> None:
        with contextlib.suppress(OSError):  # on a full disk the log is lost, which frees space
            self._former.touch(0o600)
            shutil.copyfile(self.path, self._former)
        os.ftruncate(self.file, 0)
        self._at = 0
