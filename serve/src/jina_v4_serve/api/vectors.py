"""The vectors of one prompt, as arrays."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Origin:
    """The item and the page that a prompt was made of.

    Attributes:
        item: its index in the request.
        page: of a PDF file, from 1; None for other items.
        n_pages: the pages of the whole file; None for other items.
    """

    item: int
    page: int | None = None
    n_pages: int | None = None


@dataclass(frozen=True)
class Vectors:
    """The vectors of one prompt.

    Attributes:
        dense: shape (n_spans, dimensions); n_spans is 0 if no dense vector was requested.
        multivector: shape (n_tokens, 128); n_tokens is 0 if no multi-vector was requested.
        n_tokens: of the prompt.
        origin: of the prompt.
    """

    dense: Floats
    multivector: Floats
    n_tokens: int
    origin: Origin = Origin(0)


class NonFiniteError(Exception):
    """The engine computed NaN or infinity; no vector is returned."""
