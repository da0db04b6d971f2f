"""Folding the base once more and comparing checkpoints with the result: every tensor bit by bit, every small file.

Nothing is written, and a few blocks of rows are in memory. The sums of a fold are the same for the same blocks of rows,
so a difference is one of the inputs, the checkpoint or the tool, never of rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from jina_v4_merge.fold import fold_block
from jina_v4_merge.quantize import weight_name
from jina_v4_merge.reading.layout import is_adapted
from jina_v4_merge.reading.model import Model
from jina_v4_merge.verify.checks import Verified
from jina_v4_merge.work import one_thread, progress, workers
from jina_v4_merge.writing.checkpoint import MANIFEST_NAME, plain_files
from jina_v4_merge.writing.manifest import facts
from jina_v4_merge.writing.shards import DTYPES


@dataclass
class Compared:
    """How a checkpoint compares with a second folding of the base.

    Attributes:
        checkpoint: With its tensors read; what differs is added to its problems.
        n_folded: How many folded tensors are equal.
        n_copied: How many others are equal.
        differing: The names of the others.
    """

    checkpoint: Verified
    n_folded: int = 0
    n_copied: int = 0
    differing: list[str] = field(default_factory=list)


def compare(model: Model, checkpoints: Sequence[Verified]) -> list[Compared]:
    """Fold a base once more and compare.

    Args:
        model: The base and its adapters.
        checkpoints: Of which all tensors could be read.

    Raises:
        SourceError: the base cannot be read any more.
    """
    compared = [Compared(checkpoint) for checkpoint in checkpoints if _is_comparable(model, checkpoint)]
    for each in compared:
        _compare_files(model, each.checkpoint)
    with one_thread(), workers() as pool:
        found = pool.map(lambda name: _equal(model, name, compared), model.tensors)
        with progress("refold", sum(tensor.n_bytes for tensor in model.tensors.values())) as read:
            for (name, tensor), equal in zip(model.tensors.items(), found, strict=True):
                read(tensor.n_bytes)
                for each, is_equal in zip(compared, equal, strict=True):
                    if not is_equal:
                        each.differing.append(name)
                    elif is_adapted(name):
                        each.n_folded += 1
                    else:
                        each.n_copied += 1
    for each in compared:
        if each.differing:
            name = each.differing[0]
            each.checkpoint.problems.append(
                f"{each.checkpoint.tensors[name].path}: {name} is not what folding {model.base.name} gives "
                f"({len(each.differing)} of {len(model.tensors)} tensors differ)"
            )
    return compared


def _is_comparable(model: Model, checkpoint: Verified) -> bool:
    task = checkpoint.manifest["task"]
    if task not in model.adapters.tasks:
        problem = f"{model.adapter_source.name} has no adapter of {task} to compare with"
    elif {name: tensor.shape for name, tensor in checkpoint.tensors.items() if name == weight_name(name)} != {
        name: tensor.shape for name, tensor in model.tensors.items()
    }:
        problem = f"{model.base.name} is of another size: its tensors have other names or shapes"
    else:
        return True
    checkpoint.problems.append(f"{checkpoint.folder}: {problem}")
    return False


def _equal(model: Model, name: str, compared: Sequence[Compared]) -> list[bool]:
    """Say for each checkpoint whether a tensor has the same bits as when it is folded again."""
    equal = [True] * len(compared)
    pairs = [model.lora(each.checkpoint.manifest["task"], name) if is_adapted(name) else None for each in compared]
    for rows, block in model.tensors[name].row_blocks():
        for i, (each, pair) in enumerate(zip(compared, pairs, strict=True)):
            if equal[i]:
                dtype = DTYPES[each.checkpoint.manifest["dtype"]]
                if pair is None:
                    expected = {name: block.to(dtype)}
                else:
                    a, b, scaling = pair
                    expected = fold_block(name, block, a, b[rows], scaling, dtype, each.checkpoint.quantized)
                equal[i] = all(
                    _same_bits(values, each.checkpoint.tensors[held].read(rows)) for held, values in expected.items()
                )
    return equal


def _same_bits(expected: torch.Tensor, found: torch.Tensor) -> bool:
    if expected.dtype != found.dtype:
        return False
    return torch.equal(expected.contiguous().view(torch.uint8), found.contiguous().view(torch.uint8))


def _compare_files(model: Model, checkpoint: Verified) -> None:
    manifest = checkpoint.manifest
    files = plain_files(model, manifest["task"], manifest["dtype"], checkpoint.quantized)
    for name, content in files.items():
        path = checkpoint.folder / name
        if path.is_file() and path.read_bytes() != content:  # that one is missing is known
            checkpoint.problems.append(f"{path}: is not what folding {model.base.name} gives")
    expected = facts(model, manifest["task"])
    for key in ("scaling", "dimensions"):  # the prompts were compared before
        if manifest.get(key) != expected[key]:
            checkpoint.problems.append(
                f"{checkpoint.folder / MANIFEST_NAME}: {key} is {manifest.get(key)!r}; folding {model.base.name} gives "
                f"{expected[key]!r}"
            )
