"""Rankings: `POST /v1/rerank` (Jina's form), `/v2/rerank` (the same body, Cohere's reply) and `/v1/score` (vLLM's).

Queries get the query prompt and documents the passage prompt; in text-matching both are `Query: `. With a model's name
that ends with `-none` neither gets a prefix.

Sources: Jina's API reference, whose replies hold the documents that are texts; Cohere's API reference and its Python
client (7.3); vLLM's `entrypoints/pooling/scoring` (0.32), which has Jina's form at both routes of rerank. Its score has
one query for all documents, or one query per document.
"""

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from jina_v4_serve.api.errors import invalid, shorten
from jina_v4_serve.api.forms.cohere import meta
from jina_v4_serve.api.forms.common import agreed, check_max_pixels, settle_task, text_length, text_prompt
from jina_v4_serve.api.forms.foreign import check_foreign
from jina_v4_serve.api.forms.items import check_not_empty, read_items
from jina_v4_serve.api.forms.reply import usage
from jina_v4_serve.api.forms.schema import ITEM, ITEMS, Body, Priority
from jina_v4_serve.api.ranking import order, scores
from jina_v4_serve.api.request import FIRST, EmbedRequest, Item, Limits, RankRequest
from jina_v4_serve.api.tasks import NO_PREFIX, prompt_of_model, prompt_of_task
from jina_v4_serve.api.vectors import Floats, Vectors
from jina_v4_serve.facts import model_name

_RANK_FIELDS = "rank_fields"  # a field of Cohere's first version, for documents that are objects
_Items = Annotated[Any, WithJsonSchema(ITEMS)]


class RankingBody(Body):
    """The fields of all rankings."""

    model: str | None = Field(None, description="jina-embeddings-v4, optionally with -{task} and then -none.")
    task: str | None = Field(None, description="text-matching, retrieval, code")
    by: Literal["multivector", "dense"] | None = Field(
        None, description="multivector, the default, is MaxSim; dense is cosine."
    )
    truncate: bool | None = Field(None, description="Cut the tail of a text over the limit instead of refusing it.")
    max_tokens_per_query: int | None = Field(None, ge=0, description="Cut queries to this many tokens; 0 cuts none.")
    max_tokens_per_doc: int | None = Field(None, ge=0, description="Cut documents to this many tokens; 0 cuts none.")
    max_pixels: int | None = Field(None, ge=1, description="Scale images down to this many pixels.")
    priority: Priority = None


class RerankBody(RankingBody):
    """The fields of `POST /v1/rerank` and `/v2/rerank`."""

    query: Annotated[Any, WithJsonSchema(ITEM)] = Field(description="A text or an image.")
    documents: Annotated[Any, WithJsonSchema({"type": "array", "items": ITEM, "minItems": 1})] = Field(
        description="Texts and images, mixed."
    )
    top_n: int | None = Field(None, ge=1, description="Return this many of the best; all if absent.")
    return_documents: bool | None = Field(
        None, description="Whether each result holds its document. If absent: on /v1/rerank texts do, images do not."
    )


class ScoreBody(RankingBody):
    """The fields of `POST /v1/score`."""

    queries: _Items = Field(None, description="A text or an image for all documents, or a list with one for each.")
    text_1: _Items = Field(None, description="Another name of queries.")
    data_1: _Items = Field(None, description="Another name of queries.")
    documents: _Items = Field(None, description="A text, an image or a list of them.")
    text_2: _Items = Field(None, description="Another name of documents.")
    data_2: _Items = Field(None, description="Another name of documents.")
    items: _Items = Field(None, description="Another name of documents.")


def settle_rerank(request: RerankBody, limits: Limits) -> RankRequest:
    """Make the inner request of a rerank body.

    Raises:
        ApiError: a field is wrong; the message names the field, its value and the allowed values.
    """
    if (request.model_extra or {}).get(_RANK_FIELDS) is not None:
        raise invalid(_RANK_FIELDS, f"{_RANK_FIELDS} is not offered here: a document is a text or an image")
    if not isinstance(request.query, str | dict):
        raise invalid("query", "query is one text or image", request.query)
    queries = read_items(request.query, "query", limits.max_items)
    documents = read_items(request.documents, "documents", limits.max_items)
    sides = _settle_sides(request, queries, documents, limits)
    return RankRequest(*sides, top_n=request.top_n, return_documents=request.return_documents)


def settle_score(request: ScoreBody, limits: Limits) -> RankRequest:
    """Make the inner request of a score body.

    Raises:
        ApiError: a field is wrong; the message names the field, its value and the allowed values.
    """
    queries = _any_items(request, limits, "queries", "text_1", "data_1")
    documents = _any_items(request, limits, "documents", "text_2", "data_2", "items")
    if len(queries) not in (1, len(documents)):
        message = f"there are {len(queries)} queries and {len(documents)} documents; send one query, or one for each"
        raise invalid("queries", message)
    return RankRequest(*_settle_sides(request, queries, documents, limits))


def write_rerank(request: RankRequest, vectors: Sequence[Vectors], request_id: str) -> dict[str, Any]:
    """Return the content of Jina's reply. The vectors are the queries', then the documents'."""
    return {
        "id": request_id,
        "object": "list",
        "model": request.documents.model,
        "usage": usage(vectors),
        "results": _results(request, vectors, texts=request.return_documents is not False),
    }


def write_cohere(request: RankRequest, vectors: Sequence[Vectors], request_id: str) -> dict[str, Any]:
    """Return the content of Cohere's reply."""
    return {
        "id": request_id,
        "results": _results(request, vectors, texts=request.return_documents is True),
        "meta": meta([*request.queries.items, *request.documents.items], vectors),
    }


def write_score(request: RankRequest, vectors: Sequence[Vectors], request_id: str) -> dict[str, Any]:
    """Return the content of vLLM's reply."""
    values = _scores(request, vectors)  # (n_documents,)
    return {
        "id": request_id,
        "object": "list",
        "created": int(time.time()),
        "model": request.documents.model,
        "data": [{"index": i, "object": "score", "score": score} for i, score in enumerate(values)],
        "usage": usage(vectors),
    }


def _any_items(request: ScoreBody, limits: Limits, *names: str) -> list[Item]:
    name, value = agreed(request, *names)
    if value is None:
        raise invalid(name, f"{name} is required; it is a text, an item or a list of them")
    return read_items(value, name, limits.max_items)


def _settle_sides(
    request: RankingBody, queries: Sequence[Item], documents: Sequence[Item], limits: Limits
) -> tuple[EmbedRequest, EmbedRequest]:
    """Make the two requests of a ranking: for the queries and for the documents."""
    ignored = check_foreign(request, "rankings")
    task = settle_task(request.task, request.model, limits)
    prompts = {
        "task": prompt_of_task(request.task, task),
        "model": prompt_of_model(request.model, task, limits.model_names),
    }
    for name, prompt in prompts.items():
        if prompt not in (None, NO_PREFIX):
            value = getattr(request, name)
            message = f"{name}={shorten(value)} has the prompt {prompt}; a ranking uses both prompts: leave it out"
            raise invalid(name, message, value)
    check_max_pixels(request.max_pixels, limits)
    for item in (*queries, *documents):
        if item.pdf is not None:
            raise invalid(item.path, f"{item.path}: a PDF file has many pages; rank texts and images")

    def side(items: Sequence[Item], prompt_name: str, field: str, unknown: Sequence[str]) -> EmbedRequest:
        used, prefix = text_prompt(prompts["model"] or prompt_name, limits.prompts[task])
        if not prefix:
            check_not_empty(items)
        length = getattr(request, field) or None
        return EmbedRequest(
            task=task,
            model=request.model or model_name(task),
            items=items,
            prompt_name=used,
            prefix=prefix,
            outputs=frozenset({request.by or "multivector"}),
            max_length=text_length(field, length, limits, cut=request.truncate, switch="truncate=false", lowest=0),
            max_pixels=request.max_pixels,
            priority=request.priority or FIRST,
            ignored=unknown,
        )

    return side(queries, "query", "max_tokens_per_query", ()), side(documents, "passage", "max_tokens_per_doc", ignored)


def _scores(request: RankRequest, vectors: Sequence[Vectors]) -> Floats:
    n_queries = len(request.queries.items)
    (by,) = request.queries.outputs
    return scores(vectors[:n_queries], vectors[n_queries:], by)


def _results(request: RankRequest, vectors: Sequence[Vectors], *, texts: bool) -> list[dict[str, Any]]:
    values = _scores(request, vectors)  # (n_documents,)
    results: list[dict[str, Any]] = []
    for i in order(values, request.top_n):
        item = request.documents.items[i]
        is_shown = texts if item.text is not None else request.return_documents is True
        document = {"text": item.text} if item.text is not None else {"image": item.image}
        results.append({"index": i, "relevance_score": values[i], **({"document": document} if is_shown else {})})
    return results
