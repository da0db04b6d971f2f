"""A query: its vectors, the pages that it finds, and where on a page it is found."""

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from jina_v4_client import EmbeddingsClient
from jina_v4_client.scoring import similarity_map
from numpy.typing import NDArray
from PIL import Image

from document_search.documents import read_document
from document_search.errors import SearchError, UsageError
from document_search.store import PROBE_TEXT, Found, Store, Vector
from document_search.words import Word, beginnings, find_words

Map = NDArray[np.float32]


class By(StrEnum):
    """How pages are found."""

    DENSE = "dense"
    MULTIVECTOR = "multivector"
    BOTH = "both"


@dataclass(frozen=True)
class Query:
    """What is looked for.

    Attributes:
        dense: (dim,).
        multivector: (n_tokens, 128).
        words: its words and their rows, the first ones; none of a picture.
    """

    dense: Vector
    multivector: Vector
    words: tuple[Word, ...] = ()


@dataclass(frozen=True)
class WordMap:
    """Where on a page a word was found.

    Attributes:
        name: the word, or "the whole query".
        values: (rows, columns), the mean of its tokens' similarity to each patch.
        score: its part of the page's MaxSim; the whole MaxSim for the whole query.
    """

    name: str
    values: Map
    score: float


def embed_text(client: EmbeddingsClient, store: Store, text: str, n_words: int) -> Query:
    """Embed a query in words.

    Args:
        client: of a server of the retrieval task.
        store: whose model the server must have.
        text: the query; white space is not part of it.
        n_words: how many of its words get maps of their own.

    Raises:
        UsageError: the query is empty, or the index is another model's.
    """
    text = " ".join(text.split())  # as `words` needs it, and as the model has seen most of its texts
    if not text:
        raise UsageError("the query is empty")
    dense, probe = client.encode_text([text, PROBE_TEXT])
    store.check_model(probe)
    texts = beginnings(text, n_words)
    multivector, *parts = client.encode_text([text, *texts], return_multivector=True)
    return Query(dense, multivector, tuple(find_words(texts, parts)))


def embed_picture(client: EmbeddingsClient, store: Store, file: bytes) -> Query:
    """Embed a query that is a picture.

    Args:
        client: of a server of the retrieval task.
        store: whose model the server must have.
        file: the content of a picture's file.

    Raises:
        UsageError: the index is another model's.
    """
    store.check_model(client.encode_text(PROBE_TEXT))
    (both,) = client.encode_both([file])
    return Query(both.dense, both.multivector)


def find(store: Store, query: Query, by: By, top_k: int, n_candidates: int) -> list[Found]:
    """Find the pages that answer a query, best first."""
    if by is By.DENSE:
        return store.by_dense(query.dense, top_k)
    if by is By.MULTIVECTOR:
        return store.by_multivector(query.multivector, top_k)
    return store.by_both(query.dense, query.multivector, top_k, n_candidates)


def find_on_page(store: Store, query: Query, page: Found) -> list[WordMap]:
    """Find where on a page a query is found: first the whole of it, then each of its words.

    A word of several tokens has the mean of their maps. The rows of the prefix are in no map: they are in every query.
    """
    rows = store.multivector(page)  # (n_rows, 128)
    maps = similarity_map(query.multivector, rows, page.grid)  # (n_tokens, rows, columns)
    best = (query.multivector @ rows.T).max(axis=1)  # (n_tokens,), whose sum is MaxSim
    begin = query.words[0].start if query.words else 0
    whole = WordMap("the whole query", maps[begin:].mean(axis=0), float(best.sum()))
    return [
        whole,
        *(
            WordMap(word.text, maps[word.start : word.stop].mean(axis=0), float(best[word.start : word.stop].sum()))
            for word in query.words
        ),
    ]


def render_found(page: Found) -> Image.Image:
    """Render a page that was found as it was when it was embedded.

    Raises:
        SearchError: its file has changed, or cannot be read.
    """
    document = read_document(page.source.file)
    if document.digest != page.source.digest:
        raise SearchError(f"{document.path} has changed since it was indexed, so there is no picture: index it again")
    return document.page(page.number, page.source.scale)
