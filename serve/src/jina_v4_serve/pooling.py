"""From hidden states to vectors: the maths, without vLLM.

Source: the published model's `get_single_vector_embeddings`: the mean over every token of a text, over
`<|vision_start|>` to `<|vision_end|>` inclusive of an image prompt; unit length; cut to the first dimensions; unit
length again. The first of the two normalisations scales the whole vector and so drops out of the result. The
multi-vector: every token's row through the projector, each of unit length.
"""

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
    """

    spans: tuple[Span, ...] | None = None
    multivector: bool = False
    dimensions: int | None = None


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

    def __init__(self, wanted: Wanted, published: Span) -> None:
        """Start empty.

        Args:
            wanted: what the request asks for.
            published: the span that `wanted.spans` None stands for.
        """
        self.spans = (published,) if wanted.spans is None else wanted.spans
        self.multivector = wanted.multivector
        self.dimensions = wanted.dimensions
        self.position = 0
        self.sums: list[torch.Tensor | None] = [None] * len(self.spans)
        self.rows: list[torch.Tensor] = []

    def add(self, hidden_states: torch.Tensor, projector: Projector | None) -> None:
        """Take in the next step's rows.

        Args:
            hidden_states: shape (n_scheduled, hidden), any float dtype; the rows that follow the last ones given.
            projector: needed where the multi-vector is wanted.
        """
        for i, span in enumerate(self.spans):
            first = max(span.start - self.position, 0)
            last = max(span.stop - self.position, 0)
            if first < len(hidden_states) and last > 0:
                part = hidden_states[first:last].sum(dim=0, dtype=torch.float32)  # (hidden,)
                before = self.sums[i]
                self.sums[i] = part if before is None else before + part
        if self.multivector:
            if projector is None:
                raise RuntimeError("the multi-vector is asked for without a projector")
            self.rows.append(projector(hidden_states))  # (n_scheduled, projector_dim)
        self.position += len(hidden_states)

    def result(self) -> torch.Tensor:
        """Return all that was asked for in one float32 tensor of one dimension: dense vectors, then rows.

        Raises:
            RuntimeError: when rows of a span have not been seen.
        """
        parts = [rows.flatten() for rows in self.rows]
        means = []
        for total, span in zip(self.sums, self.spans, strict=True):
            if total is None or self.position < span.stop:
                raise RuntimeError(f"only {self.position} of {span.stop} tokens were seen: the mean would be wrong")
            means.append(total / (span.stop - span.start))
        if means:
            cut = torch.stack(means)[:, : self.dimensions]  # (n_spans, dimensions)
            parts.insert(0, F.normalize(cut, dim=-1).flatten())
        return torch.cat(parts)
