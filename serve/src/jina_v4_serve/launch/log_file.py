"""The file that all processes of one server write into: vLLM's log, and what they print themselves.

The file is the processes' standard output and error, so a line costs nothing more than on a screen, and nothing that a
crash leaves behind is lost. It is for its owner alone. It keeps at most MAX_BYTES, and as many in `FILE.1`; a line that
is written at the moment when it is emptied may be lost, as with logrotate's `copytruncate`.
"""

import contextlib
import os
import re
import shutil
from pathlib import Path

MAX_BYTES = 16 * 2**20
_ENDS = re.compile(rb"[\r\n]+")  # a carriage return ends what a progress bar has drawn
_COLOUR = re.compile(rb"\x1b\[[\d;]*m")  # of vLLM where FORCE_COLOR is set


class LogFile:
    """A log, and how far it was read.

    Attributes:
        path: of the file.
        file: its descriptor. All writers append, so that the file can be emptied under them.
    """

    def __init__(self, path: Path) -> None:
        """Begin a new file; the one that was there becomes `FILE.1`.

        Raises:
            OSError: there is no place for it.
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
        """Return the lines that were completed since the last call; empty the file once it is full."""
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
        with contextlib.suppress(OSError):  # a full disk: what was logged is lost, and the disk less full
            self._former.touch(0o600)
            shutil.copyfile(self.path, self._former)
        os.ftruncate(self.file, 0)
        self._at = 0
