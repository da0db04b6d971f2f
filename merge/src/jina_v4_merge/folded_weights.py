"""Folding all weights of a model and writing them, for several tasks at once.

One thread reads and folds, one a series of files hashes and writes: writing is the larger part of the work, and on two
cores two of three tasks are written while the third's rows are folded.
"""

import math
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
from jina_v4_merge.layout import PROJECTOR_BIAS, PROJECTOR_WEIGHT, Shape, adapter_name, is_adapted
from jina_v4_merge.lora import fold as fold_rows
from jina_v4_merge.model import Model
from jina_v4_merge.progress import progress
from jina_v4_merge.shards import Shard, ShardSeries, file_size, plan
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

    def __init__(self, model: Model, dtype: torch.dtype, max_shard_bytes: int) -> None:
        """Plan the files."""
        shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
        projector = {name: shapes.pop(name) for name in (PROJECTOR_WEIGHT, PROJECTOR_BIAS)}
        self._model = model
        self._dtype = dtype
        self.common, self.own = _shards(shapes, dtype, max_shard_bytes)
        self.projector: list[Shard] = [(checkpoint.PROJECTOR_NAME, projector)]
        self.index = checkpoint.index(
            {name: file for file, shard_shapes in self.common + self.own for name in shard_shapes},
            sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize,
        )

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of each file of one checkpoint."""
        shards = self.common + self.own + self.projector
        return {file: file_size(shapes, self._dtype) for file, shapes in shards} | {INDEX_NAME: len(self.index)}

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
                return stack.enter_context(closing(ShardSeries(folder, shards, self._dtype)))

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
                elif is_adapted(name):
                    self._fold(name, projector_targets if name == PROJECTOR_WEIGHT else own_targets)
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

    def _fold(self, name: str, targets: Mapping[str, "_Target"]) -> None:
        tensor, adapters = self._model.tensors[name], self._model.adapters
        pairs = {task: self._model.lora(task, name) for task in targets}
        for rows, block in tensor.row_blocks():
            weight = block.double()
            for task, (a, b, scaling) in pairs.items():
                folded = fold_rows(weight, a, b[rows], scaling, self._dtype)
                if not is_finite(folded):
                    sides = [adapters.tensors[adapter_name(task, name, side)] for side in "AB"]
                    inputs = [(tensor, weight), *zip(sides, (a, b), strict=True)]
                    raise damaged(inputs) or self._out_of_range(f"{name} of {task}")
                targets[task].append(name, folded)

    def _out_of_range(self, name: str) -> WeightError:
        return out_of_range(name, str(self._dtype), "bfloat16, float32")


@dataclass(frozen=True)
class _Target:
    """Files that are written in a lane."""

    lane: Lane
    series: ShardSeries

    def append(self, name: str, rows: torch.Tensor) -> None:
        self.lane.do(partial(self.series.append, name, rows))


def _shards(shapes: Mapping[str, Shape], dtype: torch.dtype, max_shard_bytes: int) -> tuple[list[Shard], list[Shard]]:
    """Cut the tensors into shards: those that all tasks have in common, and those of each task's own."""
    common = plan({name: shape for name, shape in shapes.items() if not is_adapted(name)}, dtype, max_shard_bytes)
    own = plan({name: shape for name, shape in shapes.items() if is_adapted(name)}, dtype, max_shard_bytes)
    n_shards = len(common) + len(own)
    shards: list[Shard] = [
        (f"model-{i:05}-of-{n_shards:05}.safetensors", held) for i, held in enumerate(common + own, 1)
    ]
    return shards[: len(common)], shards[len(common) :]


def _link(source: Path, target: Path, links: bool) -> None:
    if links:
        target.hardlink_to(source)
        return
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
