"""Folding all weights of a model and writing them, for several tasks at once.

One thread reads and folds, one a series of files hashes and writes: writing is the larger part of the work, and on two
cores two of three tasks are written while the third's rows are folded.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from jina_v4_merge import checkpoint
from jina_v4_merge.digests import FileDigest, write_file
from jina_v4_merge.errors import WeightError
from jina_v4_merge.finite import damaged, is_finite, out_of_range
from jina_v4_merge.lanes import Lane
from jina_v4_merge.layout import PROJECTOR_BIAS, PROJECTOR_WEIGHT, adapter_name, is_adapted
from jina_v4_merge.lora import fold as fold_rows
from jina_v4_merge.model import Model
from jina_v4_merge.progress import progress
from jina_v4_merge.quantize import quantize, scale_name, weight_name
from jina_v4_merge.shards import Planned, Shard, ShardSeries, checkpoint_tensors, file_size, plan
from jina_v4_merge.threads import one_thread
from jina_v4_merge.weights import INDEX_NAME


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
        projector = {name: tensors.pop(name) for name in (PROJECTOR_WEIGHT, PROJECTOR_BIAS)}
        self.common, self.own = _shards(tensors, max_shard_bytes)
        self.projector: list[Shard] = [(checkpoint.PROJECTOR_NAME, projector)]
        self.index = checkpoint.index(
            {name: file for file, held in self.common + self.own for name in held},
            sum(tensor.n_bytes for tensor in tensors.values()),
        )

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
            common_target = _Target(stack.enter_context(Lane()), common)
            own_targets, projector_targets = (
                {task: _Target(lane, held[task]) for task, lane in lanes.items()} for held in (own, projector)
            )
            read = stack.enter_context(progress("fold", sum(tensor.n_bytes for tensor in self._model.tensors.values())))
            for name, tensor in self._model.tensors.items():
                if name == PROJECTOR_BIAS:
                    self._copy(name, list(projector_targets.values()))
                elif name == PROJECTOR_WEIGHT:
                    self._fold(name, projector_targets)
                elif is_adapted(name):
                    self._fold(name, own_targets, self._quantized)
                else:
                    self._copy(name, [common_target])
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

    def _copy(self, name: str, targets: Sequence["_Target"]) -> None:
        tensor = self._model.tensors[name]
        for _, block in tensor.row_blocks():
            content = block.to(self._dtype)
            if not is_finite(content):
                raise damaged([(tensor, block)]) or self._out_of_range(name)
            for target in targets:
                target.append(name, content)

    def _fold(self, name: str, targets: Mapping[str, "_Target"], quantized: str | None = None) -> None:
        tensor, adapters = self._model.tensors[name], self._model.adapters
        pairs = {task: self._model.lora(task, name) for task in targets}
        scales: dict[str, list[torch.Tensor]] = {task: [] for task in targets}
        for rows, block in tensor.row_blocks():
            weight = block.double()
            for task, (a, b, scaling) in pairs.items():
                folded = fold_rows(weight, a, b[rows], scaling, self._dtype if quantized is None else torch.float64)
                checked = folded
                if quantized is not None:
                    folded, checked = quantize(folded, quantized)
                    scales[task].append(checked)
                if not is_finite(checked):
                    sides = [adapters.tensors[adapter_name(task, name, side)] for side in "AB"]
                    inputs = [(tensor, weight), *zip(sides, (a, b), strict=True)]
                    raise damaged(inputs) or self._out_of_range(f"{name} of {task}")
                targets[task].append(name, folded)
        if quantized is not None:
            for task, target in targets.items():
                target.append(scale_name(name), torch.cat(scales[task]))  # (n_out, 1)

    def _out_of_range(self, name: str) -> WeightError:
        return out_of_range(name, str(self._dtype), "bfloat16, float32")


@dataclass(frozen=True)
class _Target:
    """Files that are written in a lane."""

    lane: Lane
    series: ShardSeries

    def append(self, name: str, rows: torch.Tensor) -> None:
        self.lane.do(partial(self.series.append, name, rows))


def _shards(tensors: Mapping[str, Planned], max_shard_bytes: int) -> tuple[list[Shard], list[Shard]]:
    """Cut the tensors into shards: those that all tasks have in common, and those of each task's own."""
    own = {name: tensor for name, tensor in tensors.items() if is_adapted(weight_name(name))}
    common = {name: tensor for name, tensor in tensors.items() if name not in own}
    first, last = plan(common, max_shard_bytes), plan(own, max_shard_bytes)
    n_shards = len(first) + len(last)
    shards: list[Shard] = [
        (f"model-{i:05}-of-{n_shards:05}.safetensors", held) for i, held in enumerate(first + last, 1)
    ]
    return shards[: len(first)], shards[len(first) :]


def _link(source: Path, target: Path, links: bool) -> None:
    if links:
        target.hardlink_to(source)
        return
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
