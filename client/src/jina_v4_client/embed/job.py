"""What a run is for, as it is written beside its work, so that only the same run goes on with it."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jina_v4_client.embed.errors import ChangedError, UsageError

JOB_FILE = "job.json"
# Of the work folder; one of another format is not resumed. 2: forms are filled in, and the frames of a TIFF are rows.
_FORMAT = 2


@dataclass(frozen=True)
class Job:
    """Everything that decides about the vectors and where they go.

    Attributes:
        options: by the name of the flag.
        inputs: a fingerprint for each.
        revision: of the model whose vectors are in the work folder; None before the first, and where it is not told.
    """

    options: Mapping[str, object]
    inputs: Sequence[Mapping[str, object]]
    revision: str | None = None

    def write(self, folder: Path) -> None:
        """Write the job into a work folder, whole or not at all."""
        write_whole(folder / JOB_FILE, self.dump())

    def dump(self) -> bytes:
        """Return the content of the file."""
        document = {
            "format": _FORMAT,
            "revision": self.revision,
            "options": dict(self.options),
            "inputs": [dict(entry) for entry in self.inputs],
        }
        return json.dumps(document, indent=1).encode()


def read_job(folder: Path) -> Job | None:
    """Read the job of a work folder; None if it was not begun.

    Raises:
        UsageError: it cannot be read by this version.
    """
    try:
        content = (folder / JOB_FILE).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{folder / JOB_FILE} cannot be read: {error.strerror}") from error
    return load_job(content, folder)


def load_job(content: bytes, folder: object) -> Job:
    """Read a job from the content of its file.

    Args:
        content: of the file.
        folder: that it is in, for the message.

    Raises:
        UsageError: it cannot be read by this version.
    """
    try:
        document = json.loads(content)
    except ValueError as error:
        raise UsageError(f"{JOB_FILE} in {folder} cannot be read ({error}); start anew with --restart") from error
    if document.get("format") != _FORMAT:
        raise UsageError(f"{folder} was made by another version of this command; start anew with --restart")
    return Job(document["options"], document["inputs"], document.get("revision"))


def settle_revision(folder: Path, revision: str | None, *, any_vectors: bool) -> None:
    """Note whose vectors are in a work folder, or check that those to come are of the same revision.

    Raises:
        UsageError: they are not.
    """
    job = read_job(folder)
    if job is None or job.revision == revision:
        return
    if any_vectors:
        raise UsageError(
            f"{folder} holds vectors of revision {job.revision} of the model, and the server has {revision}:"
            " they do not go together. Serve that one again, or start anew with --restart"
        )
    replace(job, revision=revision).write(folder)


def check_same(then: Job, now: Job, folder: object) -> None:
    """Refuse to go on with the work of another run, which a folder holds."""
    if different := "; ".join(_differences(then, now)):
        raise UsageError(
            f"{folder} holds the work of another run: {different}. Give the options and inputs of that run to go on"
            " with it, or --restart to start anew"
        )


def check_unchanged(job: Job, fingerprints: Callable[[], Sequence[Mapping[str, object]]]) -> None:
    """Stop where an input is not what it was when the run began: its rows may be of both."""
    try:
        different = "; ".join(_differences(job, replace(job, inputs=fingerprints())))
    except UsageError as error:
        different = str(error)
    if different:
        raise ChangedError(
            f"an input changed during the run: {different}. Put it back as it was and give the same command again, or"
            " start anew with --restart"
        )


def _differences(then: Job, now: Job) -> Iterator[str]:
    """Say what is no longer as it was."""
    yield from _options_that_differ(then.options, now.options)
    yield from _inputs_that_differ(then.inputs, now.inputs)


def _options_that_differ(then: Mapping[str, object], now: Mapping[str, object]) -> Iterator[str]:
    for name in dict.fromkeys([*then, *now]):
        if then.get(name) != now.get(name):
            yield f"--{name} was {_said(then.get(name))} and is {_said(now.get(name))}"


def _inputs_that_differ(then: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    paths_then, paths_now = ([str(entry["path"]) for entry in entries] for entries in (then, now))
    if paths_then != paths_now:
        yield f"the inputs were {' '.join(paths_then)} and are {' '.join(paths_now)}"
        return
    for old, new in zip(then, now, strict=True):
        for name, unit in (("bytes", "bytes"), ("files", "files")):
            if old.get(name) != new.get(name):
                yield f"{new['path']} had {old.get(name)} {unit} and has {new.get(name)}"
                break
        else:
            if old != new:
                yield f"{new['path']} was changed since"


def _said(value: object) -> str:
    return "not given" if value is None else str(value)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, also after a power cut."""
    part = path.with_name(f"{path.name}.tmp")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
