"""Checking checkpoints and exports on a disk: every file against the manifest, every tensor against the config.

A checkpoint that lost a byte embeds plausibly and wrongly. So every file is read and hashed, once even where several
checkpoints hard-link it, and every value is checked on the way. `refold` compares the weights with a base's as well.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jina_v4_merge.errors import LayoutError, MergeError, SourceError, named
from jina_v4_merge.files import FileDigest, read_json
from jina_v4_merge.prompts import IMAGE_PROMPT, TASKS, text_prefixes
from jina_v4_merge.quantize import KINDS, quantization_config
from jina_v4_merge.reading.adapters import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from jina_v4_merge.reading.configs import CONFIG_NAME, PREPROCESSOR_NAME, TOKENIZER_CONFIG_NAME, TOKENIZER_NAME
from jina_v4_merge.reading.layout import check, projector_shapes, stock_shapes
from jina_v4_merge.reading.weights import INDEX_NAME, StoredTensor, base_tensors, stored_tensors
from jina_v4_merge.verify.canary import CANARY_NAME, check_canary
from jina_v4_merge.verify.exports import check_adapter, check_gguf, projector_dim
from jina_v4_merge.verify.scan import Scan, scan
from jina_v4_merge.work import one_thread, progress, workers
from jina_v4_merge.writing.checkpoint import (
    ADAPTER,
    ARCHITECTURE,
    BASE,
    GGUF,
    GGUF_DTYPES,
    MANIFEST_NAME,
    MODEL,
    PROJECTOR_NAME,
    PROMPTS_NAME,
    gguf_name,
)
from jina_v4_merge.writing.shards import DTYPES, checkpoint_tensors

_BASE_FILES = (
    CONFIG_NAME,
    PREPROCESSOR_NAME,
    INDEX_NAME,
    "chat_template.jinja",
    TOKENIZER_NAME,
    TOKENIZER_CONFIG_NAME,
)
# By the part that a manifest names; a checkpoint's names none.
_ALWAYS_THERE = {
    None: (*_BASE_FILES, PROJECTOR_NAME, PROMPTS_NAME),
    BASE: _BASE_FILES,
    ADAPTER: (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, PROJECTOR_NAME),
    GGUF: (PROJECTOR_NAME,),
}


@dataclass
class Verified:
    """A checkpoint, or a folder of an export, and what was found out about it.

    Attributes:
        folder: Where it is.
        manifest: Empty where it cannot be read.
        files: What the manifest says of each file.
        tensors: By published name, the projector's among them; empty where their headers cannot be read, and of a GGUF
            file. An adapter's under the names in its file.
        problems: All that is wrong with it, each a sentence that names the file or tensor.
    """

    folder: Path
    manifest: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileDigest] = field(default_factory=dict)
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def part(self) -> str | None:
        """Of an export, which part this is: `base`, `adapter` or `gguf`; None for a checkpoint."""
        return self.manifest.get("part")

    @property
    def quantized(self) -> str | None:
        """What a checkpoint's matrices are, `int8` or `fp8`; None where they have the dtype of the rest."""
        return self.manifest.get("quantized")

    @property
    def n_bytes(self) -> int:
        """What the manifest's files should have together."""
        return sum(digest.size for digest in self.files.values())

    def summary(self) -> str:
        """Return in one line what was checked."""
        n_tensors = f", {len(self.tensors)} tensors" if self.tensors else ""
        sizes = f"{len(self.files)} files, {self.n_bytes / 1e9:.2f} GB{n_tensors}"
        return f"{self.folder}: {sizes}, {'+'.join(filter(None, (self.manifest.get('dtype'), self.quantized)))}"


def find_checkpoints(folder: Path) -> list[Path]:
    """Return a folder itself if it is a checkpoint's, else the folders of checkpoints, or of an export, in it.

    Raises:
        SourceError: there are none.
    """
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise SourceError(f"{folder}: cannot be read: {error.strerror}") from error
    if folder / MANIFEST_NAME in inside:
        return [folder]
    of_export = {folder / name for name in (BASE, *TASKS)}
    inner = [path for path in inside if (path.name.startswith(f"{MODEL}-") or path in of_export) and path.is_dir()]
    if not inner:
        raise SourceError(f"{folder}: neither {MANIFEST_NAME} nor a folder {MODEL}-TASK is there")
    return inner


def verify(folders: Sequence[Path], expect_canary: bool = True) -> list[Verified]:
    """Check some checkpoints by themselves.

    Args:
        folders: Of a checkpoint each.
        expect_canary: Whether a canary that is there must be of this checkpoint; not where it is about to be replaced.
    """
    checkpoints = [_open(folder) for folder in folders]
    for checkpoint in checkpoints:
        for check_one in _checks(checkpoint, expect_canary):
            try:
                check_one(checkpoint)
            except MergeError as error:
                checkpoint.problems.append(str(error))
    _check_contents(checkpoints)
    return checkpoints


def _checks(checkpoint: Verified, expect_canary: bool) -> list[Callable[[Verified], None]]:
    """Return what a folder is checked for; each check adds to the problems, or raises a MergeError for the last one."""
    if not checkpoint.manifest:
        return []
    of_part = {ADAPTER: [_check_adapter], GGUF: [_check_gguf]}
    weights = of_part.get(checkpoint.part or "", [_check_config, _check_tensors])
    canary = [_check_canary] if expect_canary else []
    return [_check_name, _check_list, _check_prompts, *weights, *canary]


def _open(folder: Path) -> Verified:
    path = folder / MANIFEST_NAME
    try:
        manifest = read_json(path)
        part, task = manifest.get("part"), manifest["task"]
        if manifest["format"] != 1 or manifest["model"] != MODEL or task not in (*TASKS, BASE):
            raise ValueError(f"format {manifest['format']} of {manifest['model']}, task {task}")
        if part not in _ALWAYS_THERE or (part == BASE) != (task == BASE):
            raise ValueError(f"part {part}, task {task}")
        if manifest["dtype"] not in (GGUF_DTYPES if part == GGUF else DTYPES):
            raise ValueError(f"dtype {manifest['dtype']}")
        if (quantized := manifest.get("quantized")) not in (None, *(KINDS if part is None else ())):
            raise ValueError(f"quantized {quantized}")
        files = {
            name: FileDigest(str(entry["sha256"]), int(entry["size"])) for name, entry in manifest["files"].items()
        }
        if odd := [name for name in files if Path(name).name != name]:
            raise ValueError(f"file name {odd[0]}")
    except MergeError as error:
        return Verified(folder, problems=[str(error)])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return Verified(folder, problems=[f"{path}: no manifest of `jina-v4-merge fold`: {error!r}"])
    return Verified(folder, manifest, files)


def _check_name(checkpoint: Verified) -> None:
    """Check that a folder with the name of a task holds that task, as whoever copies it by its name expects."""
    folder, task = checkpoint.folder, checkpoint.manifest["task"]
    name = f"-{folder.absolute().name}"  # the task is the whole name in an export
    if other := [other for other in TASKS if other != task and name.endswith(f"-{other}")]:
        checkpoint.problems.append(f"{folder}: holds {task}, as {MANIFEST_NAME} says, and is named after {other[0]}")


def _check_list(checkpoint: Verified) -> None:
    """Check that just the manifest's files are there. Hidden ones, which no loader reads, may be."""
    folder, files = checkpoint.folder, checkpoint.files
    present = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    checkpoint.problems += [
        f"{folder / name}: {'is no file, or a link that leads nowhere' if name in present else 'is missing'}"
        for name in files
        if not (folder / name).is_file()
    ]
    checkpoint.problems += [
        f"{folder / name}: the manifest does not list it"
        for name in _always_there(checkpoint.manifest)
        if name not in files
    ]
    checkpoint.problems += [
        f"{folder / name}: does not belong to the checkpoint: the manifest does not list it"
        for name in sorted(present - files.keys() - {MANIFEST_NAME, CANARY_NAME})
    ]


def _always_there(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    part = manifest.get("part")
    names = _ALWAYS_THERE[part]
    return (*names, gguf_name(manifest["task"], manifest["dtype"])) if part == GGUF else names


def _check_prompts(checkpoint: Verified) -> None:
    """Check what the manifest says of the prompts; a base has none, which are a task's."""
    manifest = checkpoint.manifest
    if checkpoint.part == BASE:
        return
    for key, expected in (("prompts", text_prefixes(manifest["task"])), ("image_prompt", IMAGE_PROMPT)):
        if manifest.get(key) != expected:
            checkpoint.problems.append(
                f"{checkpoint.folder / MANIFEST_NAME}: {key} is {manifest.get(key)!r} and must be {expected!r}"
            )


def _check_config(checkpoint: Verified) -> None:
    """Check what the manifest and the config say of the weights against each other."""
    manifest, folder = checkpoint.manifest, checkpoint.folder
    config = read_json(folder / CONFIG_NAME)
    for key, expected in (
        ("architectures", [ARCHITECTURE]),
        ("torch_dtype", manifest["dtype"]),
        ("matryoshka_dimensions", manifest.get("dimensions")),
        ("quantization_config", checkpoint.quantized and quantization_config(checkpoint.quantized)),
    ):
        if (value := config.get(key)) != expected:
            checkpoint.problems.append(f"{folder / CONFIG_NAME}: {key} is {value!r} and must be {expected!r}")


def _check_tensors(checkpoint: Verified) -> None:
    """Check names, shapes and dtypes of all tensors: the index against the shards, both against the config."""
    folder = checkpoint.folder
    tensors = base_tensors(folder, quantized=checkpoint.quantized is not None)
    projector = {} if checkpoint.part == BASE else stored_tensors(folder / PROJECTOR_NAME)
    if twice := sorted(tensors.keys() & projector.keys()):
        raise LayoutError(f"{folder}: {twice[0]} is in {tensors[twice[0]].path.name} and in {PROJECTOR_NAME}")
    if renamed := [name for name, tensor in tensors.items() if tensor.name != name]:
        raise LayoutError(f"{tensors[renamed[0]].path}: {tensors[renamed[0]].name} must be called {renamed[0]}")
    tensors |= projector
    present = {name: tensor.shape for name, tensor in tensors.items()}
    config = read_json(folder / CONFIG_NAME)
    if checkpoint.quantized is not None:
        config.pop("quantization_config", None)  # compared before
    shapes = stock_shapes(config)
    if checkpoint.part != BASE:
        dim = projector_dim(folder / PROJECTOR_NAME, projector)
        shapes |= projector_shapes(config, dim)  # the config has no place for it
    expected = checkpoint_tensors(shapes, DTYPES[checkpoint.manifest["dtype"]], checkpoint.quantized)
    expected_shapes = {name: tensor.shape for name, tensor in expected.items()}
    check(str(folder), present, expected_shapes, {name: tensor.path.name for name, tensor in tensors.items()})
    checkpoint.tensors = tensors
    for dtype in dict.fromkeys(tensor.dtype for tensor in expected.values()):
        if other := [
            f"{name} ({tensor.path.name})"
            for name, tensor in tensors.items()
            if tensor.dtype != expected[name].dtype == dtype
        ]:
            checkpoint.problems.append(
                f"{folder}: the manifest says {dtype}, which these tensors are not: {named(other)}"
            )
    metadata = {"total_size": sum(tensor.n_bytes for name, tensor in tensors.items() if name not in projector)}
    if (found := read_json(folder / INDEX_NAME).get("metadata")) != metadata:
        checkpoint.problems.append(f"{folder / INDEX_NAME}: metadata is {found!r} and must be {metadata!r}")


def _check_adapter(checkpoint: Verified) -> None:
    checkpoint.tensors, problems = check_adapter(checkpoint.folder, checkpoint.manifest)
    checkpoint.problems += problems


def _check_gguf(checkpoint: Verified) -> None:
    checkpoint.problems += check_gguf(checkpoint.folder, checkpoint.manifest)


def _check_canary(checkpoint: Verified) -> None:
    check_canary(checkpoint.folder)


def _check_contents(checkpoints: Sequence[Verified]) -> None:
    """Hash every file, and check every value; what is hard-linked is read once."""
    scans: dict[tuple[int, int], Future[Scan]] = {}
    pending: list[tuple[Verified, str, Future[Scan]]] = []
    with one_thread(), workers() as pool:
        for checkpoint in checkpoints:
            for name in checkpoint.files:
                path = checkpoint.folder / name
                if path.is_file():
                    status = path.stat()
                    key = (status.st_dev, status.st_ino)
                    if key not in scans:
                        scans[key] = pool.submit(scan, path)
                    pending.append((checkpoint, name, scans[key]))
        with progress("verify", sum(checkpoint.n_bytes for checkpoint in checkpoints)) as seen:
            for checkpoint, name, future in pending:
                _check_content(checkpoint, name, future)
                seen(checkpoint.files[name].size)


def _check_content(checkpoint: Verified, name: str, future: Future[Scan]) -> None:
    path = checkpoint.folder / name
    try:
        found = future.result()
    except MergeError as error:
        if str(error) not in checkpoint.problems:  # the header was read before
            checkpoint.problems.append(str(error))
        return
    listed = checkpoint.files[name]
    if found.digest.size != listed.size:
        checkpoint.problems.append(f"{path}: has {found.digest.size} bytes; the manifest says {listed.size}")
    elif found.digest.sha256 != listed.sha256:
        checkpoint.problems.append(f"{path}: its sha256 is {found.digest.sha256}; the manifest says {listed.sha256}")
    if found.not_finite:
        checkpoint.problems.append(f"{path}: holds values that are not finite, in {named(found.not_finite)}")
