"""Random rows of unit length, as the vectors of a server are."""

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]


def to_unit(rows: NDArray[np.floating]) -> Rows:
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True), dtype=np.float32)


def unit(*shape: int, seed: int = 0) -> Rows:
    return to_unit(np.random.default_rng(seed).standard_normal(shape))


def ragged(lengths: list[int], dim: int, seed: int = 0) -> list[Rows]:
    """Multi-vectors of so many rows each."""
    return np.split(unit(sum(lengths), dim, seed=seed), np.cumsum(lengths)[:-1])
