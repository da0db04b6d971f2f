"""Vectors that a caller scores: told apart, checked, and read as float32 rows.

They are read block by block, so that a corpus that is a memory-mapped file, float16 or a list of a million arrays is
never copied as a whole.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from jina_v4_client.errors import ArgumentError

Vector = NDArray[np.float32]
Offsets = NDArray[np.int64]
_SHAPES = {1: "(dim,)", 2: "(n_tokens, dim)"}
_KINDS = {1: "a dense vector", 2: "a multi-vector"}


class Rows(ABC):
    """Rows of one width. Each is a dense vector or, with offsets, a token of a multi-vector.

    Attributes:
        offsets: (n_items + 1,) int64, where the tokens of each multi-vector begin and end; None for dense vectors.
    """

    offsets: Offsets | None

    def __len__(self) -> int:
        """Count the items."""
        return self.n_rows if self.offsets is None else len(self.offsets) - 1

    @property
    @abstractmethod
    def n_rows(self) -> int:
        """How many rows."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """The width of a row."""

    @property
    def bounds(self) -> Offsets:
        """Where the rows of each item begin and end, (n_items + 1,)."""
        return np.arange(self.n_rows + 1) if self.offsets is None else self.offsets

    @abstractmethod
    def read(self, start: int, stop: int) -> Vector:
        """Give rows start to stop, (stop - start, dim) float32."""


class FloatRows(Rows):
    """Rows that lie in arrays of floats, one after the other.

    Args:
        parts: (n, dim) each, of any float dtype.
        offsets: as in Rows.
    """

    def __init__(self, parts: Sequence[NDArray[Any]], offsets: Offsets | None) -> None:
        self._parts = parts
        self._bounds = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64)  # (n_parts + 1,)
        self.offsets = offsets

    @property
    def n_rows(self) -> int:
        """How many rows."""
        return int(self._bounds[-1])

    @property
    def dim(self) -> int:
        """The width of a row."""
        return int(self._parts[0].shape[1])

    def read(self, start: int, stop: int) -> Vector:
        """Give rows start to stop, (stop - start, dim) float32; a view where nothing has to be copied."""
        first = int(np.searchsorted(self._bounds, start, side="right")) - 1
        last = int(np.searchsorted(self._bounds, stop, side="left"))
        slices = [
            self._parts[i][max(start - int(self._bounds[i]), 0) : stop - int(self._bounds[i])]
            for i in range(first, last)
        ]
        rows = slices[0] if len(slices) == 1 else np.concatenate(slices)  # (stop - start, dim)
        with np.errstate(over="ignore"):  # becomes infinite, and is refused as such
            return np.asarray(rows, dtype=np.float32)


def open_rows(name: str, vectors: object, ndim: Literal[1, 2]) -> Rows:
    """Take what a caller gave as dense vectors or as multi-vectors.

    Args:
        name: what the caller calls it, for messages.
        vectors: for ndim 1 (dim,), (n, dim) or a sequence of (dim,); for ndim 2 (n_tokens, dim), a sequence of these or
            (n, n_tokens, dim). Or Rows, which are given back.
        ndim: 1 for dense vectors, 2 for multi-vectors.

    Raises:
        ArgumentError: neither of these, or nothing in it, or widths that differ, or no floats.
    """
    if isinstance(vectors, Rows):
        if len(vectors) == 0:
            raise ArgumentError(f"{name} is empty: at least one vector is needed")
        if (vectors.offsets is None) != (ndim == 1):
            found = _KINDS[1 if vectors.offsets is None else 2]
            raise ArgumentError(f"{name}: each is {found}, where {_KINDS[ndim]} is needed")
        return vectors
    if isinstance(vectors, np.ndarray) and vectors.ndim == ndim:
        vectors = vectors[None]  # one alone
    if isinstance(vectors, np.ndarray) and vectors.ndim == 2 and ndim == 1 and len(vectors):
        _check_shape(f"{name}[0]", vectors[0], 1)
        return FloatRows([vectors], None)
    if isinstance(vectors, str | bytes) or not isinstance(vectors, Sequence | np.ndarray):
        raise ArgumentError(f"{name} is a {type(vectors).__name__}; give an array or a list of arrays {_SHAPES[ndim]}")
    if len(vectors) == 0:
        raise ArgumentError(f"{name} is empty: at least one vector is needed")
    items = [np.asarray(item) for item in vectors]
    for i, item in enumerate(items):
        _check_shape(f"{name}[{i}]", item, ndim)
        if item.shape[-1] != items[0].shape[-1]:
            raise ArgumentError(f"{name}[{i}] has width {item.shape[-1]}, {name}[0] has {items[0].shape[-1]}")
    if ndim == 1:
        return FloatRows([item[None] for item in items], None)
    return FloatRows(items, np.cumsum([0, *(len(item) for item in items)], dtype=np.int64))


def check_widths(queries: Rows, documents: Rows) -> None:
    """Refuse queries and documents that differ in width."""
    if queries.dim != documents.dim:
        raise ArgumentError(f"the queries have width {queries.dim}, the documents {documents.dim}")


def check_offsets(offsets: Offsets, n_rows: int) -> None:
    """Refuse offsets that do not cut so many rows into multi-vectors of at least one row."""
    if (
        offsets.ndim != 1
        or offsets.dtype != np.int64
        or len(offsets) < 2
        or (offsets[0], offsets[-1]) != (0, n_rows)
        or not (np.diff(offsets) > 0).all()
    ):
        raise ArgumentError(f"offsets must be int64, begin with 0, grow, and end with the number of rows, {n_rows}")


def checked_blocks(name: str, rows: Rows, n_block_rows: int | None) -> Iterator[tuple[int, Vector, Vector]]:
    """Read all rows block by block; with None a block is an item.

    Yields:
        The number of the block's first row, the block (n, dim), and the length of each of its rows (n,).

    Raises:
        ArgumentError: a row holds NaN or infinity, or is zero: it has no direction, and as padding of a multi-vector it
            would win wherever all similarities are negative.
    """
    starts = rows.bounds[:-1] if n_block_rows is None else range(0, rows.n_rows, n_block_rows)
    for start, stop in pairwise([*map(int, starts), rows.n_rows]):
        block = rows.read(start, stop)  # (n, dim)
        with np.errstate(over="ignore", invalid="ignore"):
            squares = np.einsum("nd,nd->n", block, block)  # (n,)
        bad = np.flatnonzero(~((squares > 0) & (squares < np.inf)))
        if len(bad):
            place = _place(name, rows, start + int(bad[0]))
            if squares[bad[0]] == 0:
                raise ArgumentError(f"{place} is all zeros; padding must be cut off before")
            raise ArgumentError(f"{place} holds NaN, infinity or numbers too large to be multiplied")
        yield start, block, np.sqrt(squares)


def read_all(name: str, rows: Rows) -> tuple[Vector, Vector]:
    """Give all rows (n_rows, dim) and their lengths (n_rows,), checked as in checked_blocks."""
    ((_, block, lengths),) = checked_blocks(name, rows, rows.n_rows)
    return block, lengths


def _check_shape(place: str, item: NDArray[Any], ndim: int) -> None:
    if item.ndim != ndim:
        raise ArgumentError(f"{place} has shape {item.shape}; {_KINDS[ndim]} has {_SHAPES[ndim]}")
    if 0 in item.shape:
        raise ArgumentError(f"{place} has shape {item.shape}: there is nothing in it")
    if item.dtype.kind != "f":
        raise ArgumentError(
            f"{place} is {item.dtype}, not float; put quantised vectors into Int8Vectors or BinaryVectors"
        )


def _place(name: str, rows: Rows, row: int) -> str:
    if rows.offsets is None:
        return f"{name}[{row}]"
    item = int(np.searchsorted(rows.offsets, row, side="right")) - 1
    return f"{name}[{item}], row {row - int(rows.offsets[item])},"
