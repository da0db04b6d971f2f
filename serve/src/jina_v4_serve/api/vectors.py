"""What the engine gives for one prompt, as arrays."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
PROJECTOR_DIM = 128


@dataclass(frozen=True)
class Vectors:
    """What one prompt gave.

    Attributes:
        dense: shape (n_spans, dimensions); n_spans is 0 when no dense vector was asked for.
        multivector: shape (n_tokens, 128); n_tokens is 0 when it was not asked for.
        n_tokens: of the prompt.
    """

    dense: Floats
    multivector: Floats
    n_tokens: int
