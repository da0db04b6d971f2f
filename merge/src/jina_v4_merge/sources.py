"""Finding base and adapters: a folder here, or a repository on the hub, of which just what is needed is fetched."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jina_v4_merge.contents import HEAD_BYTES, instead
from jina_v4_merge.errors import ConfigError, SourceError, named
from jina_v4_merge.image_settings import (
    PREPROCESSOR_NAME,
    PROCESSOR_NAME,
    image_settings,
    pixel_settings,
    settings_file,
)
from jina_v4_merge.prompts import TASKS

# Read for the checkpoint's own small files, where they are there.
TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"

_ALWAYS_THERE = ("tokenizer.json", "tokenizer_config.json")

ADAPTERS_FOLDER = "adapters"

_ADAPTERS_FETCHED = [f"{ADAPTERS_FOLDER}/*.json", f"{ADAPTERS_FOLDER}/*.safetensors"]
_FETCHED = [
    CONFIG_NAME,
    PREPROCESSOR_NAME,
    PROCESSOR_NAME,
    GENERATION_NAME,
    *TOKENIZER_FILES,
    "model*.safetensors",
    "model.safetensors.index.json",
    *_ADAPTERS_FETCHED,
]
# Adapters with a place of their own may also lie at its top.
_ADAPTERS_ALONE_FETCHED = [*_ADAPTERS_FETCHED, *(f"{folder}adapter_*" for folder in ("", *(f"{t}/" for t in TASKS)))]

# A checkpoint that somebody else merged: newer and older names of what vectors depend on.
_OTHER_FETCHED = [
    CONFIG_NAME,
    PREPROCESSOR_NAME,
    PROCESSOR_NAME,
    "config_sentence_transformers.json",
    "chat_template.*",
    *TOKENIZER_FILES,
    "model*.safetensors",
    "model.safetensors.index.json",
    "multi_vector_projector.safetensors",
]


@dataclass(frozen=True)
class Source:
    """Where a base or its adapters lie.

    Attributes:
        name: What the user called it.
        folder: Where its files are.
        revision: The commit, of one from the hub.
    """

    name: str
    folder: Path
    revision: str | None


class FileState(NamedTuple):
    """What tells a file from the one that was there before. Not its inode, which some network file systems change."""

    mtime_ns: int
    n_bytes: int


def find_base(base: str, revision: str | None) -> Source:
    """Find a base, fetching it from the hub, with what adapters lie beside it, if it is not a folder here.

    Raises:
        SourceError: there is no such folder, or the hub does not have it or cannot be reached.
    """
    return _find("--base", base, "--revision", revision, _FETCHED)


def find_adapters(adapters: str, revision: str | None) -> Source:
    """Find adapters that have a place of their own, fetching them from the hub if it is not a folder here.

    Raises:
        SourceError: there is no such folder, or the hub does not have it or cannot be reached.
    """
    return _find("--adapters", adapters, "--adapters-revision", revision, _ADAPTERS_ALONE_FETCHED)


def find_other(name: str) -> Path:
    """Return the folder of a checkpoint that somebody else merged, fetching it from the hub if it is not one here.

    Raises:
        SourceError: there is no such folder, or the hub does not have it or cannot be reached.
    """
    return _find("--against", name, "", None, _OTHER_FETCHED).folder


def _find(option: str, name: str, revision_option: str, revision: str | None, fetched: Sequence[str]) -> Source:
    folder = Path(name).expanduser()
    try:
        is_folder, exists = folder.is_dir(), folder.exists()
    except OSError as error:  # a name too long for the file system, a folder above it that may not be entered
        raise SourceError(f"{name}: cannot be read: {error.strerror}") from error
    if is_folder:
        if revision is not None:
            raise SourceError(f"{revision_option} is for a model on the hub; {name} is a folder, which has none")
        return Source(name, folder, None)
    if exists or folder.is_symlink() or name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise SourceError(f"{name}: no such folder")
    snapshot = _fetch(option, name, revision, fetched)
    return Source(name, snapshot, snapshot.name)


def file_states(folder: Path) -> dict[Path, FileState | None]:
    """Return the state of each file in a folder of a base or of adapters; an adapter may lie two folders down."""
    return {path: file_state(path) for pattern in ("*", "*/*", "*/*/*") for path in folder.glob(pattern)}


def file_state(path: Path) -> FileState | None:
    """Return what changes when a file is written to or replaced; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return FileState(status.st_mtime_ns, status.st_size)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        SourceError: there is no such file, or it cannot be read.
        ConfigError: it is no JSON object.
    """
    return _json_object(path, read(path))


def read(path: Path) -> bytes:
    """Read a small file.

    Raises:
        SourceError: there is no such file, it cannot be read, or it is a Git LFS pointer or a web page.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise SourceError(f"{path}: no such file") from error
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from error
    if reason := instead(content[:HEAD_BYTES]):
        raise SourceError(f"{path}: this is {reason}")
    return content


def _json_object(path: Path, content: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except ValueError as error:
        raise SourceError(f"{path}: cannot be read: {error}") from error
    if not isinstance(parsed, dict):
        raise ConfigError(f"{path}: must be a JSON object")
    return parsed


def _fetch(option: str, repository: str, revision: str | None, fetched: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(fetched)))
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


def small_files(folder: Path) -> dict[str, bytes]:
    """Read the tokenizer's and processor's files of a base, and its generation config.

    Raises:
        SourceError: one that is always there is missing, or one cannot be read.
        ConfigError: one that must hold a JSON object does not, or two disagree about images.
    """
    names = [*TOKENIZER_FILES, PREPROCESSOR_NAME, PROCESSOR_NAME, GENERATION_NAME]
    files = {name: read(folder / name) for name in names if name in _ALWAYS_THERE or (folder / name).exists()}
    parsed = {name: _json_object(folder / name, files[name]) for name in files if name.endswith(".json")}
    if settings_file(parsed) not in files:
        read(folder / PREPROCESSOR_NAME)  # says why it cannot be read
    _check_images(folder, parsed)
    return files


def _check_images(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse two files that make other pixels of an image: which one counts depends on the version of transformers."""
    name = settings_file(files)
    newer = pixel_settings(image_settings(name, files[name]))
    older = pixel_settings(files[PREPROCESSOR_NAME]) if PREPROCESSOR_NAME in files else newer
    if differing := [f"{key} ({newer[key]!r} and {older[key]!r})" for key in newer if newer[key] != older[key]]:
        raise ConfigError(
            f"{folder}: {PROCESSOR_NAME} and {PREPROCESSOR_NAME} have different settings of images: "
            f"{named(differing)}. Loaders differ about which they read; remove the one that is not to be used"
        )
