"""Whether there is room for what is going to be written, before any of it is."""

import os
from collections.abc import Iterable
from pathlib import Path

from jina_v4_merge.errors import OutputError


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
