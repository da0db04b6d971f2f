"""Vectors in a quarter of the bytes (int8) or a thirty-second of them (binary), and the search in them.

Both hold dense vectors or multi-vectors, take the place of documents in `cosine`, `maxsim` and `rank`, and are plain
arrays, to be saved with ``numpy.savez`` and opened again. The query stays float32: quantising it as well loses more and
saves nothing, except where bits are compared with bits (`hamming`).
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from jina_v4_client.errors import ArgumentError
from jina_v4_client.scoring.rows import Offsets, Rows, Vector, check_offsets, checked_blocks, open_rows
from jina_v4_client.scoring.similarity import Hit, Vectors, best, check_top_k, score_one

_BLOCK_BYTES = 4 * 2**20  # of float32 rows, or of codes, worked on at a time
_INT8_MAX = 127  # symmetric: -128 is not used

# Of each byte: its bits as -1 and 1, most significant first, and how many of them are set.
_SIGNS: Vector = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1) * np.float32(2) - np.float32(
    1
)  # (256, 8)
_N_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)  # (256,)


@dataclass(frozen=True, eq=False)
class Int8Vectors(Rows):
    """Dense vectors or multi-vectors in 8 bits a number: ``codes * scales``.

    Attributes:
        codes: (n_rows, dim) int8.
        scales: (n_rows,) float32, the size of one step of each row.
        offsets: (n_items + 1,) int64, where the rows of each multi-vector begin and end; None for dense vectors.

    Raises:
        ArgumentError: arrays that do not belong together.
    """

    codes: NDArray[np.int8]
    scales: Vector
    offsets: Offsets | None = None

    def __post_init__(self) -> None:
        """Refuse arrays that do not belong together."""
        _check_codes(self.codes, np.int8, self.offsets)
        if self.scales.dtype != np.float32 or self.scales.shape != (len(self.codes),):
            raise ArgumentError(
                f"scales must be float32 of shape ({len(self.codes)},), not {self.scales.dtype} {self.scales.shape}"
            )

    @property
    def n_rows(self) -> int:
        """How many rows."""
        return len(self.codes)

    @property
    def dim(self) -> int:
        """The width of a row."""
        return int(self.codes.shape[1])

    def read(self, start: int, stop: int) -> Vector:
        """Give rows start to stop as (stop - start, dim) float32; no number is off by more than half a step."""
        return self.codes[start:stop] * self.scales[start:stop, None]

    def take(self, items: NDArray[np.integer[Any]]) -> Self:
        """Give some of the vectors, in the order of items (n,)."""
        rows, offsets = _rows_of(items, self.offsets)
        return type(self)(self.codes[rows], self.scales[rows], offsets)


@dataclass(frozen=True, eq=False)
class BinaryVectors(Rows):
    """Dense vectors or multi-vectors in one bit a number, its sign, as the API's ``ubinary`` has them.

    Attributes:
        codes: (n_rows, dim / 8) uint8, the bits of v > 0 packed, most significant first. The API's ``binary`` is this
            less 128: ``(binary.astype(np.int16) + 128).astype(np.uint8)`` brings it back.
        offsets: (n_items + 1,) int64, where the rows of each multi-vector begin and end; None for dense vectors.

    Raises:
        ArgumentError: arrays that do not belong together.
    """

    codes: NDArray[np.uint8]
    offsets: Offsets | None = None

    def __post_init__(self) -> None:
        """Refuse arrays that do not belong together."""
        _check_codes(self.codes, np.uint8, self.offsets)

    @property
    def n_rows(self) -> int:
        """How many rows."""
        return len(self.codes)

    @property
    def dim(self) -> int:
        """The width of a row, in bits."""
        return 8 * int(self.codes.shape[1])

    def read(self, start: int, stop: int) -> Vector:
        """Give rows start to stop as (stop - start, dim) float32: their signs, at unit length."""
        signs = np.take(_SIGNS, self.codes[start:stop], axis=0)  # (stop - start, dim / 8, 8)
        signs *= np.float32(self.dim**-0.5)
        return signs.reshape(stop - start, self.dim)

    def take(self, items: NDArray[np.integer[Any]]) -> Self:
        """Give some of the vectors, in the order of items (n,)."""
        rows, offsets = _rows_of(items, self.offsets)
        return type(self)(self.codes[rows], offsets)


def quantize_int8(vectors: Vectors) -> Int8Vectors:
    """Round each number to one of 255 steps between minus and plus the largest of its row.

    The step is each row's own. One for each dimension would have to be measured on a sample, would cut off what lies
    outside of it, and could not be kept when vectors are cut to fewer dimensions.

    Args:
        vectors: (n, dim) or a list of (dim,), dense; or a list of (n_tokens, dim), multi-vectors. Of a float dtype.

    Raises:
        ArgumentError: no vectors, widths that differ, a row of zeros, NaN or infinity.
    """
    rows = _open_either(vectors)
    codes = np.empty((rows.n_rows, rows.dim), dtype=np.int8)
    scales = np.empty(rows.n_rows, dtype=np.float32)
    for start, block, _ in checked_blocks("vectors", rows, max(1, _BLOCK_BYTES // (4 * rows.dim))):
        steps = np.abs(block).max(axis=1) / np.float32(_INT8_MAX)  # (n,)
        scales[start : start + len(block)] = steps
        codes[start : start + len(block)] = np.rint(block / steps[:, None])
    return Int8Vectors(codes, scales, rows.offsets)


def quantize_binary(vectors: Vectors) -> BinaryVectors:
    """Keep the sign of each number: bit for bit what the server gives for ``embedding_type: ubinary``.

    Args:
        vectors: (n, dim) or a list of (dim,), dense; or a list of (n_tokens, dim), multi-vectors. Of a float dtype.

    Raises:
        ArgumentError: no vectors, widths that differ or are no multiple of 8, a row of zeros, NaN or infinity.
    """
    rows = _open_either(vectors)
    if rows.dim % 8:
        raise ArgumentError(f"vectors of width {rows.dim} do not fill whole bytes; the width must be a multiple of 8")
    codes = np.empty((rows.n_rows, rows.dim // 8), dtype=np.uint8)
    for start, block, _ in checked_blocks("vectors", rows, max(1, _BLOCK_BYTES // (4 * rows.dim))):
        codes[start : start + len(block)] = np.packbits(block > 0, axis=1)
    return BinaryVectors(codes, rows.offsets)


def hamming(queries: NDArray[np.uint8], documents: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Count the bits in which binary vectors differ.

    Args:
        queries: (n_queries, n_bytes) uint8, codes of dense BinaryVectors.
        documents: (n_documents, n_bytes) uint8.

    Returns:
        (n_queries, n_documents) int32. The cosine of the vectors of signs is ``1 - 2 * hamming / dim``.

    Raises:
        ArgumentError: no uint8, another number of axes, or widths that differ.
    """
    for name, codes in (("queries", queries), ("documents", documents)):
        if codes.ndim != 2 or codes.dtype != np.uint8 or 0 in codes.shape:
            raise ArgumentError(f"{name} must be uint8 of shape (n, n_bytes), not {codes.dtype} {codes.shape}")
    if queries.shape[1] != documents.shape[1]:
        raise ArgumentError(f"the queries have width {queries.shape[1]}, the documents {documents.shape[1]} bytes")
    distances = np.empty((len(queries), len(documents)), dtype=np.int32)
    n_block_rows = max(1, _BLOCK_BYTES // documents.shape[1])
    for start in range(0, len(documents), n_block_rows):
        block = documents[start : start + n_block_rows]  # (n, n_bytes)
        for i, query in enumerate(queries):
            distances[i, start : start + len(block)] = _count_bits(block ^ query)
    return distances


def search(
    query: NDArray[Any],
    documents: Int8Vectors | BinaryVectors,
    top_k: int | None = 10,
    *,
    rescore_with: Vectors | None = None,
    oversample: int = 4,
    bits_only: bool = False,
) -> list[Hit]:
    """Search quantised documents, and order the best of them anew by better vectors.

    Args:
        query: (dim,) for dense documents or (n_tokens, dim) for multi-vectors, of a float dtype.
        documents: what is searched.
        top_k: how many are returned; all of them if None, or if there are no more.
        rescore_with: the same documents, exact or at least finer: (n, dim), also memory-mapped, of which only the
            candidates are read; a list of (n_tokens, dim); or Int8Vectors over BinaryVectors.
        oversample: how many times top_k candidates are scored anew.
        bits_only: find the candidates with the signs of the query as well. For dense vectors that is `hamming`, many
            times faster; it loses more, so rescore. Only over BinaryVectors.

    Returns:
        The best documents, best first; equal scores keep the order of the documents. The scores are those of
        rescore_with where it is given.

    Raises:
        ArgumentError: an argument is not allowed, or what `rank` refuses.
    """
    check_top_k(top_k)
    if isinstance(oversample, bool) or not isinstance(oversample, int) or oversample < 1:
        raise ArgumentError(f"oversample={oversample!r} is not allowed; give a whole number from 1")
    if bits_only and not isinstance(documents, BinaryVectors):
        raise ArgumentError("bits_only searches BinaryVectors only")
    if rescore_with is not None and len(rescore_with) != len(documents):
        raise ArgumentError(f"rescore_with has {len(rescore_with)} vectors, documents {len(documents)}")
    query = np.asarray(query)
    scores = _score_bits(query, documents) if isinstance(documents, BinaryVectors) and bits_only else None
    scores = score_one(query, documents) if scores is None else scores  # (n_documents,)
    if rescore_with is None:
        return [Hit(int(i), float(scores[i])) for i in best(scores, top_k)]
    n_candidates = None if top_k is None else top_k * oversample
    candidates = np.sort(best(scores, n_candidates))  # in their order, so that equal scores keep it
    finer = score_one(query, _take(rescore_with, candidates), "rescore_with")  # (n_candidates,)
    if len(finer) != len(candidates):
        raise ArgumentError("rescore_with is one vector; pass (n, dim), or a list of (n_tokens, dim)")
    return [Hit(int(candidates[i]), float(finer[i])) for i in best(finer, top_k)]


def _score_bits(query: NDArray[Any], documents: BinaryVectors) -> Vector:
    """Score the signs of a query, as cosine or MaxSim with rows of unit length; (n_documents,) float32."""
    signs = quantize_binary([query])
    if signs.dim != documents.dim or (signs.offsets is None) != (documents.offsets is None):
        return score_one(query, documents)  # which says what is wrong
    if signs.offsets is not None:
        return score_one(signs.read(0, signs.n_rows), documents)
    cosines: Vector = 1 - hamming(signs.codes, documents.codes)[0] * np.float32(2 / documents.dim)
    return cosines


def _count_bits(codes: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Count the bits set in each row of (n, n_bytes); (n,) int32."""
    if hasattr(np, "bitwise_count"):  # numpy 2
        # Only rows that are contiguous can be read as words; Fortran-ordered codes are copied.
        words = np.ascontiguousarray(codes).view(np.uint64) if codes.shape[1] % 8 == 0 else codes
        counts = np.bitwise_count(words)  # (n, n_words) uint8
    else:
        counts = np.take(_N_BITS, codes)  # (n, n_bytes) uint8
    summed: NDArray[np.int32] = counts.sum(axis=1, dtype=np.int32)
    return summed


def _take(vectors: Vectors, items: NDArray[np.intp]) -> Vectors:
    if isinstance(vectors, Int8Vectors | BinaryVectors):
        return vectors.take(items)
    if isinstance(vectors, np.ndarray):
        return vectors[items]
    return [vectors[i] for i in items]  # type: ignore[index]  # no other Rows are given out


def _open_either(vectors: Vectors) -> Rows:
    if isinstance(vectors, Rows):
        raise ArgumentError(f"{type(vectors).__name__} are quantised already")
    dense = vectors.ndim <= 2 if isinstance(vectors, np.ndarray) else len(vectors) == 0 or np.ndim(vectors[0]) <= 1
    return open_rows("vectors", vectors, 1 if dense else 2)


def _check_codes(codes: NDArray[Any], dtype: type[np.generic], offsets: Offsets | None) -> None:
    if codes.ndim != 2 or codes.dtype != dtype or codes.shape[1] == 0:
        raise ArgumentError(f"codes must be {dtype.__name__} of shape (n_rows, width), not {codes.dtype} {codes.shape}")
    if offsets is not None:
        check_offsets(offsets, len(codes))


def _rows_of(items: NDArray[np.integer[Any]], offsets: Offsets | None) -> tuple[NDArray[Any], Offsets | None]:
    """Give the rows of some items, and their new offsets."""
    if offsets is None:
        return items, None
    spans = [np.arange(offsets[i], offsets[i + 1]) for i in items]
    return np.concatenate(spans), np.cumsum([0, *map(len, spans)], dtype=np.int64)
