"""Made-up vectors of pages and queries. They say how methods compare, not what is lost on anybody's documents."""

from dataclasses import dataclass

import numpy as np
from unit_rows import to_unit


@dataclass(frozen=True)
class MadeUp:
    """Vectors of pages around topics, and of queries, each a page with noise.

    Attributes:
        dense: (n, 2048), the queries' first.
        multi: n of (n_tokens, 128).
    """

    dense: np.ndarray
    multi: list[np.ndarray]


def make_up(n_pages: int, n_queries: int) -> MadeUp:
    """Dense vectors span 64 dimensions that weigh less and less; a token is one of its page's 12 words, and noise."""
    random = np.random.default_rng(7)
    weights = (1 + np.arange(64)) ** -0.5
    topics = random.standard_normal((n_pages // 20, 64)) * weights
    pages = topics[random.integers(len(topics), size=n_pages)]
    pages = pages + 0.6 * random.standard_normal((n_pages, 64)) * weights
    origins = random.choice(n_pages, n_queries, replace=False)
    queries = pages[origins] + 0.3 * random.standard_normal((n_queries, 64)) * weights
    subjects = np.concatenate([queries, pages])  # (n, 64)
    dense = to_unit(subjects @ random.standard_normal((64, 2048)))
    turn, words = random.standard_normal((64, 128)) / 4, random.standard_normal((n_pages, 12, 128))

    def tokens(subject: np.ndarray, page: int, n: int) -> np.ndarray:
        noise = 0.7 * random.standard_normal((n, 128))
        return to_unit(subject @ turn + words[page, random.integers(12, size=n)] + noise)

    multi = [tokens(subject, page, 8) for subject, page in zip(queries, origins, strict=True)]
    multi += [tokens(subject, page, int(random.integers(20, 60))) for page, subject in enumerate(pages)]
    return MadeUp(dense, multi)
