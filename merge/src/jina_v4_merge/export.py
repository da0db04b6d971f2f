"""Writing the task adapters as ordinary PEFT adapters, for those who would rather keep one base than three checkpoints.

A folder a task: `adapter_config.json` and `adapter_model.safetensors` under the names that PEFT and vLLM know, and the
task's projector, folded, in a file of its own. The projector is no part of the stock model, so that no loader of
adapters could put its adapter anywhere. Each folder has a manifest, as checkpoints have.
"""

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from jina_v4_merge import checkpoint, provenance
from jina_v4_merge.adapters import CONFIG_NAME, WEIGHTS_NAME
from jina_v4_merge.digests import FileDigest, hashing, write_file
from jina_v4_merge.exported import file_name
from jina_v4_merge.finite import damaged, is_finite, out_of_range
from jina_v4_merge.layout import PROJECTOR, PROJECTOR_BIAS, PROJECTOR_WEIGHT, adapter_name, is_matrix, module_name
from jina_v4_merge.lora import fold as fold_rows
from jina_v4_merge.model import Model, open_model
from jina_v4_merge.progress import progress
from jina_v4_merge.prompts import TASKS
from jina_v4_merge.shards import MAX_SHARD_BYTES, Shard, ShardSeries, plan, planned
from jina_v4_merge.staging import publish, require_absent, staging
from jina_v4_merge.threads import one_thread
from jina_v4_merge.weights import INDEX_NAME, StoredTensor

# The language model's layers by their names in transformers; the vision tower has layers of the same last names.
_TARGETS = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


@dataclass(frozen=True)
class Exported:
    """A folder that was made."""

    folder: Path
    n_bytes: int


def export_adapters(
    base: str,
    out: Path,
    tasks: Sequence[str] = TASKS,
    revision: str | None = None,
    *,
    adapters: str | None = None,
    adapters_revision: str | None = None,
    with_base: bool = False,
) -> list[Exported]:
    """Write the adapters of some tasks as PEFT adapters, a folder named after each task.

    Args:
        base: A folder, or the name of a model on the hub.
        out: The folder in which the adapters' folders are made.
        tasks: Which of the base's tasks to export; one that is named twice is exported once.
        revision: Of a base on the hub.
        adapters: A folder, or the name of a model on the hub, of adapters that do not lie beside the base.
        adapters_revision: Of adapters on the hub.
        with_base: Write the base as well, as a stock checkpoint without any adapter, in a folder `base`.

    Returns:
        What was made, in the order of `tasks`, then the base.

    Raises:
        MergeError: one of its classes, and nothing is written.
    """
    tasks = list(dict.fromkeys(tasks))
    names = [*tasks, *([checkpoint.BASE] if with_base else [])]
    require_absent([out / name for name in names])
    model = open_model(base, revision, adapters, adapters_revision)
    model.require_tasks(tasks)
    sources = model.files if with_base else model.files[len(model.base_files) :]  # 8 GB to read for nothing
    with staging(out) as stage, one_thread():
        for name in names:
            (stage / name).mkdir()
        with hashing(sources) as source_digests:
            files = {task: _write_adapter(model, task, stage / task) for task in tasks}
            if with_base:
                files[checkpoint.BASE] = _write_base(model, stage / checkpoint.BASE)
            digests = source_digests()
        for name in names:
            part = checkpoint.BASE if name == checkpoint.BASE else checkpoint.ADAPTER
            dtype = _dtype_name(_base_dtype(model) if name == checkpoint.BASE else _adapter_dtype(model, name))
            manifest = provenance.export_manifest(model, part, name, dtype, files[name], digests)
            write_file(stage / name / checkpoint.MANIFEST_NAME, manifest)
        model.require_unchanged()
        publish([stage / name for name in names], out)
    return [Exported(out / name, sum(file.stat().st_size for file in (out / name).iterdir())) for name in names]


def peft_config(model: Model, task: str) -> dict[str, Any]:
    """Return the adapter_config.json of an exported adapter.

    Rank and alpha of a module that differs from the rest stand under its own name: patterns over the names that the
    module had elsewhere might mean others here.
    """
    config = model.adapters.configs[task]
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name in filter(is_matrix, model.tensors):
        rank = model.adapters.tensors[adapter_name(task, name, "A")].shape[0]
        alpha = model.adapters.scaling(task, name) * (math.sqrt(rank) if config.use_rslora else rank)
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
    folded = fold_rows(weight, *model.lora(task, PROJECTOR_WEIGHT), torch.float32)  # (projector dim, hidden)
    if not (is_finite(folded) and is_finite(bias)):
        raise damaged(list(zip(stored, (weight, bias), strict=True))) or out_of_range(
            PROJECTOR_WEIGHT, "float32", "none"
        )
    return save({PROJECTOR_WEIGHT: folded, PROJECTOR_BIAS: bias}, {"format": "pt"})


def _write_adapter(model: Model, task: str, folder: Path) -> dict[str, FileDigest]:
    """Write all of an adapter's folder but the manifest; return the digest of every file."""
    dtype = _adapter_dtype(model, task)
    tensors = {
        file_name(name, side): _finite(tensor, tensor.read()).to(dtype)
        for name in filter(is_matrix, model.tensors)
        for side in "AB"
        for tensor in [model.adapters.tensors[adapter_name(task, name, side)]]
    }
    return {
        WEIGHTS_NAME: write_file(folder / WEIGHTS_NAME, save(tensors, {"format": "pt"})),
        checkpoint.PROJECTOR_NAME: write_file(folder / checkpoint.PROJECTOR_NAME, projector_bytes(model, task)),
        CONFIG_NAME: write_file(folder / CONFIG_NAME, checkpoint.json_bytes(peft_config(model, task))),
    }


def _write_base(model: Model, folder: Path) -> dict[str, FileDigest]:
    """Write a base as a stock checkpoint: its own weights, and what plain transformers and vLLM read beside them.

    Returns:
        The digest of every file.
    """
    shapes = {name: tensor.shape for name, tensor in model.tensors.items() if name not in PROJECTOR}
    dtype = _base_dtype(model)
    parts = plan(planned(shapes, dtype), MAX_SHARD_BYTES)
    shards: list[Shard] = [(f"model-{i:05}-of-{len(parts):05}.safetensors", part) for i, part in enumerate(parts, 1)]
    n_bytes = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    with closing(ShardSeries(folder, shards)) as series, progress("base", n_bytes) as written:
        for name in shapes:
            for _, block in model.tensors[name].row_blocks():
                series.append(name, _finite(model.tensors[name], block).to(dtype))
                written(block.nbytes)
    files = dict(series.digests)
    weight_map = {name: file for file, part in shards for name in part}
    files[INDEX_NAME] = write_file(folder / INDEX_NAME, checkpoint.index(weight_map, n_bytes))
    # Prompts are a task's; the rest is the same for every task.
    plain = checkpoint.plain_files(model.small_files, model.config, TASKS[0], _dtype_name(dtype))
    for name, content in plain.items():
        if name != checkpoint.PROMPTS_NAME:
            files[name] = write_file(folder / name, content)
    return files


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
    return reduce(
        torch.promote_types,
        (
            model.adapters.tensors[adapter_name(task, name, side)].dtype
            for name in filter(is_matrix, model.tensors)
            for side in "AB"
        ),
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
