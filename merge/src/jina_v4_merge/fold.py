"""Making the checkpoints: one pass over the base folds all tasks.

Everything that can be wrong with the inputs' layout is found from headers and configs, before anything is written.
What no adapter touches is written once and hard-linked into the other checkpoints. In memory there are a block of rows
of one base tensor, its folded forms, and the A and B that belong to it.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch

from jina_v4_merge import checkpoint, sources
from jina_v4_merge.adapters import Adapters, read_adapters
from jina_v4_merge.digests import FileDigest, read_digests, write_file
from jina_v4_merge.errors import ConfigError, WeightError, named
from jina_v4_merge.layout import PROJECTOR_BIAS, PROJECTOR_WEIGHT, Shape, adapter_name, base_shapes, check, is_adapted
from jina_v4_merge.lora import fold as fold_rows
from jina_v4_merge.progress import progress
from jina_v4_merge.prompts import TASKS
from jina_v4_merge.shards import DTYPES, MAX_SHARD_BYTES, Shard, ShardSeries, plan
from jina_v4_merge.staging import publish, require_absent, staging
from jina_v4_merge.threads import one_thread
from jina_v4_merge.weights import INDEX_NAME, StoredTensor, base_files, base_tensors


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was made."""

    task: str
    folder: Path
    n_bytes: int


@dataclass(frozen=True)
class _Base:
    """A base whose every tensor is accounted for."""

    source: sources.Source
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    adapters: Adapters
    small_files: Mapping[str, bytes]
    weight_files: Sequence[str]


def fold(
    base: str,
    out: Path,
    tasks: Sequence[str] = TASKS,
    dtype: str = "bfloat16",
    revision: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Checkpoint]:
    """Fold the adapters of some tasks into a base, and write a checkpoint for each.

    Args:
        base: A folder, or the name of a model on the hub.
        out: The folder in which the checkpoints' folders are made.
        tasks: Which of the base's tasks to fold.
        dtype: Of the weights written: bfloat16, float16 or float32.
        revision: Of a model on the hub.
        max_shard_bytes: Weights go on in another file above this.

    Returns:
        What was made, in the order of `tasks`.

    Raises:
        MergeError: one of its classes, and nothing is written.
    """
    folders = {task: f"{checkpoint.MODEL}-{task}" for task in tasks}
    require_absent([out / name for name in folders.values()])
    model = _open(sources.find(base, revision))
    absent = [task for task in folders if task not in model.adapters.scalings]
    if absent:
        raise ConfigError(f"{base} has no task {named(absent)}; it has {', '.join(model.adapters.scalings)}")
    plain_files = {task: checkpoint.plain_files(model.small_files, model.config, task, dtype) for task in folders}
    with staging(out) as stage, _hashing(model) as source_digests:
        staged = {task: stage / name for task, name in folders.items()}
        for folder in staged.values():
            folder.mkdir()
        weights = _write_weights(model, staged, DTYPES[dtype], max_shard_bytes)
        for task, folder in staged.items():
            files = weights[task] | {name: write_file(folder / name, held) for name, held in plain_files[task].items()}
            manifest = _manifest(model, task, dtype, files, source_digests())
            write_file(folder / checkpoint.MANIFEST_NAME, manifest)
        publish(list(staged.values()), out)
    return [
        Checkpoint(task, out / name, sum(file.stat().st_size for file in (out / name).iterdir()))
        for task, name in folders.items()
    ]


def _open(source: sources.Source) -> _Base:
    """Read all of a base but the values of its tensors, and account for every tensor."""
    config = sources.read_json(source.folder / sources.CONFIG_NAME)
    shapes = base_shapes(config)
    tensors = base_tensors(source.folder)
    check(source.name, {name: tensor.shape for name, tensor in tensors.items()}, shapes)
    return _Base(
        source,
        config,
        {name: tensors[name] for name in shapes},  # the same order, whatever the base's files have
        read_adapters(source.folder, checkpoint.task_names(config), shapes),
        sources.small_files(source.folder),
        base_files(source.folder),
    )


def _write_weights(
    model: _Base, folders: Mapping[str, Path], dtype: torch.dtype, max_shard_bytes: int
) -> dict[str, dict[str, FileDigest]]:
    """Write all weights and the index of each task's checkpoint; return the digests by task and file name."""
    shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
    projector = {name: shapes.pop(name) for name in (PROJECTOR_WEIGHT, PROJECTOR_BIAS)}
    common, own = _shards(shapes, dtype, max_shard_bytes)
    first = next(iter(folders.values()))
    with ExitStack() as stack:
        common_series = stack.enter_context(closing(ShardSeries(first, common, dtype)))
        own_series, projector_series = (
            {task: stack.enter_context(closing(ShardSeries(folder, files, dtype))) for task, folder in folders.items()}
            for files in (own, [(checkpoint.PROJECTOR_NAME, projector)])
        )
        stack.enter_context(one_thread())
        read = stack.enter_context(progress("fold", sum(tensor.n_bytes for tensor in model.tensors.values())))
        for name, tensor in model.tensors.items():
            if name == PROJECTOR_WEIGHT:
                _fold_tensor(model, name, projector_series, dtype)
            elif name == PROJECTOR_BIAS:
                _copy_tensor(tensor, name, list(projector_series.values()), dtype)
            elif is_adapted(name):
                _fold_tensor(model, name, own_series, dtype)
            else:
                _copy_tensor(tensor, name, [common_series], dtype)
            read(tensor.n_bytes)
    index = checkpoint.index(
        {name: file for file, shard_shapes in common + own for name in shard_shapes},
        sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize,
    )
    digests: dict[str, dict[str, FileDigest]] = {}
    for task, folder in folders.items():
        if folder is not first:
            for file in common_series.digests:
                _link(first / file, folder / file)
        digests[task] = common_series.digests | own_series[task].digests | projector_series[task].digests
        digests[task][INDEX_NAME] = write_file(folder / INDEX_NAME, index)
    return digests


def _shards(shapes: Mapping[str, Shape], dtype: torch.dtype, max_shard_bytes: int) -> tuple[list[Shard], list[Shard]]:
    """Cut the tensors into shards: those that all tasks have in common, and those of each task's own."""
    common = plan({name: shape for name, shape in shapes.items() if not is_adapted(name)}, dtype, max_shard_bytes)
    own = plan({name: shape for name, shape in shapes.items() if is_adapted(name)}, dtype, max_shard_bytes)
    n_shards = len(common) + len(own)
    shards: list[Shard] = [
        (f"model-{i:05}-of-{n_shards:05}.safetensors", held) for i, held in enumerate(common + own, 1)
    ]
    return shards[: len(common)], shards[len(common) :]


def _copy_tensor(tensor: StoredTensor, name: str, targets: Sequence[ShardSeries], dtype: torch.dtype) -> None:
    for _, block in tensor.row_blocks():
        content = block.to(dtype)
        _require_finite(content, name, {f"{name} of the base": block})
        for target in targets:
            target.append(name, content)


def _fold_tensor(model: _Base, name: str, targets: Mapping[str, ShardSeries], dtype: torch.dtype) -> None:
    pairs = {
        task: [model.adapters.tensors[adapter_name(task, name, side)].read().float() for side in "AB"]
        for task in targets
    }
    for rows, block in model.tensors[name].row_blocks():
        weight = block.float()
        for task, (a, b) in pairs.items():
            folded = fold_rows(weight, a, b[rows], model.adapters.scalings[task], dtype)
            inputs = {f"{name} of the base": weight, f"lora_A of {task}": a, f"lora_B of {task}": b}
            _require_finite(folded, f"{name} of {task}", inputs)
            targets[task].append(name, folded)


def _require_finite(content: torch.Tensor, name: str, inputs: Mapping[str, torch.Tensor]) -> None:
    if _is_finite(content):
        return
    for what, tensor in inputs.items():
        if not _is_finite(tensor):
            raise WeightError(f"{name}: {what} holds a value that is not finite; the base is damaged")
    raise WeightError(
        f"{name}: a value does not fit {content.dtype}; choose a --dtype of more range (bfloat16, float32)"
    )


def _is_finite(tensor: torch.Tensor) -> bool:
    # The extremes are NaN where any value is; 20 times as fast as asking each value.
    return all(math.isfinite(extreme.item()) for extreme in torch.aminmax(tensor))


def _manifest(
    model: _Base, task: str, dtype: str, files: Mapping[str, FileDigest], source_digests: Mapping[str, FileDigest]
) -> bytes:
    adapter_files = {name: source_digests[name].as_json() for name in sorted(model.adapters.files)}
    base_names = sorted(source_digests.keys() - adapter_files.keys())
    origin = {"name": model.source.name, "revision": model.source.revision}
    base = origin | {"files": {name: source_digests[name].as_json() for name in base_names}}
    if checkpoint.STANDIN_KEY in model.config:
        base[checkpoint.STANDIN_KEY] = model.config[checkpoint.STANDIN_KEY]
    sources_json = {"base": base, "adapters": origin | {"files": adapter_files}}
    return checkpoint.manifest(model.config, task, dtype, model.adapters.scalings[task], sources_json, files)


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # the file system has no hard links
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())


@contextmanager
def _hashing(model: _Base) -> Iterator[Callable[[], dict[str, FileDigest]]]:
    """Hash the files of the base beside the folding; what is given waits for the result."""
    names = [sources.CONFIG_NAME, *model.small_files, *model.weight_files, *model.adapters.files]
    stop = Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(read_digests, model.source.folder, names, stop).result
        finally:
            stop.set()
