"""Finding base and adapters: a folder here, or a repository on the hub, of which just what is needed is fetched."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jina_v4_merge.errors import SourceError
from jina_v4_merge.prompts import TASKS
from jina_v4_merge.reading.configs import (
    CONFIG_NAME,
    GENERATION_NAME,
    PREPROCESSOR_NAME,
    PROCESSOR_NAME,
    TOKENIZER_FILES,
)

ADAPTERS_FOLDER = "adapters"

_CONFIGS = [CONFIG_NAME, PREPROCESSOR_NAME, PROCESSOR_NAME, *TOKENIZER_FILES]
_WEIGHTS = ["model*.safetensors", "model.safetensors.index.json"]
_ADAPTERS = [f"{ADAPTERS_FOLDER}/*.json", f"{ADAPTERS_FOLDER}/*.safetensors"]
# What is fetched from the hub, by the option that names the repository.
_FETCHED = {
    "--base": [*_CONFIGS, GENERATION_NAME, *_WEIGHTS, *_ADAPTERS],
    # These may also be at the top of a repository of their own.
    "--adapters": [*_ADAPTERS, "adapter_*", *(f"{task}/adapter_*" for task in TASKS)],
    # A checkpoint that somebody else merged: newer and older names of what vectors depend on.
    "--against": [
        *_CONFIGS,
        *_WEIGHTS,
        "multi_vector_projector.safetensors",
        "config_sentence_transformers.json",
        "chat_template.*",
    ],
}

FileState = tuple[int, int]  # time of change and size; not the inode, which some network file systems change


@dataclass(frozen=True)
class Source:
    """Where a base, adapters or a checkpoint are.

    Attributes:
        name: What the user called it.
        folder: Where its files are.
        revision: The commit, of one from the hub.
    """

    name: str
    folder: Path
    revision: str | None


def find(option: str, name: str, revision: str | None = None, *, only: str | None = None) -> Source:
    """Find what an option of the command names: a folder here, else a repository on the hub, which is fetched.

    Args:
        option: `--base` (with what adapters are beside it), `--adapters` or `--against`.
        name: A folder, or the name of a repository.
        revision: Of a repository on the hub: branch, tag or commit.
        only: The one file that is fetched; all that the option needs if None.

    Raises:
        SourceError: there is no such folder, or the hub does not have it or cannot be reached.
    """
    folder = Path(name).expanduser()
    try:
        is_folder, exists = folder.is_dir(), folder.exists()
    except OSError as error:  # a name too long for the file system, a folder above it that may not be entered
        raise SourceError(f"{name}: cannot be read: {error.strerror}") from error
    if is_folder:
        if revision is not None:
            revision_option = "--revision" if option == "--base" else f"{option}-revision"
            raise SourceError(f"{revision_option} is for a model on the hub; {name} is a folder, which has none")
        return Source(name, folder, None)
    if exists or folder.is_symlink() or name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise SourceError(f"{name}: no such folder")
    snapshot = _fetch(option, name, revision, [only] if only else _FETCHED[option])
    return Source(name, snapshot, snapshot.name)


def file_states(folder: Path) -> dict[Path, FileState | None]:
    """Return the state of each file in a folder of a base or of adapters; an adapter may be two folders down."""
    return {path: file_state(path) for pattern in ("*", "*/*", "*/*/*") for path in folder.glob(pattern)}


def file_state(path: Path) -> FileState | None:
    """Return what changes when a file is written to or replaced; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def _fetch(option: str, repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except HFValidationError as error:
        raise SourceError(f"{repository}: neither a folder here nor a possible name on the hub") from error
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        at = f" at revision {revision}" if revision else ""
        raise SourceError(
            f"{repository}{at}: the hub does not have it, or does not show it to you; "
            "check the name and log in with `hf auth login` or HF_TOKEN if it is private or gated"
        ) from error
    except Exception as error:  # whatever HTTP library the hub's client is built on has errors of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0].removeprefix("Got: ")
        raise SourceError(
            f"{repository}: there is no such folder here, and the hub cannot be reached ({reason}). Ways out: "
            f"a local copy with {option} DIR; a snapshot in the hub's cache (HF_HOME, and HF_HUB_OFFLINE=1 to use "
            "nothing else); a mirror with HF_ENDPOINT=URL; random weights from `jina-v4-merge standin DIR` to try "
            "things out"
        ) from error
