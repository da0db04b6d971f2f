"""Making the checkpoints: one pass over the base folds all tasks.

Everything that can be wrong with the inputs' layout is found from headers and configs, before anything is written.
What no adapter touches is written once and hard-linked into the other checkpoints. In memory there are a few blocks of
rows of base tensors, their folded forms, and the A and B that belong to them.

One thread reads and folds, one a series of files hashes and writes: writing is the larger part of the work, and on two
cores two of three tasks are written while the third's rows are folded.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import torch

from jina_v4_merge import lora
from jina_v4_merge.errors import OutputError, WeightError, named
from jina_v4_merge.files import FileDigest, hashing, write_file
from jina_v4_merge.prompts import TASKS
from jina_v4_merge.quantize import quantize, scale_name, weight_name
from jina_v4_merge.reading.layout import PROJECTOR, PROJECTOR_BIAS, is_adapted, is_matrix
from jina_v4_merge.reading.model import Model, open_model
from jina_v4_merge.reading.weights import INDEX_NAME, damaged, is_finite, out_of_range
from jina_v4_merge.work import Lane, one_thread, progress
from jina_v4_merge.writing.checkpoint import MANIFEST_NAME, MODEL, PROJECTOR_NAME, plain_files
from jina_v4_merge.writing.filesystem import can_exchange, can_link, require_space
from jina_v4_merge.writing.manifest import manifest, require_replaceable
from jina_v4_merge.writing.shards import (
    DTYPES,
    MAX_SHARD_BYTES,
    Shard,
    ShardSeries,
    checkpoint_tensors,
    file_size,
    index,
    name_shards,
    plan,
)
from jina_v4_merge.writing.staging import Written, publish, require_absent, staging


def fold(
    base: str,
    out: Path,
    tasks: Sequence[str] = TASKS,
    dtype: str = "bfloat16",
    revision: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    adapters: str | None = None,
    adapters_revision: str | None = None,
    quantized: str | None = None,
    force: bool = False,
) -> list[Written]:
    """Fold the adapters of some tasks into a base, and write a checkpoint for each.

    Args:
        base: A folder, or the name of a model on the hub.
        out: The folder in which the checkpoints' folders are made.
        tasks: Which of the base's tasks to fold.
        dtype: Of the weights written: bfloat16, float16 or float32.
        revision: Of a base on the hub.
        max_shard_bytes: The largest weight file; a larger tensor has a file of its own.
        adapters: A folder, or the name of a model on the hub, of adapters that are not beside the base.
        adapters_revision: Of adapters on the hub.
        quantized: What the language model's matrices are written as instead of `dtype`: int8 or fp8.
        force: Replace checkpoints that are there already, each when its successor is whole.

    Returns:
        What was made, in the order of `tasks`.

    Raises:
        MergeError: one of its classes, and nothing is written.
    """
    folders = {task: f"{MODEL}-{task}" for task in tasks}
    targets = [out / name for name in folders.values()]
    if force:
        for target in targets:
            require_replaceable(target)
    else:
        require_absent(targets, ", add --force")
    model = open_model(base, revision, adapters, adapters_revision)
    model.require_tasks(folders)
    plain = {task: plain_files(model, task, dtype, quantized) for task in folders}
    weights = FoldedWeights(model, DTYPES[dtype], max_shard_bytes, quantized)
    with staging(out) as stage:
        links = can_link(stage)
        make_manifest = partial(manifest, model, dtype=dtype, quantized=quantized)
        require_space(out, _sizes(model, weights, plain, make_manifest, links))
        if force and any(map(Path.exists, targets)) and not can_exchange(stage):
            raise OutputError(
                f"{out}: folders cannot be replaced in one step on this file system; "
                f"remove {named([str(target) for target in targets if target.exists()])} or choose another place"
            )
        staged = {task: stage / name for task, name in folders.items()}
        for folder in staged.values():
            folder.mkdir()
        with hashing(model.files) as source_digests:
            files = weights.write(staged, links)
            digests = source_digests()
        for task, folder in staged.items():
            files[task] |= {name: write_file(folder / name, content) for name, content in plain[task].items()}
            write_file(folder / MANIFEST_NAME, make_manifest(task, files=files[task], source_digests=digests))
        model.require_unchanged()
        publish(list(staged.values()), out, require_replaceable if force else None)
    return [Written(task, out / name) for task, name in folders.items()]


def _sizes(
    model: Model,
    weights: "FoldedWeights",
    plain: Mapping[str, Mapping[str, bytes]],
    make_manifest: Callable[..., bytes],
    links: bool,
) -> list[int]:
    """Return the size of each file and folder that is going to be written, one that is hard-linked only once."""
    read = {path: FileDigest("0" * 64, path.stat().st_size) for path in model.files}
    sizes: list[int] = []
    for task, contents in plain.items():
        own = weights.sizes() | {name: len(content) for name, content in contents.items()}
        digests = {name: FileDigest("0" * 64, size) for name, size in own.items()}
        placeholder = make_manifest(task, files=digests, source_digests=read)  # as long as the true one
        if links and sizes:
            for name, _ in weights.common:
                del own[name]
        sizes += [1, len(placeholder), *own.values()]  # a folder takes one block
    return sizes


class FoldedWeights:
    """The weight files of checkpoints, planned from shapes alone and then written.

    Attributes:
        common: The shards that all tasks share.
        own: The shards that each task has of its own.
        projector: The file of the projector, which each task has of its own.
        index: The content of the index.
    """

    def __init__(self, model: Model, dtype: torch.dtype, max_shard_bytes: int, quantized: str | None = None) -> None:
        """Plan the files.

        Args:
            model: What is folded.
            dtype: Of the weights written.
            max_shard_bytes: Of a shard.
            quantized: What the language model's matrices are written as instead: one of `quantize.KINDS`.
        """
        self._model = model
        self._dtype = dtype
        self._quantized = quantized
        tensors = checkpoint_tensors({name: tensor.shape for name, tensor in model.tensors.items()}, dtype, quantized)
        self.projector: list[Shard] = [(PROJECTOR_NAME, {name: tensors.pop(name) for name in PROJECTOR})]
        own = {name: tensor for name, tensor in tensors.items() if is_adapted(weight_name(name))}
        common = {name: tensor for name, tensor in tensors.items() if name not in own}
        first, last = plan(common, max_shard_bytes), plan(own, max_shard_bytes)
        shards = name_shards(first + last)
        self.common, self.own = shards[: len(first)], shards[len(first) :]
        self.index = index(shards)

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of each file of one checkpoint."""
        shards = self.common + self.own + self.projector
        return {file: file_size(tensors) for file, tensors in shards} | {INDEX_NAME: len(self.index)}

    def write(self, folders: Mapping[str, Path], links: bool) -> dict[str, dict[str, FileDigest]]:
        """Write all files.

        Args:
            folders: Where to, by task.
            links: Hard-link the common shards into all folders but the first, rather than copy them.

        Returns:
            The digest of each file, by task and file name.

        Raises:
            WeightError: a value is not finite, or does not fit the dtype.
            SourceError: the base or an adapter cannot be read any more.
        """
        first, *others = folders.values()
        with ExitStack() as stack:

            def series(folder: Path, shards: Sequence[Shard]) -> ShardSeries:
                return stack.enter_context(closing(ShardSeries(folder, shards)))

            common = series(first, self.common)
            own = {task: series(folder, self.own) for task, folder in folders.items()}
            projector = {task: series(folder, self.projector) for task, folder in folders.items()}
            stack.enter_context(one_thread())
            lanes = {task: stack.enter_context(Lane()) for task in folders}  # done before the files are closed
            to_common = _appending(stack.enter_context(Lane()), common)
            to_own = {task: _appending(lane, own[task]) for task, lane in lanes.items()}
            to_projector = {task: _appending(lane, projector[task]) for task, lane in lanes.items()}
            read = stack.enter_context(progress("fold", sum(tensor.n_bytes for tensor in self._model.tensors.values())))
            for name, tensor in self._model.tensors.items():
                if name == PROJECTOR_BIAS:
                    self._copy(name, list(to_projector.values()))
                elif is_adapted(name):
                    self._fold(name, to_projector if name in PROJECTOR else to_own)
                else:
                    self._copy(name, [to_common])
                read(tensor.n_bytes)
        for folder in others:
            for file in common.digests:
                _link(first / file, folder / file, links)
        return {
            task: common.digests
            | own[task].digests
            | projector[task].digests
            | {INDEX_NAME: write_file(folder / INDEX_NAME, self.index)}
            for task, folder in folders.items()
        }

    def _copy(self, name: str, targets: Sequence["_Append"]) -> None:
        tensor = self._model.tensors[name]
        for _, block in tensor.row_blocks():
            content = block.to(self._dtype)
            if not is_finite(content):
                raise damaged([(tensor, block)]) or self._out_of_range(name)
            for append in targets:
                append(name, content)

    def _fold(self, name: str, targets: Mapping[str, "_Append"]) -> None:
        tensor = self._model.tensors[name]
        pairs = {task: self._model.lora(task, name) for task in targets}
        scales: dict[str, list[torch.Tensor]] = {task: [] for task in targets}
        for rows, block in tensor.row_blocks():
            weight = block.double()
            for task, (a, b, scaling) in pairs.items():
                stored = fold_block(name, weight, a, b[rows], scaling, self._dtype, self._quantized)
                *_, checked = stored.values()  # scales are finite where all values of their rows are
                if not is_finite(checked):
                    inputs = [(tensor, weight), *zip(self._model.adapters.pair(task, name), (a, b), strict=True)]
                    raise damaged(inputs) or self._out_of_range(f"{name} of {task}")
                targets[task](name, stored.pop(name))
                scales[task] += stored.values()
        for task, append in targets.items():
            if scales[task]:
                append(scale_name(name), torch.cat(scales[task]))  # (n_out, 1)

    def _out_of_range(self, name: str) -> WeightError:
        return out_of_range(name, str(self._dtype), "bfloat16, float32")


def fold_block(
    name: str,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    dtype: torch.dtype,
    quantized: str | None,
) -> dict[str, torch.Tensor]:
    """Return what a checkpoint has of some rows of an adapted tensor, by name; a quantized matrix's scales come last.

    Args:
        name: Published.
        weight: The base's rows, (n_rows, n_in).
        a: (rank, n_in).
        b: The same rows, (n_rows, rank).
        scaling: The factor on `b @ a`.
        dtype: Of what is not quantized.
        quantized: What the language model's matrices are instead: one of `quantize.KINDS`.
    """
    if quantized is None or not is_matrix(name):
        return {name: lora.fold(weight, a, b, scaling, dtype)}
    values, scales = quantize(lora.fold(weight, a, b, scaling, torch.float64), quantized)
    return {name: values, scale_name(name): scales}


_Append = Callable[[str, torch.Tensor], object]


def _appending(lane: Lane, series: ShardSeries) -> _Append:
    """Return a function that appends rows of a tensor to a series of files, in a lane."""
    return lambda name, rows: lane.do(partial(series.append, name, rows))


def _link(source: Path, target: Path, links: bool) -> None:
    if links:
        target.hardlink_to(source)
        return
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
