"""Fewer rows for a multi-vector: tokens that say nearly the same are averaged.

Ward's clustering is scipy's; ``pip install 'jina-v4-client[pooling]'`` brings it. It is imported at the first call.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from jina_v4_client.errors import ArgumentError
from jina_v4_client.scoring.rows import Vector, checked_blocks, open_rows

# Clustering takes time and memory with the square of its rows, and holds Python's lock. A page has up to 779; longer
# sequences are pooled part by part.
_MAX_CLUSTERED_ROWS = 1024
_NO_DIRECTION = 1e-6  # the length of a mean below which nothing but rounding is left of its rows


@overload
def pool_tokens(multivectors: NDArray[Any], pool_factor: int, *, n_protected: int = 0) -> Vector: ...
@overload
def pool_tokens(multivectors: Sequence[NDArray[Any]], pool_factor: int, *, n_protected: int = 0) -> list[Vector]: ...
def pool_tokens(
    multivectors: NDArray[Any] | Sequence[NDArray[Any]], pool_factor: int, *, n_protected: int = 0
) -> Vector | list[Vector]:
    """Make multi-vectors of documents smaller: rows near to one another become one, their mean at unit length.

    Queries are left as they are: their rows are few, and each one counts in MaxSim.

    Args:
        multivectors: one (n_tokens, dim), with rows of unit length, or a list of them.
        pool_factor: how many rows become one, on average; 1 changes nothing.
        n_protected: so many rows at the beginning are kept as they are.

    Returns:
        One (n_pooled, dim) float32 with rows of unit length, or a list of them. Protected rows come first, then the
        means in the order of their first tokens. n_pooled is n_protected + (n_tokens - n_protected) // pool_factor, but
        one mean at the least. Parts of up to 1024 rows are pooled one by one, each to one mean at the least: with a
        factor of 2, 1025 rows become 513.

    Raises:
        ArgumentError: an argument is not allowed, scipy is missing, or rows that `maxsim` would refuse.

    Source: Clavie, Chaffin, Adams, Reducing the Footprint of Multi-Vector Retrieval with Minimal Performance Impact via
    Token Pooling, 2024.
    """
    for name, value, at_least in (("pool_factor", pool_factor, 1), ("n_protected", n_protected, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
            raise ArgumentError(f"{name}={value!r} is not allowed; give a whole number from {at_least}")
    rows = open_rows("multivectors", multivectors, 2)
    pooled = [
        _pool(tokens / lengths[:, None], pool_factor, n_protected)  # of (n_tokens, dim)
        for _, tokens, lengths in checked_blocks("multivectors", rows, None)
    ]
    return pooled[0] if isinstance(multivectors, np.ndarray) and multivectors.ndim == 2 else pooled


def _pool(tokens: Vector, pool_factor: int, n_protected: int) -> Vector:
    """Pool one multi-vector (n_tokens, dim) of unit rows."""
    kept, rest = tokens[:n_protected], tokens[n_protected:]
    if pool_factor == 1 or len(rest) < 2:
        return tokens.copy()
    n_part_rows = max(1, _MAX_CLUSTERED_ROWS // pool_factor) * pool_factor
    parts = [rest[start : start + n_part_rows] for start in range(0, len(rest), n_part_rows)]
    return np.concatenate([kept, *(_cluster_means(part, max(1, len(part) // pool_factor)) for part in parts)])


def _cluster_means(rows: Vector, n_clusters: int) -> Vector:
    """Give the means of so many clusters of rows (n, dim), at unit length and in the order of their first rows."""
    if len(rows) == 1:
        return rows
    hierarchy = _hierarchy()
    tree = hierarchy.linkage(rows, method="ward")
    labels = hierarchy.cut_tree(tree, n_clusters)[:, 0]  # (n,); fcluster gives fewer where distances are equal
    _, firsts, clusters = np.unique(labels, return_index=True, return_inverse=True)
    sums = np.zeros((len(firsts), rows.shape[1]))
    np.add.at(sums, clusters, rows)  # (n_clusters, dim)
    means = sums / np.bincount(clusters)[:, None]
    lengths = np.linalg.norm(means, axis=1, keepdims=True)  # (n_clusters, 1)
    # Opposite rows have no mean direction: the first of them stands for all.
    unit = np.where(lengths > _NO_DIRECTION, means / np.maximum(lengths, _NO_DIRECTION), rows[firsts])
    ordered: Vector = unit[np.argsort(firsts)].astype(np.float32)
    return ordered


def _hierarchy() -> Any:
    try:
        return import_module("scipy.cluster.hierarchy")
    except ImportError as error:
        raise ArgumentError(
            "token pooling needs scipy, which is not installed: pip install 'jina-v4-client[pooling]'"
        ) from error
