"""The manifest of a checkpoint or of an exported folder: what it is, what it was made from, every other file in it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jina_v4_merge.errors import MergeError, OutputError
from jina_v4_merge.files import FileDigest, json_bytes, read_json
from jina_v4_merge.prompts import IMAGE_PROMPT, text_prefixes
from jina_v4_merge.reading.configs import dimensions
from jina_v4_merge.reading.model import Model
from jina_v4_merge.reading.sources import Source
from jina_v4_merge.writing.checkpoint import BASE, MANIFEST_NAME, MODEL, STANDIN_KEY

_TOOL = "jina-v4-merge"


def manifest(
    model: Model,
    task: str,
    dtype: str,
    files: Mapping[str, FileDigest],
    source_digests: Mapping[Path, FileDigest],
    *,
    quantized: str | None = None,
    part: str | None = None,
) -> bytes:
    """Return the manifest of a folder.

    Args:
        model: What it was made from.
        task: Of the folder; `base` for an exported base, which is of none.
        dtype: Of its weights.
        files: Every other file in it, by name.
        source_digests: Every file that was read, by path. For adapters without a base, the base's files are not among
            them, and the manifest does not name them.
        quantized: What the language model's matrices are instead of `dtype`: one of `quantize.KINDS`.
        part: Of an export, which part this is: `base`, `adapter` or `gguf`. A checkpoint has none.
    """
    content: dict[str, Any] = {"format": 1, "model": MODEL, "task": task, "dtype": dtype}
    if quantized is not None:
        content["quantized"] = quantized
    if part is not None:
        content["part"] = part
    content |= {"dimensions": dimensions(model.config)} if task == BASE else facts(model, task)
    sources = {"base": _source(model.base, model.base_files, source_digests)}
    if STANDIN_KEY in model.config:
        sources["base"][STANDIN_KEY] = model.config[STANDIN_KEY]
    if task != BASE:
        sources["adapters"] = _source(model.adapter_source, model.adapters.files[task], source_digests)
    return json_bytes(
        content | {"sources": sources, "tool": tool(), "files": {name: asdict(files[name]) for name in sorted(files)}}
    )


def _source(source: Source, names: Sequence[str], digests: Mapping[Path, FileDigest]) -> dict[str, Any]:
    paths = {name: source.folder / name for name in sorted(names)}
    files = {name: asdict(digests[path]) for name, path in paths.items() if path in digests}
    return {"name": source.name, "revision": source.revision, "files": files}


def facts(model: Model, task: str) -> dict[str, Any]:
    """Return what a program that embeds with a task's weights needs: scaling, dimensions and prompts."""
    return {
        "scaling": _scaling(model, task),
        "dimensions": dimensions(model.config),
        "prompts": text_prefixes(task),
        "image_prompt": IMAGE_PROMPT,
    }


def _scaling(model: Model, task: str) -> float | dict[str, Any]:
    """Return the one factor of a task's adapter; where patterns in its config set others, all that differ too."""
    default = model.adapters.configs[task].scaling
    others = {name: factor for name, factor in model.adapters.scalings[task].items() if factor != default}
    return {"default": default, "by_tensor": others} if others else default


def tool() -> dict[str, str]:
    """Return name and version of this program."""
    return {"name": _TOOL, "version": version(_TOOL)}


def require_replaceable(target: Path) -> None:
    """Check that what is in the place of a checkpoint, if anything, is a checkpoint that this program made.

    Raises:
        OutputError: it is something else.
    """
    if not target.exists() and not target.is_symlink():
        return
    try:
        found = {} if target.is_symlink() else read_json(target / MANIFEST_NAME)
    except MergeError:
        found = {}
    made_by = found.get("tool")
    if found.get("model") != MODEL or not isinstance(made_by, Mapping) or made_by.get("name") != _TOOL:
        raise OutputError(
            f"{target} has no {MANIFEST_NAME} of {_TOOL}: it is none of its checkpoints, and --force does "
            "not replace it. Remove it or choose another place. Nothing was written"
        )
