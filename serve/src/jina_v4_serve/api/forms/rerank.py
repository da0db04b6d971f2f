"""`POST /v1/rerank`, Jina's form, and `/v2/rerank`, Cohere's: one body, two replies.

Sources: Jina's API reference, whose replies hold the documents that are texts; Cohere's API reference and its Python
client (7.3); vLLM's `entrypoints/pooling/scoring` (0.32), which has the first form at both routes.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import orjson
from pydantic import Field, WithJsonSchema

from jina_v4_serve.api.errors import invalid
from jina_v4_serve.api.forms.cohere import meta
from jina_v4_serve.api.forms.items import read_items
from jina_v4_serve.api.forms.pairs import RankingBody, read_sides
from jina_v4_serve.api.forms.schema import ITEM, parse
from jina_v4_serve.api.ranking import order, scores
from jina_v4_serve.api.request import Item, Limits, RankRequest
from jina_v4_serve.api.vectors import Vectors

_RANK_FIELDS = "rank_fields"  # of Cohere's first version, for documents that are objects


class RerankBody(RankingBody):
    """The fields of `POST /v1/rerank` and `/v2/rerank`."""

    query: Annotated[Any, WithJsonSchema(ITEM)] = Field(description="A text or an image.")
    documents: Annotated[Any, WithJsonSchema({"type": "array", "items": ITEM, "minItems": 1})] = Field(
        description="Texts and images, mixed."
    )
    top_n: int | None = Field(None, ge=1, description="Return so many of the best; all if absent.")
    return_documents: bool | None = Field(
        None, description="Whether each result holds its document. If absent: on /v1/rerank texts do, images do not."
    )


def read(body: bytes, limits: Limits) -> RankRequest:
    """Read a request body.

    Raises:
        ApiError: naming the field, what it holds and what is allowed.
    """
    request = parse(body, RerankBody)
    if (request.model_extra or {}).get(_RANK_FIELDS) is not None:
        message = f"{_RANK_FIELDS} is not offered here: a document is a text or an image"
        raise invalid(_RANK_FIELDS, message)
    if not isinstance(request.query, str | dict):
        raise invalid("query", "query is one text or image", request.query)
    queries = read_items(request.query, limits.max_items, None, "query")
    documents = read_items(request.documents, limits.max_items, None, "documents")
    return RankRequest(
        *read_sides(request, queries, documents, limits),
        by=request.by or "multivector",
        top_n=request.top_n,
        return_documents=request.return_documents,
    )


def write(request: RankRequest, vectors: Sequence[Vectors], _: str, request_id: str) -> tuple[bytes, str]:
    """Write Jina's reply.

    Args:
        request: that is answered.
        vectors: of the query, then of the documents.
        request_id: of the reply.

    Returns:
        The body and its media type.
    """
    n_tokens = sum(each.n_tokens for each in vectors)
    content = {
        "id": request_id,
        "object": "list",
        "model": request.documents.model,
        "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
        "results": _results(request, vectors, texts=request.return_documents is not False),
    }
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), "application/json"


def write_as_cohere(request: RankRequest, vectors: Sequence[Vectors], _: str, request_id: str) -> tuple[bytes, str]:
    """Write Cohere's reply; arguments and result as of `write`."""
    content = {
        "id": request_id,
        "results": _results(request, vectors, texts=request.return_documents is True),
        "meta": meta([*request.queries.items, *request.documents.items], vectors),
    }
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), "application/json"


def _results(request: RankRequest, vectors: Sequence[Vectors], *, texts: bool) -> list[dict[str, Any]]:
    found = scores(vectors[:1], vectors[1:], request.by)  # (n_documents,)
    results: list[dict[str, Any]] = []
    for i in order(found, request.top_n):
        document = _document(request.documents.items[i], texts=texts, images=request.return_documents is True)
        results.append({"index": i, "relevance_score": found[i], **document})
    return results


def _document(item: Item, *, texts: bool, images: bool) -> dict[str, Any]:
    if item.text is not None:
        return {"document": {"text": item.text}} if texts else {}
    return {"document": {"image": item.image}} if images else {}
