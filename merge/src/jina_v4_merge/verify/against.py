"""A checkpoint beside one that somebody else merged: tensor by tensor equal, differing by rounding, or differing.

Two merges of one adapter differ by rounding: in the dtype that they add in, and in what they round to. What differs by
more is another merge. With base and adapters the report says which: every tensor is modelled as the base's plus a share
of each task's `B @ A`, and the shares are found by least squares, which rounding does not disturb.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from jina_v4_merge.reading.layout import PROJECTOR, is_adapted
from jina_v4_merge.reading.model import Model
from jina_v4_merge.reading.weights import StoredTensor, base_tensors, stored_tensors
from jina_v4_merge.verify.checks import Verified
from jina_v4_merge.verify.settings import differing_settings
from jina_v4_merge.work import one_thread, progress, workers
from jina_v4_merge.writing.checkpoint import PROJECTOR_NAME

_NOT_EMBEDDING = ("lm_head.weight",)  # a tied copy of the embedding, which no vector is computed with
# A share of less than this counts as 0, and one that is so near to 1 counts as 1.
_SHARE = 0.05
_ITSELF = "this task's adapter"


@dataclass(frozen=True)
class Difference:
    """How far a tensor of the other differs.

    Attributes:
        name: Published.
        relative: Root mean square of the differences, divided by that of the values; 0 if there are none.
        by_rounding: Whether two roundings of one sum differ so.
        looks_like: What it is instead, where that is known.
    """

    name: str
    relative: float
    by_rounding: bool = True
    looks_like: str | None = None


@dataclass
class Compared:
    """Two checkpoints.

    Attributes:
        n_equal: Tensors with the same values.
        n_rounding: Those that differ as two roundings of one sum do.
        differing: The others, of those that both have in one shape.
        missing: What only ours has; the projector's names, if it has none.
        unknown: What only the other has.
        misshapen: Names with the other's shape and ours.
        settings: What else makes other vectors, each a sentence.
    """

    n_equal: int = 0
    n_rounding: int = 0
    differing: list[Difference] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)

    @property
    def same_vectors(self) -> bool:
        """Whether dense vectors of the two differ by rounding at most."""
        missing = [name for name in self.missing if name not in PROJECTOR]
        return not (self.differing or missing or self.unknown or self.misshapen or self.settings)


def compare_with(ours: Verified, other: Path, model: Model | None = None) -> Compared:
    """Compare a good checkpoint of ours with another folder.

    Args:
        ours: With its tensors read.
        other: The folder of a checkpoint, with the tensor names of any version of transformers.
        model: The base and its adapters, to say what a tensor that differs is.

    Raises:
        MergeError: one of its classes: a file of the other is missing or broken, or is no plain float weights.
    """
    theirs = base_tensors(other)
    if (other / PROJECTOR_NAME).exists():
        theirs = {**stored_tensors(other / PROJECTOR_NAME), **theirs}
    compared = Compared(settings=differing_settings(ours.folder, other))
    compared.missing = sorted(name for name in ours.tensors if name not in theirs)
    compared.unknown = sorted(name for name in theirs if name not in ours.tensors and name not in _NOT_EMBEDDING)
    both = [name for name in ours.tensors if name in theirs]
    for name in both:
        shapes = [list(tensors[name].shape) for tensors in (theirs, ours.tensors)]
        if shapes[0] != shapes[1]:
            compared.misshapen.append(f"{name} is {shapes[0]} and ours {shapes[1]}")
    both = [name for name in both if theirs[name].shape == ours.tensors[name].shape]
    if model is not None and any(model.tensors[name].shape != ours.tensors[name].shape for name in both):
        model = None  # `--base` has said so
    task = ours.manifest["task"]
    with one_thread(), workers() as pool:
        found = pool.map(lambda name: _compare_tensor(name, ours.tensors[name], theirs[name], task, model), both)
        with progress("compare", sum(theirs[name].n_bytes for name in both)) as read:
            for difference in found:
                read(theirs[difference.name].n_bytes)
                if difference.relative == 0:
                    compared.n_equal += 1
                elif difference.by_rounding:
                    compared.n_rounding += 1
                else:
                    compared.differing.append(difference)
    return compared


def _compare_tensor(name: str, ours: StoredTensor, theirs: StoredTensor, task: str, model: Model | None) -> Difference:
    squares = off = excess = 0.0
    eps = _eps(ours, theirs)
    for rows, block in ours.row_blocks():
        values, others = block.double(), theirs.read(rows).double()
        difference = (others - values).abs_()
        squares += float(values.square().sum())
        off += float(difference.square().sum())
        excess = max(excess, float((difference - eps * values.abs()).max()))
    if off == 0:
        return Difference(name, 0.0)
    if not math.isfinite(off):
        return Difference(name, math.inf, False, "values that are not finite")
    n_values = math.prod(ours.shape)
    rms = math.sqrt(squares / n_values)
    relative = math.sqrt(off / n_values) / rms if rms else math.inf
    # Where base and adapter cancel, the adapter's own rounding is more than the value's.
    by_rounding = excess <= 4 * eps * rms and relative <= eps / 2
    if model is None or not is_adapted(name):
        return Difference(name, relative, by_rounding)
    looks_like = _looks_like(name, theirs, task, model, eps * rms)
    if looks_like == _ITSELF:
        return Difference(name, relative, by_rounding, f"{looks_like}, but for single values")
    return Difference(name, relative, False, looks_like)


def _eps(*tensors: StoredTensor) -> float:
    """Return the distance of 1 to the next number in the coarsest dtype that the values of some tensors are of."""
    return max(torch.finfo(torch.bfloat16 if _is_bfloat16(tensor) else tensor.dtype).eps for tensor in tensors)


def _is_bfloat16(tensor: StoredTensor) -> bool:
    """Say whether a float32 tensor holds values of bfloat16, as a checkpoint that was loaded and saved in float32."""
    if tensor.dtype != torch.float32:
        return False
    return all(torch.equal(block, block.bfloat16().float()) for _, block in tensor.row_blocks())


def _looks_like(name: str, theirs: StoredTensor, task: str, model: Model, tolerance: float) -> str:
    """Return what a tensor is in terms of the base and its adapters."""
    tasks = model.adapters.tasks
    products = torch.zeros(len(tasks) + 1, len(tasks) + 1, dtype=torch.float64)
    for parts in _parts(name, theirs, tasks, model):
        products += parts @ parts.T
    shares = torch.linalg.lstsq(products[1:, 1:], products[1:, :1]).solution[:, 0]  # (n_tasks,)
    # |remainder|^2 = |w - sum of shares|^2, from the products of the parts alone.
    factors = torch.cat([torch.ones(1, dtype=torch.float64), -shares])
    remainder = math.sqrt(max(0.0, float(factors @ products @ factors)) / math.prod(theirs.shape))
    found = {other: share for other, share in zip(tasks, shares.tolist(), strict=True) if abs(share) > _SHARE}
    if remainder > tolerance:
        return "neither the base nor made of its adapters"
    if not found:
        return "the base, with no adapter"
    if all(abs(share - 1) <= _SHARE for share in found.values()):
        if list(found) == [task]:
            return _ITSELF
        return f"the base with the adapter of {' and that of '.join(found)}"
    if list(found) == [task]:
        ours = model.adapters.scalings[task][name]
        return f"this task's adapter with a scaling of {ours * found[task]:.3g}; it must be {ours:.3g}"
    return "the base and " + " + ".join(f"{share:.2f} times the adapter of {other}" for other, share in found.items())


def _parts(name: str, theirs: StoredTensor, tasks: Sequence[str], model: Model) -> Iterator[torch.Tensor]:
    """Yield, some rows at a time, what the other added to the base and what each task's adapter adds, flattened."""
    pairs = [model.lora(task, name) for task in tasks]
    for rows, block in model.tensors[name].row_blocks():
        added = [theirs.read(rows).double() - block.double(), *(scaling * (b[rows] @ a) for a, b, scaling in pairs)]
        yield torch.stack([part.flatten() for part in added])  # (1 + n_tasks, n_values)


def report(other: Path, compared: Compared) -> Iterator[str]:
    """Yield the lines to print."""
    n_tensors = f"{compared.n_equal} tensors equal, {compared.n_rounding} differ by rounding"
    yield f"{other}: {n_tensors}, {len(compared.differing)} differ"
    groups: dict[str | None, list[Difference]] = {}
    for difference in compared.differing:
        groups.setdefault(difference.looks_like, []).append(difference)
    for looks_like, held in groups.items():
        worst = max(held, key=lambda difference: difference.relative)
        size = f"by {'up to ' if len(held) > 1 else ''}{worst.relative:.1%}"
        which = held[0].name if len(held) == 1 else f"{len(held)} tensors, the first of them {held[0].name}"
        what = f": {looks_like}" if looks_like else ""
        yield f"  differs {size}: {which}{what}"
    projector = [name for name in compared.missing if name in PROJECTOR]
    missing = [name for name in compared.missing if name not in PROJECTOR]
    for names, what in ((missing, "missing"), (compared.unknown, "not in ours"), (compared.misshapen, "misshapen")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            yield f"  {what}: {names[0]}{more}"
    if projector:
        yield "  no projector: it gives no multi-vectors"
    for setting in compared.settings:
        yield f"  setting: {setting}"
    if compared.same_vectors:
        yield "  so its dense vectors are ours but for rounding"
