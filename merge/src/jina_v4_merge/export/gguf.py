"""Writing a task's folded language model for llama.cpp: a GGUF file, and the task's projector beside it.

Every matrix is the float64 sum of base and adapter, rounded or quantized once; there is no rounded checkpoint between.
The folder has a manifest, as checkpoints have. The projector is a file of its own because llama.cpp has no place for
it: for multi-vectors a program multiplies the rows of all tokens with it.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from jina_v4_merge import lora
from jina_v4_merge.errors import ConfigError, WeightError
from jina_v4_merge.export.adapters import projector_bytes
from jina_v4_merge.files import hashing, write_file
from jina_v4_merge.reading.configs import TOKENIZER_NAME
from jina_v4_merge.reading.layout import is_adapted, is_language_model
from jina_v4_merge.reading.model import Model, open_model
from jina_v4_merge.reading.weights import damaged
from jina_v4_merge.work import one_thread, progress
from jina_v4_merge.writing.checkpoint import GGUF, MANIFEST_NAME, MODEL, PROJECTOR_NAME, STANDIN_KEY, gguf_name
from jina_v4_merge.writing.filesystem import require_space
from jina_v4_merge.writing.manifest import facts, manifest, tool
from jina_v4_merge.writing.staging import Written, publish, require_absent, staging

_HEAD_BYTES = 16 << 20  # the real vocabulary takes 6 MB, the manifest some KB


def export_gguf(
    base: str,
    out: Path,
    task: str,
    dtype: str = "bf16",
    revision: str | None = None,
    *,
    adapters: str | None = None,
    adapters_revision: str | None = None,
) -> Written:
    """Write a task's language model as a GGUF file, in a folder with its projector and a manifest.

    Args:
        base: A folder, or the name of a model on the hub.
        out: The folder that is made; must not exist yet.
        task: Whose adapter is folded.
        dtype: Of the matrices: one of `writing.checkpoint.GGUF_DTYPES`. Norms and biases are float32.
        revision: Of a base on the hub.
        adapters: A folder, or the name of a model on the hub, of adapters that are not beside the base.
        adapters_revision: Of adapters on the hub.

    Raises:
        MergeError: one of its classes, and nothing is written.
    """
    try:
        from jina_v4_merge.export.gguf_file import GgufFile
        from jina_v4_merge.export.gguf_tokenizer import gguf_tokenizer
    except ImportError as error:
        raise ConfigError(
            f"a GGUF file is written with the gguf package, which cannot be imported here ({error}): "
            "install jina-v4-merge[gguf]"
        ) from error
    require_absent([out])
    model = open_model(base, revision, adapters, adapters_revision)
    model.require_tasks([task])
    tensors = {name: tensor for name, tensor in model.tensors.items() if is_language_model(name)}
    file = GgufFile(
        model.config,
        gguf_tokenizer(model.base.folder / TOKENIZER_NAME, model.small_files, model.config),
        {name: tensor.shape for name, tensor in tensors.items()},
        dtype,
        _about(model, task),
    )
    name, projector = gguf_name(task, dtype), projector_bytes(model, task)
    with staging(out.parent) as stage, one_thread():
        require_space(out.parent, [1, file.n_value_bytes + _HEAD_BYTES, len(projector)])
        folder = stage / out.name
        folder.mkdir()
        n_bytes = sum(tensor.n_bytes for tensor in tensors.values())
        with hashing(model.files) as source_digests, progress("gguf", n_bytes) as read:

            def blocks(name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
                yield from _folded_blocks(model, task, name, dtype)
                read(tensors[name].n_bytes)

            files = {
                name: file.write(folder / name, blocks, partial(_damage, model, task)),
                PROJECTOR_NAME: write_file(folder / PROJECTOR_NAME, projector),
            }
            digests = source_digests()
        write_file(folder / MANIFEST_NAME, manifest(model, task, dtype, files, digests, part=GGUF))
        model.require_unchanged()
        publish([folder], out.parent)
    return Written(task, out)


def _folded_blocks(model: Model, task: str, name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Yield the rows of a tensor, with the task's adapter if it has one, some at a time, rounded once."""
    if not is_adapted(name):
        yield from (block.to(dtype) for _, block in model.tensors[name].row_blocks())
        return
    a, b, scaling = model.lora(task, name)
    for rows, block in model.tensors[name].row_blocks():
        yield lora.fold(block, a, b[rows], scaling, dtype)


def _damage(model: Model, task: str, name: str) -> WeightError | None:
    """Return the error for the first of a tensor and its adapter that holds a value that is not finite."""
    pair = model.adapters.pair(task, name) if is_adapted(name) else ()
    return damaged([(tensor, tensor.read()) for tensor in (model.tensors[name], *pair)])


def _about(model: Model, task: str) -> dict[str, Any]:
    """Return the metadata that llama.cpp does not read itself: name, task, prompts, scaling, sources."""
    sources = {"base": model.base, "adapters": model.adapter_source}
    said = {key: {"name": source.name, "revision": source.revision} for key, source in sources.items()}
    known = facts(model, task)
    about = {
        "general.name": f"{MODEL} {task}",
        "jina_v4.task": task,
        "jina_v4.prompt.query": known["prompts"]["query"],
        "jina_v4.prompt.passage": known["prompts"]["passage"],
        "jina_v4.image_prompt": known["image_prompt"],
        "jina_v4.dimensions": known["dimensions"],
        "jina_v4.scaling": _json_line(known["scaling"]),
        "jina_v4.sources": _json_line(said),
        "jina_v4.tool": _json_line(tool()),
    }
    if STANDIN_KEY in model.config:
        about["jina_v4.standin"] = _json_line(model.config[STANDIN_KEY])
    return about


def _json_line(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False)
