"""Makes multi-vectors smaller: nearly equal rows are averaged, as by the client's `pool_tokens`.

Source: Clavie, Chaffin, Adams, Reducing the Footprint of Multi-Vector Retrieval with Minimal Performance Impact via
Token Pooling, 2024.
"""

from importlib import import_module

import numpy as np
from numpy.typing import NDArray

# Time and memory of clustering grow with the square of the rows, and it holds Python's lock. A page has up to 779 rows;
# longer sequences are pooled part by part.
_MAX_CLUSTERED_ROWS = 1024
_NO_DIRECTION = 1e-6  # a shorter mean is nothing but rounding errors

Floats = NDArray[np.float32]


def pool_tokens(tokens: Floats, pool_factor: int) -> Floats:
    """Make a multi-vector smaller: rows that are near each other become one, their mean at unit length.

    Args:
        tokens: (n_tokens, dim), with rows of unit length.
        pool_factor: how many rows become one, on average; at least 2.

    Returns:
        (n_pooled, dim) with rows of unit length, in the order of their first tokens. n_pooled is
        n_tokens // pool_factor, at least 1. More than 1024 rows are pooled in parts, so 1025 rows become 513.
    """
    unit: Floats = tokens / np.sqrt(np.einsum("nd,nd->n", tokens, tokens))[:, None]
    if len(unit) < 2:
        return unit
    n_part_rows = max(1, _MAX_CLUSTERED_ROWS // pool_factor) * pool_factor
    parts = [unit[start : start + n_part_rows] for start in range(0, len(unit), n_part_rows)]
    return np.concatenate([_cluster_means(part, max(1, len(part) // pool_factor)) for part in parts])


def _cluster_means(rows: Floats, n_clusters: int) -> Floats:
    """Cluster rows (n, dim); return the clusters' means, at unit length and in the order of their first rows."""
    if len(rows) == 1:
        return rows
    hierarchy = import_module("scipy.cluster.hierarchy")  # slow to import, and few requests need it
    tree = hierarchy.linkage(rows, method="ward")
    labels = hierarchy.cut_tree(tree, n_clusters)[:, 0]  # (n,); fcluster returns fewer where distances are equal
    _, firsts, clusters = np.unique(labels, return_index=True, return_inverse=True)
    sums = np.zeros((len(firsts), rows.shape[1]))
    np.add.at(sums, clusters, rows)  # (n_clusters, dim)
    means = sums / np.bincount(clusters)[:, None]
    lengths = np.linalg.norm(means, axis=1, keepdims=True)  # (n_clusters, 1)
    # Opposite rows have no mean direction: the first of them represents all.
    unit = np.where(lengths > _NO_DIRECTION, means / np.maximum(lengths, _NO_DIRECTION), rows[firsts])
    ordered: Floats = unit[np.argsort(firsts)].astype(np.float32)
    return ordered
