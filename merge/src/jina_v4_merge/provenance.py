"""The manifest of a checkpoint or of an exported folder: what it is, what it was made from, every other file in it."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jina_v4_merge import checkpoint
from jina_v4_merge.adapters import Adapters
from jina_v4_merge.digests import FileDigest
from jina_v4_merge.errors import MergeError, OutputError
from jina_v4_merge.model import Model
from jina_v4_merge.prompts import IMAGE_PROMPT, text_prefixes
from jina_v4_merge.sources import Source, read_json

_TOOL = "jina-v4-merge"


def manifest(
    model: Model,
    task: str,
    dtype: str,
    files: Mapping[str, FileDigest],
    source_digests: Mapping[Path, FileDigest],
    quantized: str | None = None,
) -> bytes:
    """Return the manifest of a task's checkpoint.

    Args:
        model: What it was made from.
        task: Of the checkpoint.
        dtype: Of its weights.
        files: Every other file in it, by name.
        source_digests: Every file that was read, by path.
        quantized: What the language model's matrices are instead of `dtype`: one of `quantize.KINDS`.
    """
    head = _head(task, dtype) | ({} if quantized is None else {"quantized": quantized})
    return checkpoint.json_bytes(head | facts(model, task) | _tail(model, task, files, source_digests))


def export_manifest(
    model: Model,
    part: str,
    task: str,
    dtype: str,
    files: Mapping[str, FileDigest],
    source_digests: Mapping[Path, FileDigest],
) -> bytes:
    """Return the manifest of an exported folder; its `part` tells it from a checkpoint's.

    Args:
        model: What it was made from.
        part: What it is: `base`, `adapter` or `gguf`.
        task: Of the folder; `base` for the base, which is of none.
        dtype: Of the base's, the adapter's or the GGUF file's weights.
        files: Every other file in it, by name.
        source_digests: Every file that was read, by path. Of adapters without a base, the base's files are not among
            them, and not named.
    """
    known = {"dimensions": checkpoint.dimensions(model.config)} if task == checkpoint.BASE else facts(model, task)
    return checkpoint.json_bytes(
        _head(task, dtype) | {"part": part} | known | _tail(model, task, files, source_digests)
    )


def _head(task: str, dtype: str) -> dict[str, Any]:
    return {"format": 1, "model": checkpoint.MODEL, "task": task, "dtype": dtype}


def _tail(
    model: Model, task: str, files: Mapping[str, FileDigest], source_digests: Mapping[Path, FileDigest]
) -> dict[str, Any]:
    def source(of: Source, names: Sequence[str]) -> dict[str, Any]:
        paths = {name: of.folder / name for name in sorted(names)}
        digests = {name: source_digests[path].as_json() for name, path in paths.items() if path in source_digests}
        return {"name": of.name, "revision": of.revision, "files": digests}

    sources = {"base": source(model.base, model.base_files)}
    if checkpoint.STANDIN_KEY in model.config:
        sources["base"][checkpoint.STANDIN_KEY] = model.config[checkpoint.STANDIN_KEY]
    if task != checkpoint.BASE:
        sources["adapters"] = source(model.adapter_source, model.adapters.files[task])
    return {
        "sources": sources,
        "tool": tool(),
        "files": {name: files[name].as_json() for name in sorted(files)},
    }


def facts(model: Model, task: str) -> dict[str, Any]:
    """Return what whoever embeds with a task's weights has to know: scaling, dimensions and prompts."""
    return {
        "scaling": scaling(model.adapters, task),
        "dimensions": checkpoint.dimensions(model.config),
        "prompts": text_prefixes(task),
        "image_prompt": IMAGE_PROMPT,
    }


def tool() -> dict[str, str]:
    """Return name and version of this program."""
    return {"name": _TOOL, "version": version(_TOOL)}


def require_replaceable(target: Path) -> None:
    """Check that what lies in the place of a checkpoint, if anything does, is a checkpoint that this program made.

    Raises:
        OutputError: it is something else.
    """
    if not target.exists() and not target.is_symlink():
        return
    try:
        found = {} if target.is_symlink() else read_json(target / checkpoint.MANIFEST_NAME)
    except MergeError:
        found = {}
    tool = found.get("tool")
    if found.get("model") != checkpoint.MODEL or not isinstance(tool, Mapping) or tool.get("name") != _TOOL:
        raise OutputError(
            f"{target} has no {checkpoint.MANIFEST_NAME} of {_TOOL}: it is none of its checkpoints, and --force does "
            "not replace it. Remove it or choose another place. Nothing was written"
        )


def scaling(adapters: Adapters, task: str) -> float | dict[str, Any]:
    """Return the one factor of a task's adapter, or where patterns in its config give others, all that differ."""
    default = adapters.configs[task].scaling
    others = {name: factor for name, factor in adapters.scalings[task].items() if factor != default}
    return {"default": default, "by_tensor": others} if others else default
