"""What the file system of the target offers: room, hard links, and letting two folders change places in one step.

Python has no function for the last. With two renames there would be a moment in which neither folder has the name.
Linux can do it in one; where the system, its C library or the file system cannot, nothing is replaced at all.
"""

import ctypes
import errno
import os
from collections.abc import Iterable
from pathlib import Path

from jina_v4_merge.errors import OutputError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def require_space(folder: Path, sizes: Iterable[int]) -> None:
    """Check that a file system has room for files of these sizes in bytes, each rounded up to whole blocks.

    Args:
        folder: Any on that file system.
        sizes: Of the files, and 1 for each folder.

    Raises:
        OutputError: with what is needed and what is free.
    """
    system = os.statvfs(folder)
    needed = sum(-(-size // system.f_frsize) for size in sizes) * system.f_frsize
    free = system.f_bavail * system.f_frsize
    if needed > free:
        raise OutputError(
            f"{folder}: {needed} bytes ({needed / 1e9:.2f} GB) are needed and {free} ({free / 1e9:.2f} GB) are free; "
            "make room or choose another place. Nothing was written"
        )


def can_link(folder: Path) -> bool:
    """Try a hard link between two new files in a folder, which are removed again."""
    one, other = folder / "one", folder / "other"
    try:
        one.touch()
        other.hardlink_to(one)
    except OSError:
        return False
    finally:
        one.unlink(missing_ok=True)
        other.unlink(missing_ok=True)
    return True


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
