"""Folders that appear whole or not at all.

Everything is built in a hidden folder beside the target and renamed when it is complete and on the disk. What an
interrupted run leaves behind never has a final name; if not even its cleaning-up could run (SIGKILL, power), the next
run removes the remains. A locked folder is none of them: another run is still at work in it.
What is replaced changes places with its successor in one step, so that one of the two has the final name at any moment.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jina_v4_merge.errors import OutputError, named
from jina_v4_merge.writing.filesystem import exchange

_PREFIX = ".jina-v4-merge-"
_SUFFIX = ".tmp"


@dataclass(frozen=True)
class Written:
    """A folder that was written: a checkpoint, or a part of an export. The task of an exported base is `base`."""

    task: str
    folder: Path

    @property
    def n_bytes(self) -> int:
        """The size of its files."""
        return sum(file.stat().st_size for file in self.folder.iterdir())


def require_absent(targets: Sequence[Path], or_else: str = "") -> None:
    """Check that none of the targets exists.

    Args:
        targets: Any.
        or_else: Another way out than to remove them, for the message.

    Raises:
        OutputError: with those that do.
    """
    existing = [str(target) for target in targets if os.path.lexists(target)]
    if existing:
        verb, it = ("exists", "it") if len(existing) == 1 else ("exist", "them")
        raise OutputError(
            f"{named(existing)} {verb} already; remove {it}{or_else} or choose another place. Nothing was written"
        )


@contextlib.contextmanager
def staging(parent: Path) -> Iterator[Path]:
    """Yield a hidden folder in `parent`, made if need be, and remove it afterwards with whatever is left in it.

    Raises:
        OutputError: `parent` cannot be made or written to, or the disk is full.
    """
    made_parent = not parent.exists()
    try:
        parent.mkdir(parents=True, exist_ok=True)
        turn = _lock(parent)  # no other run removes the new folder before it is locked itself
        try:
            _remove_remains(parent)
            folder = Path(tempfile.mkdtemp(prefix=_PREFIX, suffix=_SUFFIX, dir=parent))
            lock = _lock(folder)
        finally:
            os.close(turn)
    except OSError as error:
        raise OutputError(f"{parent}: cannot write here: {error.strerror}") from error
    try:
        yield folder
    except OSError as error:
        raise OutputError(f"{parent}: cannot finish what was begun here: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
        if made_parent:
            with contextlib.suppress(OSError):  # not empty: something was published
                parent.rmdir()


def publish(staged: Sequence[Path], parent: Path, may_replace: Callable[[Path], object] | None = None) -> None:
    """Move complete folders out of the staging folder into `parent`, all or none.

    Args:
        staged: The folders, on the same file system as `parent`.
        parent: Where they get their final names.
        may_replace: Raises for a folder that must stay. Without it none is replaced. What is replaced changes places
            with the new folder in one step, and is removed with the staging folder.
    """
    for folder in staged:
        for inner in [*folder.rglob("*"), folder]:
            if inner.is_dir():
                _sync(inner)
    inodes = {folder: folder.stat().st_ino for folder in staged}
    try:
        for folder in staged:
            target = parent / folder.name
            if may_replace is not None and os.path.lexists(target):
                may_replace(target)
                exchange(folder, target)
            else:
                folder.rename(target)
        _sync(parent)
    except BaseException:  # Ctrl-C as well
        for folder, inode in inodes.items():
            target = parent / folder.name
            if not target.exists() or target.stat().st_ino != inode:
                continue
            if folder.exists():
                exchange(folder, target)
            else:
                target.rename(folder)
        raise


def _open_folder(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)


def _lock(folder: Path) -> int:
    """Lock a folder until the descriptor returned is closed; do without where the file system knows no locks."""
    descriptor = _open_folder(folder)
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def _sync(folder: Path) -> None:
    descriptor = _open_folder(folder)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_remains(parent: Path) -> None:
    for remains in parent.glob(f"{_PREFIX}*{_SUFFIX}"):
        # Left alone: another run is at work in it, it is not ours, or the file system knows no locks.
        with contextlib.suppress(OSError):
            descriptor = _open_folder(remains)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(remains)
            finally:
                os.close(descriptor)
