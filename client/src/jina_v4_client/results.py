"""What a call with ``on_error="skip"`` gives: the vectors that could be had, and why the others could not."""

from dataclasses import dataclass

from jina_v4_client._pooling import Vector
from jina_v4_client.errors import JinaV4Error


@dataclass(frozen=True)
class Embedded:
    """The outcome of a call, item by item.

    Attributes:
        vectors: for each item, in order, (dim,) or, of a multi-vector, (n_tokens, 128) float32 of unit length; None for
            one that failed.
        errors: why, by the item's place in the call; empty if every item has its vector.
    """

    vectors: list[Vector | None]
    errors: dict[int, JinaV4Error]
