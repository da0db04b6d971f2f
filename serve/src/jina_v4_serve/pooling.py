"""From hidden states to dense vectors: the maths, without vLLM.

Source: the published model's `get_single_vector_embeddings`: the mean over every token of a text, over
`<|vision_start|>` to `<|vision_end|>` inclusive of an image prompt; unit length; cut to the first dimensions; unit
length again. The first of the two normalisations scales the whole vector and so drops out of the result.
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


class RunningSum:
    """The sum over one prompt's span, fed with the hidden states of one scheduling step after another."""

    def __init__(self, span: Span) -> None:
        self.span = span
        self.position = 0
        self.total: torch.Tensor | None = None

    def add(self, hidden_states: torch.Tensor) -> None:
        """Add the next step's rows.

        Args:
            hidden_states: shape (n_scheduled, hidden), any float dtype; the rows that follow the last ones given.
        """
        first = max(self.span.start - self.position, 0)
        last = max(self.span.stop - self.position, 0)
        part = hidden_states[first:last].sum(dim=0, dtype=torch.float32)  # (hidden,)
        self.total = part if self.total is None else self.total + part
        self.position += len(hidden_states)

    def mean(self) -> torch.Tensor:
        """Return the mean over the span, float32, shape (hidden,).

        Raises:
            RuntimeError: when rows of the span have not been seen.
        """
        if self.total is None or self.position < self.span.stop:
            raise RuntimeError(f"only {self.position} of {self.span.stop} tokens were seen: the mean would be wrong")
        return self.total / (self.span.stop - self.span.start)


def dense_vectors(means: Sequence[torch.Tensor], dimensions: Sequence[int | None]) -> list[torch.Tensor]:
    """Cut each mean to its dimensions and scale it to unit length.

    Args:
        means: float32 tensors of shape (hidden,).
        dimensions: how many leading elements each result keeps; None keeps all.

    Returns:
        One float32 tensor a mean, shape (dimensions,).
    """
    stacked = torch.stack(list(means))  # (n, hidden)
    by_size = {size: F.normalize(stacked[:, :size], dim=-1) for size in set(dimensions)}  # (n, size) each
    return [by_size[size][row] for row, size in enumerate(dimensions)]
