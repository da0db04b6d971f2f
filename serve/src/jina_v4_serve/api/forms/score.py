"""`POST /v1/score`, vLLM's form: pairs of a query and a document, in order.

Source: vLLM's `entrypoints/pooling/scoring` (0.32). As there, one query goes with every document, or each with its own.
"""

import time
from collections.abc import Sequence
from typing import Annotated, Any

import orjson
from pydantic import Field, WithJsonSchema

from jina_v4_serve.api.errors import invalid
from jina_v4_serve.api.forms.items import read_items
from jina_v4_serve.api.forms.names import agreed
from jina_v4_serve.api.forms.pairs import RankingBody, read_sides
from jina_v4_serve.api.forms.schema import ITEMS, parse
from jina_v4_serve.api.ranking import scores
from jina_v4_serve.api.request import Item, Limits, RankRequest
from jina_v4_serve.api.vectors import Vectors

_QUERIES = ("queries", "text_1", "data_1")
_DOCUMENTS = ("documents", "text_2", "data_2", "items")
_Items = Annotated[Any, WithJsonSchema(ITEMS)]


class ScoreBody(RankingBody):
    """The fields of `POST /v1/score`."""

    queries: _Items = Field(None, description="A text or an image for all documents, or a list with one for each.")
    text_1: _Items = Field(None, description="Another name of queries.")
    data_1: _Items = Field(None, description="Another name of queries.")
    documents: _Items = Field(None, description="A text, an image or a list of them.")
    text_2: _Items = Field(None, description="Another name of documents.")
    data_2: _Items = Field(None, description="Another name of documents.")
    items: _Items = Field(None, description="Another name of documents.")


def read(body: bytes, limits: Limits) -> RankRequest:
    """Read a request body.

    Raises:
        ApiError: naming the field, what it holds and what is allowed.
    """
    request = parse(body, ScoreBody)
    queries, documents = (_items(request, names, limits) for names in (_QUERIES, _DOCUMENTS))
    if len(queries) not in (1, len(documents)):
        message = f"there are {len(queries)} queries and {len(documents)} documents; send one query, or one for each"
        raise invalid("queries", message)
    return RankRequest(*read_sides(request, queries, documents, limits), by=request.by or "multivector")


def write(request: RankRequest, vectors: Sequence[Vectors], _: str, request_id: str) -> tuple[bytes, str]:
    """Write the reply.

    Args:
        request: that is answered.
        vectors: of the queries, then of the documents.
        request_id: of the reply.

    Returns:
        The body and its media type.
    """
    n_queries = len(request.queries.items)
    found = scores(vectors[:n_queries], vectors[n_queries:], request.by)  # (n_documents,)
    n_tokens = sum(each.n_tokens for each in vectors)
    content = {
        "id": request_id,
        "object": "list",
        "created": int(time.time()),
        "model": request.documents.model,
        "data": [{"index": i, "object": "score", "score": score} for i, score in enumerate(found)],
        "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
    }
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), "application/json"


def _items(request: ScoreBody, names: Sequence[str], limits: Limits) -> list[Item]:
    name, value = agreed({name: getattr(request, name) for name in names})
    if value is None:
        raise invalid(name, f"{name} is required; it is a text, an item or a list of them")
    return read_items(value, limits.max_items, None, name)
