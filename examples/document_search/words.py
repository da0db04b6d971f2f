"""Which rows of a query's multi-vector belong to which of its words.

The client has no tokenizer, and the servers have no route for one. But they count: the tokenizer cuts at spaces before
anything else, so the beginnings of a query, cut between two words, have the tokens of the whole query up to there.
The number of rows of each beginning says where its last word ends. Tokens within a word stay unnamed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Word:
    """A word of a query.

    Attributes:
        start: its first row in the query's multi-vector.
        stop: the row behind its last.
    """

    text: str
    start: int
    stop: int


def beginnings(query: str, n_words: int) -> list[str]:
    """Give the texts whose multi-vectors `find_words` needs.

    Args:
        query: words with one space between them.
        n_words: how many are looked at.

    Returns:
        Nothing, the first word, the first two, and so on.
    """
    words = query.split(" ")
    return [" ".join(words[:n]) for n in range(min(n_words, len(words)) + 1)]


def find_words(texts: Sequence[str], multivectors: Sequence[NDArray[np.float32]]) -> list[Word]:
    """Find the rows of the words.

    Args:
        texts: from `beginnings`.
        multivectors: theirs, embedded as queries.
    """
    stops = [len(rows) for rows in multivectors]
    # Before nothing there are the prefix's tokens ("Query" and ":") and its space, which belongs to the first word.
    stops[0] -= 1
    names = texts[-1].split(" ")
    return [Word(name, *bounds) for name, *bounds in zip(names, stops[:-1], stops[1:], strict=True)]
