"""The work folder beside an output: the job, the journal, and the parts of the output that are not whole yet."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

from jina_v4_client.embed.errors import UsageError
from jina_v4_client.embed.job import JOB_FILE, Job, check_same, is_changed, load_job
from jina_v4_client.embed.journal import DATABASE, VECTORS, is_in_use, sync_folder

# Empty; it is there once a run saw an input that had changed: rows that are done may be of either state of it.
_CHANGED = "changed"
# Besides the files of the database; a folder with anything else in it is not removed.
_OWN_FILES = {JOB_FILE, f"{JOB_FILE}.tmp", VECTORS, _CHANGED, "ids", "errors", "output"}


def begin_work(folder: Path, job: Job) -> None:
    """Make a work folder.

    Raises:
        UsageError: it cannot be made.
    """
    try:
        folder.mkdir()
        _write_job(folder, job)
        sync_folder(folder.parent)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made, to keep the work in: {error.strerror}") from error


def find_work(folder: Path, job: Job) -> Job | None:
    """Return the job in a work folder, which has the revision too; None if there is no work to go on with.

    Raises:
        UsageError: it is another job, or cannot be read by this version.
    """
    if not folder.is_dir():
        return None
    try:
        content = (folder / JOB_FILE).read_bytes()
    except FileNotFoundError:  # a run was killed before it wrote the job
        discard_work(folder)
        return None
    except OSError as error:
        raise UsageError(f"{folder / JOB_FILE} cannot be read: {error.strerror}") from error
    then = load_job(content, folder)
    try:
        if is_changed(then, job):
            note_change(folder)
    finally:
        check_same(then, job, folder)
    return then


def note_change(folder: Path) -> None:
    """Note for later runs that an input has changed since the work began, even if it is put back."""
    (folder / _CHANGED).touch()


def may_be_mixed(folder: Path) -> bool:
    """Tell whether rows that are done may be of another state of the inputs."""
    return (folder / _CHANGED).exists()


def hold_revision(folder: Path, job: Job, revision: str | None, *, any_vectors: bool) -> Job:
    """Return the job with the revision of the server, and write it to the work folder.

    Raises:
        UsageError: the work folder holds vectors of another revision.
    """
    if job.revision == revision:
        return job
    if any_vectors:
        raise UsageError(
            f"{folder} holds vectors of revision {job.revision} of the model, and the server has {revision}:"
            " they do not go together. Serve that one again, or start anew with --restart"
        )
    job = replace(job, revision=revision)
    _write_job(folder, job)
    return job


def discard_work(folder: Path) -> None:
    """Remove a work folder, if there is one.

    The job goes first: a folder without it is not resumed after a kill. If nothing may be removed, nothing changes.

    Raises:
        UsageError: it is in use, holds strange files, or cannot be removed.
    """
    try:
        if not folder.exists():
            return
        names = {entry.name for entry in folder.iterdir() if not entry.name.startswith(DATABASE)}
        if strange := sorted(names - _OWN_FILES):
            raise UsageError(f"{folder} is not removed: {strange[0]} in it was not put there by this command")
        if is_in_use(folder):
            raise UsageError(f"{folder} is not removed: another run is at work in it")
        (folder / JOB_FILE).unlink(missing_ok=True)
        sync_folder(folder)
        shutil.rmtree(folder)
    except OSError as error:
        raise UsageError(f"{folder} cannot be removed: {error.strerror}") from error


def _write_job(folder: Path, job: Job) -> None:
    """Write the job; after a kill or a power cut the file is whole, or as it was."""
    part = folder / f"{JOB_FILE}.tmp"
    with part.open("wb") as file:
        file.write(job.dump())
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / JOB_FILE)
    sync_folder(folder)
