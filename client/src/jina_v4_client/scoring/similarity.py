"""Scores of queries against documents: cosine for dense vectors, MaxSim for multi-vectors, and the order they give.

Documents are read in blocks of a few megabytes, so a corpus may be larger than what fits into memory twice. The tokens
of multi-vectors are never padded to one length: rows lie one after the other and the best of each document is taken
between its own bounds, so there is no padding that could win.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jina_v4_client.errors import ArgumentError
from jina_v4_client.scoring.rows import Rows, Vector, check_widths, checked_blocks, open_rows, read_all

Vectors = NDArray[Any] | Sequence[NDArray[Any]] | Rows

# Of the rows that are read and of the similarities that are made at a time.
_BLOCK_BYTES = 4 * 2**20
_MAX_QUERY_ROWS = 1024  # scored against a block at a time
_ROWS_BEFORE_PATCHES = 4  # <|im_start|>, user, newline, <|vision_start|>
_ROWS_AROUND_PATCHES = 11


@dataclass(frozen=True)
class Hit:
    """A document found.

    Attributes:
        index: its place among the documents.
        score: its cosine or MaxSim with the query.
    """

    index: int
    score: float


def cosine(queries: Vectors, documents: Vectors) -> Vector:
    """Score dense vectors against dense vectors.

    Args:
        queries: (n_queries, dim), a list of (dim,), or one (dim,); of any length, of a float dtype.
        documents: the same, or Int8Vectors or BinaryVectors.

    Returns:
        (n_queries, n_documents) float32, from -1 to 1.

    Raises:
        ArgumentError: nothing to score, widths that differ, multi-vectors, a vector of zeros, NaN or infinity.
    """
    query_rows, document_rows = open_rows("queries", queries, 1), open_rows("documents", documents, 1)
    check_widths(query_rows, document_rows)
    unit, lengths = read_all("queries", query_rows)  # (n_queries, dim), (n_queries,)
    unit = unit / lengths[:, None]
    scores = np.empty((len(unit), document_rows.n_rows), dtype=np.float32)
    n_block_rows = max(1, _BLOCK_BYTES // (4 * document_rows.dim))
    for start, block, block_lengths in checked_blocks("documents", document_rows, n_block_rows):
        scores[:, start : start + len(block)] = (unit @ block.T) / block_lengths  # (n_queries, n)
    return np.clip(scores, -1, 1, out=scores)  # rounding alone leads out of this range


def maxsim(queries: Vectors, documents: Vectors) -> Vector:
    """Score multi-vectors against multi-vectors.

    For each token of the query the best inner product with any token of the document, summed over the query's tokens.

    Args:
        queries: a list of (n_tokens, dim), or one (n_tokens, dim); of a float dtype. The numbers of tokens may differ.
        documents: the same, or Int8Vectors or BinaryVectors.

    Returns:
        (n_queries, n_documents) float32; with rows of unit length from -n_tokens to n_tokens of the query.

    Raises:
        ArgumentError: nothing to score, widths that differ, dense vectors, a row of zeros, NaN or infinity.

    Source: Khattab and Zaharia, ColBERT, 2020, section 3.2.
    """
    query_rows, document_rows = open_rows("queries", queries, 2), open_rows("documents", documents, 2)
    check_widths(query_rows, document_rows)
    tokens, _ = read_all("queries", query_rows)  # (n_query_tokens, dim)
    bounds = query_rows.bounds
    scores = np.empty((len(query_rows), len(document_rows)), dtype=np.float32)
    first = 0
    while first < len(query_rows):  # as many whole queries as go together, one at the least
        last = int(np.searchsorted(bounds, bounds[first] + _MAX_QUERY_ROWS, side="right")) - 1
        last = max(last, first + 1)
        part = tokens[bounds[first] : bounds[last]]  # (n, dim)
        _fill_maxsim(scores[first:last], part, bounds[first:last] - bounds[first], document_rows)
        first = last
    return scores


def rank(query: NDArray[Any], documents: Vectors, top_k: int | None = None) -> list[Hit]:
    """Order documents by their score with one query, best first; equal scores keep the order of the documents.

    Args:
        query: (dim,) for dense documents, scored by cosine, or (n_tokens, dim) for multi-vectors, scored by MaxSim.
        documents: dense (n, dim) or a list of (dim,); multi-vectors, a list of (n_tokens, dim) even if it is one; or
            Int8Vectors or BinaryVectors.
        top_k: how many; all of them if None, or if there are no more.

    Returns:
        The best documents.

    Raises:
        ArgumentError: top_k below 1, or what `cosine` and `maxsim` refuse.
    """
    scores = score_one(query, documents)
    return [Hit(int(i), float(scores[i])) for i in best(scores, check_top_k(top_k))]


def score_one(query: NDArray[Any], documents: Vectors, name: str = "documents") -> Vector:
    """Score one query, dense or multi-vector as its ndim says; (n_documents,) float32."""
    query = np.asarray(query)
    if query.ndim == 1:
        (scores,) = cosine(query, documents)
    elif query.ndim == 2 and isinstance(documents, np.ndarray) and documents.ndim == 2:
        raise ArgumentError(
            f"query has shape {query.shape}, which is a multi-vector, and {name} is one array (n, dim). For dense "
            f"vectors pass query[0], of shape (dim,); for a multi-vector alone pass [{name}]"
        )
    elif query.ndim == 2:
        (scores,) = maxsim(query, documents)
    else:
        raise ArgumentError(f"query has shape {query.shape}; it must be one, of shape (dim,) or (n_tokens, dim)")
    return np.asarray(scores)


def check_top_k(top_k: int | None) -> int | None:
    """Refuse a number of documents that is none."""
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int | np.integer) or top_k < 1):
        raise ArgumentError(f"top_k={top_k!r} is not allowed; give a whole number from 1, or None for all")
    return top_k


def best(scores: Vector, top_k: int | None) -> NDArray[np.intp]:
    """Give the places of the highest scores (n,), best first, equal ones in their order: (min(n, top_k),)."""
    places = np.arange(len(scores))
    if top_k is not None and top_k < len(scores):
        threshold = np.partition(scores, len(scores) - top_k)[len(scores) - top_k]
        places = np.flatnonzero(scores >= threshold)
    return places[np.argsort(-scores[places], kind="stable")][:top_k]


def similarity_map(
    query: NDArray[Any],
    image: NDArray[Any],
    grid: tuple[int, int],
    *,
    n_rows_before: int = _ROWS_BEFORE_PATCHES,
    n_rows_around: int = _ROWS_AROUND_PATCHES,
) -> Vector:
    r"""Show where in an image each token of a query finds what it looks for.

    Args:
        query: (n_query_tokens, dim), the multi-vector of a text.
        image: (rows * columns + n_rows_around, dim), the whole multi-vector of an image, not pooled.
        grid: rows and columns of the image's patches, from `image_grid`.
        n_rows_before: how many rows of the image's multi-vector come before its first patch: the tokens of
            ``<|im_start|>user\n<|vision_start|>``.
        n_rows_around: how many are no patches: those, and the tokens of
            ``<|vision_end|>Describe the image.<|im_end|>\n``.

    Returns:
        (n_query_tokens, rows, columns) float32, inner products; with rows of unit length from -1 to 1.

    Raises:
        ArgumentError: the grid does not fit to the number of rows, or what `maxsim` refuses.
    """
    query_rows, image_rows = open_rows("query", query, 2), open_rows("image", image, 2)
    check_widths(query_rows, image_rows)
    if (len(query_rows), len(image_rows)) != (1, 1):
        raise ArgumentError("a similarity map is made of one query and one image, each (n_tokens, dim)")
    rows, columns = grid
    if min(grid) < 1 or not 0 <= n_rows_before <= n_rows_around:
        raise ArgumentError(f"no patches: grid {grid}, {n_rows_before} rows before them of {n_rows_around} around")
    if image_rows.n_rows != rows * columns + n_rows_around:
        raise ArgumentError(
            f"an image of {rows} x {columns} patches has {rows * columns + n_rows_around} rows, this one has"
            f" {image_rows.n_rows}: another image, another max_pixels, or a pooled multi-vector"
        )
    tokens, _ = read_all("query", query_rows)  # (n_query_tokens, dim)
    patches = read_all("image", image_rows)[0][n_rows_before : n_rows_before + rows * columns]  # (rows * columns, dim)
    similarity: Vector = (tokens @ patches.T).reshape(len(tokens), rows, columns)
    return similarity


def _fill_maxsim(scores: Vector, tokens: Vector, query_starts: NDArray[np.int64], documents: Rows) -> None:
    """Fill (n_queries, n_documents) with the scores of tokens (n, dim), whose queries begin at query_starts."""
    bounds = documents.bounds
    unfinished = None  # (n,): the best so far of the document that the block before was cut in
    n_block_rows = max(1, _BLOCK_BYTES // (4 * max(documents.dim, len(tokens))))
    for start, block, _ in checked_blocks("documents", documents, n_block_rows):
        stop = start + len(block)
        first = int(np.searchsorted(bounds, start, side="right")) - 1
        last = int(np.searchsorted(bounds, stop, side="left"))
        starts = np.maximum(bounds[first:last] - start, 0)  # (n_documents_here,)
        maxima = np.maximum.reduceat(tokens @ block.T, starts, axis=1)  # (n, n_documents_here)
        if unfinished is not None:
            maxima[:, 0] = np.maximum(maxima[:, 0], unfinished)
        unfinished = maxima[:, -1].copy() if bounds[last] > stop else None
        n_finished = maxima.shape[1] - (unfinished is not None)
        if n_finished:
            sums = np.add.reduceat(maxima[:, :n_finished], query_starts, axis=0)  # (n_queries, n_finished)
            scores[:, first : first + n_finished] = sums
