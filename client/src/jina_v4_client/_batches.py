"""What one call asks for, whichever kind of server answers, and how it is cut into requests."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from jina_v4_client._images import PreparedImage
from jina_v4_client._model import PromptName
from jina_v4_client._pooling import Vector
from jina_v4_client.errors import BadReplyError


@dataclass(frozen=True)
class Texts:
    """Texts, without prefix.

    Attributes:
        multivector: whether a row a token is wanted; truncate_dim is of no concern then.
    """

    items: Sequence[str]
    prompt_name: PromptName
    max_length: int
    multivector: bool
    truncate_dim: int | None


@dataclass(frozen=True)
class Images:
    """Images; `multivector` as for texts."""

    items: Sequence[PreparedImage]
    max_pixels: int | None
    multivector: bool
    truncate_dim: int | None


def cut(batch: Texts | Images, size: int) -> Iterator[Texts | Images]:
    """Cut a batch into smaller ones of so many items."""
    for start in range(0, len(batch.items), size):
        if isinstance(batch, Texts):
            yield replace(batch, items=batch.items[start : start + size])
        else:
            yield replace(batch, items=batch.items[start : start + size])


def check_widths(vectors: Sequence[Vector]) -> None:
    """Refuse vectors of several requests that differ in their dimensions."""
    dims = sorted({vector.shape[-1] for vector in vectors})
    if len(dims) != 1:
        raise BadReplyError(f"the server answered one call with vectors of {dims} dimensions: nothing is returned")
