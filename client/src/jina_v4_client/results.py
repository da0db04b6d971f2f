"""What calls return beside plain vectors, and how vectors are put together."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jina_v4_client.errors import BadReplyError, JinaV4Error

Vector = NDArray[np.float32]
UNIT_TOLERANCE = 1e-3  # of the length of a vector


@dataclass(frozen=True)
class DenseAndMulti:
    """The two kinds of vectors of one item, from one pass through the model.

    Attributes:
        dense: (dim,) float32, of unit length.
        multivector: (n_tokens, 128) float32, every row of unit length.
    """

    dense: Vector
    multivector: Vector


@dataclass(frozen=True)
class PartialResult:
    """What a call with ``on_error="skip"`` returns.

    Attributes:
        vectors: for each item, in order, (dim,) or, of a multi-vector, (n_tokens, 128) float32 of unit length; None for
            one that failed.
        errors: why, by the item's place in the call; empty if every item has its vector.
    """

    vectors: list[Vector | None]
    errors: dict[int, JinaV4Error]


Item = Vector | DenseAndMulti


def together(dense: Sequence[Vector] | None, multivectors: Sequence[Vector] | None) -> list[Item]:
    """Return for each item the kind of vectors that was requested, or both kinds."""
    if dense is None or multivectors is None:
        return [*(dense or ()), *(multivectors or ())]
    return [DenseAndMulti(vector, rows) for vector, rows in zip(dense, multivectors, strict=True)]


def check_widths(seen: set[int], items: Sequence[Item]) -> None:
    """Add the dimensions of vectors to those seen in a call, and refuse a second number of them."""
    seen |= {(item.dense if isinstance(item, DenseAndMulti) else item).shape[-1] for item in items}
    if len(seen) > 1:
        raise BadReplyError(
            f"the server answered one call with vectors of {sorted(seen)} dimensions: nothing is returned"
        )


def row_lengths(rows: Vector) -> NDArray[np.float64]:
    """Return the length of each row of (n, dim)."""
    lengths: NDArray[np.float64] = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))  # (n,)
    return lengths
