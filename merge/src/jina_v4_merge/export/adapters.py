"""Writing the task adapters as ordinary PEFT adapters, for those who would rather keep one base than three checkpoints.

A folder a task: `adapter_config.json` and `adapter_model.safetensors` under the names that PEFT and vLLM know, and the
task's projector, folded, in a file of its own. The projector is no part of the stock model, so that no loader of
adapters could put its adapter anywhere. Each folder has a manifest, as checkpoints have.
"""

import math
from collections.abc import Sequence
from contextlib import closing
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from jina_v4_merge import lora
from jina_v4_merge.files import FileDigest, hashing, json_bytes, write_file
from jina_v4_merge.prompts import TASKS
from jina_v4_merge.reading.adapters import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from jina_v4_merge.reading.layout import PROJECTOR, PROJECTOR_BIAS, PROJECTOR_WEIGHT, is_matrix, module_name, peft_name
from jina_v4_merge.reading.model import Model, open_model
from jina_v4_merge.reading.weights import INDEX_NAME, StoredTensor, damaged, is_finite, out_of_range
from jina_v4_merge.work import one_thread, progress
from jina_v4_merge.writing.checkpoint import ADAPTER, BASE, MANIFEST_NAME, PROJECTOR_NAME, plain_files
from jina_v4_merge.writing.filesystem import require_space
from jina_v4_merge.writing.manifest import manifest
from jina_v4_merge.writing.shards import (
    MAX_SHARD_BYTES,
    Shard,
    ShardSeries,
    file_size,
    index,
    name_shards,
    plan,
    planned,
)
from jina_v4_merge.writing.staging import Written, publish, require_absent, staging

# The language model's layers by their names in transformers; the vision tower has layers of the same last names.
_TARGETS = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"

_SMALL_FILES_BYTES = 1 << 20  # of a folder: adapter config, index, manifest; too much on purpose


def export_adapters(
    base: str,
    out: Path,
    tasks: Sequence[str] = TASKS,
    revision: str | None = None,
    *,
    adapters: str | None = None,
    adapters_revision: str | None = None,
    with_base: bool = False,
) -> list[Written]:
    """Write the adapters of some tasks as PEFT adapters, a folder for each task.

    Args:
        base: A folder, or the name of a model on the hub.
        out: The folder in which the adapters' folders are made.
        tasks: Which of the base's tasks to export; a task that comes twice is exported once.
        revision: Of a base on the hub.
        adapters: A folder, or the name of a model on the hub, of adapters that are not beside the base.
        adapters_revision: Of adapters on the hub.
        with_base: Write the base as well, as a stock checkpoint without any adapter, in a folder `base`.

    Returns:
        What was made, in the order of `tasks`, then the base.

    Raises:
        MergeError: one of its classes, and nothing is written.
    """
    tasks = list(dict.fromkeys(tasks))
    names = [*tasks, *([BASE] if with_base else [])]
    require_absent([out / name for name in names])
    model = open_model(base, revision, adapters, adapters_revision)
    model.require_tasks(tasks)
    sources = model.files if with_base else model.files[len(model.base_files) :]  # 8 GB to read for nothing
    with staging(out) as stage, one_thread():
        require_space(out, _sizes(model, tasks, with_base))
        for name in names:
            (stage / name).mkdir()
        with hashing(sources) as source_digests:
            files = {task: _write_adapter(model, task, stage / task) for task in tasks}
            if with_base:
                files[BASE] = _write_base(model, stage / BASE)
            digests = source_digests()
        for name in names:
            part = BASE if name == BASE else ADAPTER
            dtype = _dtype_name(_base_dtype(model) if name == BASE else _adapter_dtype(model, name))
            content = manifest(model, name, dtype, files[name], digests, part=part)
            write_file(stage / name / MANIFEST_NAME, content)
        model.require_unchanged()
        publish([stage / name for name in names], out)
    return [Written(name, out / name) for name in names]


def peft_config(model: Model, task: str) -> dict[str, Any]:
    """Return the adapter_config.json of an exported adapter.

    A module whose rank or alpha differs from the rest has an entry under its own full name: the patterns of the
    adapter's own config are about the names in its file, and might match other modules here.
    """
    config = model.adapters.configs[task]
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name in filter(is_matrix, model.tensors):
        rank = model.adapters.pair(task, name)[0].shape[0]
        alpha = model.adapters.scalings[task][name] * (math.sqrt(rank) if config.use_rslora else rank)
        if rank != config.rank:
            ranks[module_name(name)] = rank
        if not math.isclose(alpha, config.alpha, rel_tol=1e-9):
            alphas[module_name(name)] = alpha
    return {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": model.base.name,
        "revision": model.base.revision,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.use_rslora,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": _TARGETS,
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_dropout": 0.0,
    }


def projector_bytes(model: Model, task: str) -> bytes:
    """Return a task's folded projector as a safetensors file, in float32."""
    stored = [model.tensors[name] for name in (PROJECTOR_WEIGHT, PROJECTOR_BIAS)]
    weight, bias = (tensor.read().float() for tensor in stored)
    folded = lora.fold(weight, *model.lora(task, PROJECTOR_WEIGHT), torch.float32)  # (projector dim, hidden)
    if not (is_finite(folded) and is_finite(bias)):
        raise damaged(list(zip(stored, (weight, bias), strict=True))) or out_of_range(
            PROJECTOR_WEIGHT, "float32", "none"
        )
    return save({PROJECTOR_WEIGHT: folded, PROJECTOR_BIAS: bias}, {"format": "pt"})


def _write_adapter(model: Model, task: str, folder: Path) -> dict[str, FileDigest]:
    """Write all of an adapter's folder but the manifest; return the digest of every file."""
    dtype = _adapter_dtype(model, task)
    tensors = {name: _finite(tensor, tensor.read()).to(dtype) for name, tensor in _adapter_tensors(model, task).items()}
    return {
        ADAPTER_WEIGHTS_NAME: write_file(folder / ADAPTER_WEIGHTS_NAME, save(tensors, {"format": "pt"})),
        PROJECTOR_NAME: write_file(folder / PROJECTOR_NAME, projector_bytes(model, task)),
        ADAPTER_CONFIG_NAME: write_file(folder / ADAPTER_CONFIG_NAME, json_bytes(peft_config(model, task))),
    }


def _write_base(model: Model, folder: Path) -> dict[str, FileDigest]:
    """Write a base as a stock checkpoint: its own weights, and what plain transformers and vLLM read beside them.

    Returns:
        The digest of every file.
    """
    dtype = _base_dtype(model)
    tensors = {name: tensor for name, tensor in model.tensors.items() if name not in PROJECTOR}
    shards = _base_shards(model)
    n_bytes = sum(tensor.n_bytes for tensor in tensors.values())
    with closing(ShardSeries(folder, shards)) as series, progress("base", n_bytes) as read:
        for name, tensor in tensors.items():
            for _, block in tensor.row_blocks():
                series.append(name, _finite(tensor, block).to(dtype))
                read(block.nbytes)
    contents = plain_files(model, None, _dtype_name(dtype)) | {INDEX_NAME: index(shards)}
    return series.digests | {name: write_file(folder / name, content) for name, content in contents.items()}


def _sizes(model: Model, tasks: Sequence[str], with_base: bool) -> list[int]:
    """Return the size of each folder and file that is going to be written, the small ones in a sum that is too high."""
    sizes: list[int] = []
    projector = planned({name: model.tensors[name].shape for name in PROJECTOR}, torch.float32)
    for task in tasks:
        shapes = {name: tensor.shape for name, tensor in _adapter_tensors(model, task).items()}
        sizes += [1, file_size(planned(shapes, _adapter_dtype(model, task))), file_size(projector), _SMALL_FILES_BYTES]
    if with_base:
        plain = plain_files(model, None, _dtype_name(_base_dtype(model)))
        sizes += [1, *map(len, plain.values()), _SMALL_FILES_BYTES]
        sizes += [file_size(tensors) for _, tensors in _base_shards(model)]
    return sizes


def _adapter_tensors(model: Model, task: str) -> dict[str, StoredTensor]:
    """Return the tensors of a task's adapter, without the projector's, by their names in PEFT."""
    return {
        peft_name(name, side): tensor
        for name in filter(is_matrix, model.tensors)
        for side, tensor in zip("AB", model.adapters.pair(task, name), strict=True)
    }


def _base_shards(model: Model) -> list[Shard]:
    shapes = {name: tensor.shape for name, tensor in model.tensors.items() if name not in PROJECTOR}
    return name_shards(plan(planned(shapes, _base_dtype(model)), MAX_SHARD_BYTES))


def _finite(stored: StoredTensor, values: torch.Tensor) -> torch.Tensor:
    """Return the values of a tensor that are all finite.

    Raises:
        WeightError: one is not.
    """
    if (error := damaged([(stored, values)])) is not None:
        raise error
    return values


def _base_dtype(model: Model) -> torch.dtype:
    """Return the dtype that holds all of the base's values as they are."""
    return reduce(
        torch.promote_types, (tensor.dtype for name, tensor in model.tensors.items() if name not in PROJECTOR)
    )


def _adapter_dtype(model: Model, task: str) -> torch.dtype:
    """Return the dtype that holds all values of a task's adapter as they are."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in _adapter_tensors(model, task).values()))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
