"""From hidden states to vectors: the maths, without vLLM.

Source: the published model's `get_single_vector_embeddings`: the mean over every token of a text, over
`<|vision_start|>` to `<|vision_end|>` inclusive of an image prompt; unit length; cut to the first dimensions; unit
length again. The first of the two normalisations scales the whole vector and so drops out of the result. The
multi-vector: every token's row through the projector, each of unit length.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids that mark an image prompt; they differ between checkpoints, so they come from config.json."""

    image: int
    vision_start: int
    vision_end: int


@dataclass(frozen=True)
class Span:
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


@dataclass(frozen=True)
class Wanted:
    """What one request asks of its pass through the model.

    Attributes:
        spans: the spans whose means become dense vectors; None is the published span, () none.
        multivector: whether the projector's rows are wanted, one a token.
        dimensions: how many leading elements each dense vector keeps; None keeps all.
        task: whose projector makes the rows, where the model has several.
    """

    spans: tuple[Span, ...] | None = None
    multivector: bool = False
    dimensions: int | None = None
    task: str | None = None


class Projector:
    """The task's folded projector: multi-vector rows from hidden states."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """Keep the two tensors.

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
    """What is kept of one prompt from scheduling step to scheduling step: sums over its spans, projected rows."""

    def __init__(self, wanted: Wanted, published: Span, projector: Projector | None) -> None:
        """Start empty.

        Args:
            wanted: what the request asks for.
            published: the span that `wanted.spans` None stands for.
            projector: of the task; needed where the multi-vector is wanted.

        Raises:
            RuntimeError: when it is needed and not there.
        """
        if wanted.multivector and projector is None:
            raise RuntimeError("the multi-vector is asked for without a projector")
        self.spans = (published,) if wanted.spans is None else wanted.spans
        self.projector = projector if wanted.multivector else None
        self.dimensions = wanted.dimensions
        self.position = 0
        self.sums: list[torch.Tensor | None] = [None] * len(self.spans)
        self.rows: list[torch.Tensor] = []

    def add(self, hidden_states: torch.Tensor) -> None:
        """Take in the next step's rows for the sums.

        Args:
            hidden_states: shape (n_scheduled, hidden), any float dtype; the rows that follow the last ones given.
        """
        for i, span in enumerate(self.spans):
            first = max(span.start - self.position, 0)
            last = max(span.stop - self.position, 0)
            if first < len(hidden_states) and last > 0:
                part = hidden_states[first:last].sum(dim=0, dtype=torch.float32)  # (hidden,)
                before = self.sums[i]
                self.sums[i] = part if before is None else before + part
        self.position += len(hidden_states)

    def totals(self) -> list[torch.Tensor]:
        """Return the sum over each span, shape (hidden,), float32.

        Raises:
            RuntimeError: when rows of a span have not been seen.
        """
        seen = [total for total in self.sums if total is not None]
        stop = max((span.stop for span in self.spans), default=0)
        if len(seen) < len(self.spans) or self.position < stop:
            raise RuntimeError(f"only {self.position} of {stop} tokens were seen: the mean would be wrong")
        return seen


def advance(accumulators: Sequence[Accumulator], steps: Sequence[torch.Tensor]) -> None:
    """Take in one scheduling step of several prompts, with one product for each projector.

    Args:
        accumulators: one a prompt.
        steps: the rows of each, shape (n_scheduled, hidden), any float dtype.
    """
    for accumulator, rows in zip(accumulators, steps, strict=True):
        accumulator.add(rows)
    for projector in {each.projector for each in accumulators if each.projector is not None}:
        asking = [i for i, accumulator in enumerate(accumulators) if accumulator.projector is projector]
        projected = projector(torch.cat([steps[i] for i in asking]))  # (n_rows, projector_dim)
        parts = torch.split(projected, [len(steps[i]) for i in asking])
        for i, part in zip(asking, parts, strict=True):
            accumulators[i].rows.append(part)


def results(accumulators: Sequence[Accumulator]) -> list[torch.Tensor]:
    """Return all that each of several prompts asked for; all their dense vectors are scaled at once.

    Returns:
        For each prompt one float32 tensor of one dimension: its dense vectors, then its projected rows.

    Raises:
        RuntimeError: when rows of a span have not been seen.
    """
    totals = [accumulator.totals() for accumulator in accumulators]
    vectors: list[torch.Tensor | None] = [None] * len(accumulators)
    for dimensions in {accumulator.dimensions for accumulator in accumulators}:
        group = [i for i, each in enumerate(accumulators) if each.dimensions == dimensions and totals[i]]
        if group:
            # A mean differs from its sum by a factor, which scaling to unit length takes away.
            stacked = torch.stack([total for i in group for total in totals[i]])[:, :dimensions]
            scaled = F.normalize(stacked, dim=-1)  # (n_spans of all, dimensions)
            for i, part in zip(group, torch.split(scaled, [len(totals[i]) for i in group]), strict=True):
                vectors[i] = part
    return [
        torch.cat([part.flatten() for part in ([] if dense is None else [dense]) + accumulator.rows])
        for accumulator, dense in zip(accumulators, vectors, strict=True)
    ]
