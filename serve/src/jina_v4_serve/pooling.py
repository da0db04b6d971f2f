"""From hidden states to vectors: the maths, without vLLM.

Source: the published model's `get_single_vector_embeddings`. A dense vector is the mean over all tokens of a text, or
over `<|vision_start|>` to `<|vision_end|>` (inclusive) of an image prompt. It is scaled to unit length, cut to the
first dimensions, and scaled again; the first scaling cancels out and is left out here. A multi-vector has one row per
token: the hidden state times the projector, at unit length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it

BLOCK = 64  # rows that are added one after another; more would round a mean more coarsely


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids that mark an image prompt. They differ between checkpoints and come from config.json."""

    image: int
    vision_start: int
    vision_end: int


class Span(NamedTuple):
    """Positions `start` (inclusive) to `stop` (exclusive) of the tokens that are averaged."""

    start: int
    stop: int


def pooled_span(token_ids: torch.Tensor, special: SpecialTokens) -> Span:
    """Find which tokens of a prompt make its dense vector.

    Args:
        token_ids: the whole prompt, integers, shape (n_tokens,), on the CPU.
        special: the ids that mark an image.

    Returns:
        The vision span of a prompt with exactly one image; every token of any other prompt.
    """
    everything = Span(0, len(token_ids))
    starts = (token_ids == special.vision_start).nonzero()  # (n_starts, 1)
    n_image_tokens = int((token_ids == special.image).sum())
    if len(starts) != 1 or n_image_tokens == 0:
        return everything
    start = int(starts[0])
    stop = start + n_image_tokens + 2  # with <|vision_start|> and <|vision_end|>
    expected = [special.vision_start, *[special.image] * n_image_tokens, special.vision_end]
    return Span(start, stop) if token_ids[start:stop].tolist() == expected else everything


@dataclass(frozen=True, slots=True)
class PoolingRequest:
    """The outputs of one prompt.

    Attributes:
        spans: the spans whose means become dense vectors; () for no dense vector, None for the published span.
        multivector: whether to return a multi-vector too.
        dimensions: how many leading elements each dense vector keeps; None keeps all.
        task: selects the projector if the model has several.
    """

    spans: tuple[Span, ...] | None = None
    multivector: bool = False
    dimensions: int | None = None
    task: str | None = None


class Projector:
    """The task's folded projector: multi-vector rows from hidden states."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """Store the two tensors.

        Args:
            weight: float32, shape (projector_dim, hidden).
            bias: float32, shape (projector_dim,).
        """
        self.weight = weight
        self.bias = bias

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Project and scale each row to unit length: (n, hidden) of any float dtype to (n, projector_dim) float32."""
        return F.normalize(F.linear(hidden_states.float(), self.weight, self.bias), dim=-1)


class Accumulator:
    """The state of one prompt between scheduling steps: the sums over its spans, its projected rows.

    Attributes:
        n_tokens: the length of the prompt.
        position: how many of its tokens have been added.
        sums: the sum over each span so far, shape (n_spans, hidden), float32; None before the first step.
        rows: the projected rows so far, float32, each tensor of shape (n_scheduled, projector_dim).
    """

    __slots__ = ("__weakref__", "dimensions", "n_tokens", "position", "projector", "rows", "spans", "sums")

    def __init__(self, request: PoolingRequest, n_tokens: int, projector: Projector | None) -> None:
        """Start empty.

        Args:
            request: the outputs of the prompt, with its spans.
            n_tokens: the length of the prompt.
            projector: the task's; needed for a multi-vector.

        Raises:
            RuntimeError: the projector is needed and missing, the spans are missing, or a span is empty or outside of
                the prompt.
        """
        if request.multivector and projector is None:
            raise RuntimeError("internal error: a multi-vector was requested, and there is no projector")
        if request.spans is None:
            raise RuntimeError("internal error: the request has no spans")
        for span in request.spans:
            if not 0 <= span.start < span.stop <= n_tokens:
                raise RuntimeError(f"{span} is not within the {n_tokens} tokens of the prompt")
        self.spans = request.spans
        self.projector = projector if request.multivector else None
        self.dimensions = request.dimensions
        self.n_tokens = n_tokens
        self.position = 0
        self.sums: torch.Tensor | None = None
        self.rows: list[torch.Tensor] = []


def advance(
    accumulators: Sequence[Accumulator], hidden_states: torch.Tensor, n_scheduled: list[int]
) -> list[torch.Tensor | None]:
    """Add one scheduling step of several prompts at once; return the outputs of the prompts that it completes.

    Args:
        accumulators: one per prompt.
        hidden_states: the step's, prompt after prompt, shape (n_tokens, hidden), any float dtype.
        n_scheduled: how many of the rows belong to each prompt.

    Returns:
        For each complete prompt one flat float32 tensor on the CPU: its dense vectors, then its projected rows. For the
        others None. Copies from a GPU may still be under way.
    """
    rows = hidden_states.float()
    _project(accumulators, rows, n_scheduled)
    sums = _span_sums(accumulators, rows, n_scheduled)  # (n_spans of all, hidden)
    complete: list[tuple[int, int]] = []  # the index of a prompt, and of its first span
    first = 0
    for i, (accumulator, n_rows) in enumerate(zip(accumulators, n_scheduled, strict=True)):
        accumulator.position += n_rows
        if accumulator.position == accumulator.n_tokens:
            complete.append((i, first))
        else:
            accumulator.sums = sums[first : first + len(accumulator.spans)].clone()  # a view would keep all sums
        first += len(accumulator.spans)
    outputs: list[torch.Tensor | None] = [None] * len(accumulators)
    if complete:
        for i, output in _outputs(accumulators, complete, sums):
            outputs[i] = output
    return outputs


def _project(accumulators: Sequence[Accumulator], rows: torch.Tensor, n_scheduled: list[int]) -> None:
    """Append the step's projected rows, with one matrix product for each projector."""
    for projector in {each.projector for each in accumulators if each.projector is not None}:
        steps = torch.split(rows, n_scheduled)
        users = [i for i, accumulator in enumerate(accumulators) if accumulator.projector is projector]
        projected = projector(torch.cat([steps[i] for i in users]))  # (n_rows, projector_dim)
        parts = torch.split(projected, [n_scheduled[i] for i in users])
        for i, part in zip(users, parts, strict=True):
            accumulators[i].rows.append(part)


def _span_sums(accumulators: Sequence[Accumulator], rows: torch.Tensor, n_scheduled: list[int]) -> torch.Tensor:
    """Return the sum over each span so far, shape (n_spans of all, hidden), span after span.

    The rows of each span are summed in blocks; then each span's blocks and its sum from earlier steps are added.
    """
    ranges: list[tuple[int, int]] = []  # rows of this step, span after span
    blocks: list[int] = []  # where each block begins in these rows
    parts: list[int] = []  # blocks and earlier sums, span after span
    spans: list[int] = []  # where each span begins in these parts
    earlier: list[torch.Tensor] = []
    n_summed, n_earlier, offset = 0, 0, 0
    for accumulator, n_rows in zip(accumulators, n_scheduled, strict=True):
        for i, span in enumerate(accumulator.spans):
            spans.append(len(parts))
            first = min(max(span.start - accumulator.position, 0), n_rows)
            stop = min(max(span.stop - accumulator.position, 0), n_rows)
            if first < stop:
                ranges.append((offset + first, offset + stop))
                n_blocks = len(blocks)
                blocks += range(n_summed, n_summed + stop - first, BLOCK)
                parts += range(n_blocks, len(blocks))
                n_summed += stop - first
            if accumulator.sums is not None:
                parts.append(-1 - n_earlier - i)  # its place in the table: below, when the number of blocks is known
        if accumulator.sums is not None:
            earlier.append(accumulator.sums)
            n_earlier += len(accumulator.spans)
        offset += n_rows
    block_sums = _bag_sums(rows, _indices(ranges, rows.device), blocks)
    table = torch.cat([block_sums, *earlier])  # (n_blocks + n_earlier, hidden)
    picked = torch.tensor([part if part >= 0 else len(blocks) - 1 - part for part in parts], dtype=torch.int64)
    return _bag_sums(table, picked, spans)


def _indices(ranges: Sequence[tuple[int, int]], device: torch.device) -> torch.Tensor:
    """Return all numbers of the ranges, shape (n_rows,). Most ranges begin where the one before ends."""
    joined: list[tuple[int, int]] = []
    for first, stop in ranges:
        if joined and joined[-1][1] == first:
            first, _ = joined.pop()
        joined.append((first, stop))
    return torch.cat([torch.arange(first, stop, device=device) for first, stop in joined or [(0, 0)]])


def _bag_sums(rows: torch.Tensor, indices: torch.Tensor, offsets: list[int]) -> torch.Tensor:
    """Return for each offset the sum of `rows[indices[offset:next_offset]]`, shape (n_offsets, hidden).

    The order of the additions is the same in every call, on a GPU too.
    """
    if not offsets or not len(indices):
        return rows.new_zeros(len(offsets), rows.shape[1])
    begins = torch.tensor(offsets).to(rows.device, non_blocking=True)
    return F.embedding_bag(indices.to(rows.device, non_blocking=True), rows, begins, mode="sum")


def _outputs(
    accumulators: Sequence[Accumulator], complete: Sequence[tuple[int, int]], sums: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the index and the output of each complete prompt. One copy takes all outputs from the GPU.

    Args:
        accumulators: one per prompt.
        complete: the index of each complete prompt, and of its first span.
        sums: the sums of all spans, shape (n_spans of all, hidden).
    """
    forms: dict[tuple[int | None, bool], list[tuple[int, int]]] = {}
    for i, first in complete:
        forms.setdefault((accumulators[i].dimensions, accumulators[i].projector is None), []).append((i, first))
    pieces: list[torch.Tensor] = []
    sizes: list[int] = []
    for (dimensions, is_dense), group in forms.items():
        ranges = [(first, first + len(accumulators[i].spans)) for i, first in group]
        own = sums[:, :dimensions].index_select(0, _indices(ranges, sums.device))
        # A mean is its sum times a factor, which cancels out when it is scaled to unit length.
        scaled = F.normalize(own, dim=-1)  # (n_spans of the group, dimensions)
        lengths = [(stop - first) * scaled.shape[1] for first, stop in ranges]
        if is_dense:
            pieces.append(scaled.flatten())
            sizes += lengths
            continue
        for (i, _), dense in zip(group, torch.split(scaled.flatten(), lengths), strict=True):
            parts = [dense, *(part.flatten() for part in accumulators[i].rows)]
            pieces += parts
            sizes.append(sum(map(len, parts)))
    everything = torch.cat(pieces).to("cpu", non_blocking=True)
    yield from zip((i for group in forms.values() for i, _ in group), torch.split(everything, sizes), strict=True)
