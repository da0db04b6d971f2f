"""Scores of documents for queries: MaxSim of multi-vectors, or the cosine of dense vectors.

MaxSim is here a mean: for each token of the query, the largest inner product with any token of the document. The
published sum is this mean times the number of the query's tokens. The order is the same, and with the mean, scores of
different queries can be compared. All vectors have unit length, so a score is between -1 and 1.
"""

from collections.abc import Sequence

import numpy as np

from jina_v4_serve.api.request import Output
from jina_v4_serve.api.vectors import Floats, Vectors

_BLOCK_BYTES = 4 * 2**20  # of inner products at a time; two of the longest texts have 4 GiB


def scores(queries: Sequence[Vectors], documents: Sequence[Vectors], by: Output) -> Floats:
    """Score each document for its query.

    Args:
        queries: one for all documents, or one for each.
        documents: with the vectors to compare.
        by: multivector or dense.

    Returns:
        (n_documents,) float32.
    """
    if len(queries) == 1:
        queries = [queries[0]] * len(documents)
    score = maxsim if by == "multivector" else _cosine
    return np.array([score(*pair) for pair in zip(queries, documents, strict=True)], dtype=np.float32)


def maxsim(query: Vectors, document: Vectors) -> np.float32:
    """Return the mean of the best inner products of the query's tokens."""
    tokens, rows = query.multivector, document.multivector  # (n_query_tokens, 128), (n_tokens, 128)
    step = max(1, _BLOCK_BYTES // (4 * len(rows)))
    starts = range(0, len(tokens), step)
    best = np.concatenate([(tokens[start : start + step] @ rows.T).max(axis=1) for start in starts])
    return np.float32(best.mean())  # of (n_query_tokens,)


def _cosine(query: Vectors, document: Vectors) -> np.float32:
    return np.float32(query.dense[0] @ document.dense[0])


def order(scores: Floats, top_n: int | None) -> list[int]:
    """Return the indices of the highest scores, best first; equal scores keep their order."""
    indices: list[int] = np.argsort(-scores, kind="stable")[:top_n].tolist()
    return indices
