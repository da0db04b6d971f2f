"""Folders that appear whole or not at all.

Everything is built in a hidden folder beside the target and renamed when it is complete and on the disk. What an
interrupted run leaves behind never has a final name; if not even its cleaning-up could run (SIGKILL, power), the next
run removes the remains. A lock on the hidden folder tells remains from the work of another run that is still alive.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from jina_v4_merge.errors import OutputError, named

_PREFIX = ".jina-v4-merge-"
_SUFFIX = ".tmp"


def require_absent(targets: Sequence[Path]) -> None:
    """Check that none of the targets exists.

    Raises:
        OutputError: with those that do.
    """
    existing = [str(target) for target in targets if os.path.lexists(target)]
    if existing:
        raise OutputError(f"{named(existing)} exists already; remove it or choose another place. Nothing was written")


@contextlib.contextmanager
def staging(parent: Path) -> Iterator[Path]:
    """Give a hidden folder in `parent`, made if need be, and remove it afterwards with whatever is left in it.

    Raises:
        OutputError: `parent` cannot be made or written to, or the disk is full.
    """
    made_parent = not parent.exists()
    try:
        parent.mkdir(parents=True, exist_ok=True)
        turn = _lock(parent)  # nobody takes the new folder for remains before it is locked itself
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


def publish(staged: Sequence[Path], parent: Path) -> None:
    """Move complete folders out of the staging folder into `parent`, all or none."""
    for folder in staged:
        for inner in [*folder.rglob("*"), folder]:
            if inner.is_dir():
                _sync(inner)
    try:
        for folder in staged:
            folder.rename(parent / folder.name)
        _sync(parent)
    except BaseException:  # Ctrl-C as well
        for folder in staged:
            if not folder.exists():
                (parent / folder.name).rename(folder)
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
