"""Letting two folders change places in one step, which Python has no function for.

With two renames there would be a moment in which neither has the name. Linux can do it in one; where the system, its C
library or the file system cannot, nothing is replaced at all.
"""

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def exchange(one: Path, other: Path) -> None:
    """Let two files or folders of one file system change places.

    Raises:
        OSError: one of them is not there, or this cannot be done here.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError as error:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from error
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))


def can_exchange(folder: Path) -> bool:
    """Try it with two new folders in a folder, which are removed again."""
    one, other = folder / "one", folder / "other"
    try:
        one.mkdir()
        other.mkdir()
        exchange(one, other)
    except OSError:
        return False
    finally:
        for made in (one, other):
            if made.exists():
                made.rmdir()
    return True
