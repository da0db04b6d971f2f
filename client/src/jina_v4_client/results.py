"""What a call returns where vectors alone would not do."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jina_v4_client.errors import JinaV4Error

Vector = NDArray[np.float32]


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
