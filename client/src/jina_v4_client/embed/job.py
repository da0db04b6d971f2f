"""The job of a run: its options and inputs. It is kept with the work; only a run with the same job goes on with it."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from jina_v4_client.embed.errors import ChangedError, UsageError

JOB_FILE = "job.json"
# Of the work folder; another format is not resumed. Since 2, PDF pages show filled-in forms and TIFF frames are rows.
_FORMAT = 2
PUT_BACK = "Put it back as it was and give the same command again, or start anew with --restart"


@dataclass(frozen=True)
class Job:
    """Everything that decides which vectors are written.

    Attributes:
        options: by the name of the flag.
        inputs: a fingerprint for each.
        revision: of the model that made the vectors so far; None before the first, or if the server does not tell.
    """

    options: Mapping[str, object]
    inputs: Sequence[Mapping[str, object]]
    revision: str | None = None

    def dump(self) -> bytes:
        """Return the content of the file."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=1).encode()


def load_job(content: bytes, folder: object) -> Job:
    """Read a job from the content of its file.

    Args:
        content: of the file.
        folder: of the file, for the message.

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


def check_same(then: Job, now: Job, folder: object) -> None:
    """Refuse to go on with the work in a folder if it is that of another job."""
    if different := "; ".join(_differences(then, now)):
        raise UsageError(
            f"{folder} holds the work of another run: {different}. Give the options and inputs of that run to go on"
            " with it, or --restart to start anew"
        )


def is_changed(then: Job, now: Job) -> bool:
    """Tell whether the inputs are those of another job, and changed since."""
    return _paths(then) == _paths(now) and then.inputs != now.inputs


def check_unchanged(
    job: Job, fingerprints: Callable[[], Sequence[Mapping[str, object]]], what_to_do: str = PUT_BACK
) -> None:
    """Stop the run if an input has changed since it began: some rows may be old and some new."""
    try:
        different = "; ".join(_differences(job, replace(job, inputs=fingerprints())))
    except UsageError as error:
        different = str(error)
    if different:
        raise ChangedError(f"an input changed during the run: {different}. {what_to_do}")


def _differences(then: Job, now: Job) -> Iterator[str]:
    """Say which options differ; then which input, by size or number of files if these differ."""
    for name in dict.fromkeys([*then.options, *now.options]):
        old, new = then.options.get(name), now.options.get(name)
        if old != new:
            yield f"--{name} was {_said(old)} and is {_said(new)}"
    if _paths(then) != _paths(now):
        yield f"the inputs were {' '.join(_paths(then))} and are {' '.join(_paths(now))}"
        return
    for before, after in zip(then.inputs, now.inputs, strict=True):
        counted = next((unit for unit in ("bytes", "files") if before.get(unit) != after.get(unit)), None)
        if counted is not None:
            yield f"{after['path']} had {before.get(counted)} {counted} and has {after.get(counted)}"
        elif before != after:
            yield f"{after['path']} was changed since"


def _paths(job: Job) -> list[str]:
    return [str(entry["path"]) for entry in job.inputs]


def _said(value: object) -> str:
    return "not given" if value is None else str(value)
