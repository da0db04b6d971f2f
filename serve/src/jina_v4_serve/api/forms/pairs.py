"""What the forms of rankings share: their common fields, and the two sides of a ranking.

Queries get the query prompt and documents the passage prompt; in text-matching both are `Query: `. A model's name that
ends with `-none` puts nothing before either.
"""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from jina_v4_serve.api.errors import invalid, shorten
from jina_v4_serve.api.forms.foreign import check_foreign
from jina_v4_serve.api.forms.items import check_not_empty
from jina_v4_serve.api.forms.names import check_max_pixels, text_prompt
from jina_v4_serve.api.forms.schema import EmbeddingsBody, Priority
from jina_v4_serve.api.request import FIRST, By, EmbedRequest, Item, Limits
from jina_v4_serve.api.tasks import NO_PREFIX, choose_task, prompt_of_model, prompt_of_task
from jina_v4_serve.facts import model_name


class RankingBody(BaseModel):
    """The fields that all forms of rankings have."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = Field(None, description="jina-embeddings-v4, optionally with -{task} and then -none.")
    task: str | None = Field(None, description="text-matching, retrieval, code")
    by: By | None = Field(None, description="multivector, the default, is MaxSim; dense is cosine.")
    truncate: bool | None = Field(None, description="Cut the tail of a text over the limit instead of refusing it.")
    max_tokens_per_query: int | None = Field(None, ge=0, description="Cut queries to so many tokens; 0 cuts none.")
    max_tokens_per_doc: int | None = Field(None, ge=0, description="Cut documents to so many tokens; 0 cuts none.")
    max_pixels: int | None = Field(None, ge=1, description="Scale images down to so many pixels.")
    priority: Priority = None


def read_sides(
    request: RankingBody, queries: Sequence[Item], documents: Sequence[Item], limits: Limits
) -> tuple[EmbedRequest, EmbedRequest]:
    """Settle what is embedded for a ranking.

    Args:
        request: what its fields say.
        queries: of the request.
        documents: of the request.
        limits: of this server.

    Returns:
        The queries and the documents.

    Raises:
        ApiError: naming the field, what it holds and what is allowed.
    """
    extra = request.model_extra or {}
    for name in sorted(extra.keys() & EmbeddingsBody.model_fields.keys()):
        if extra[name] is not None:
            raise invalid(name, f"{name} is a field of /v1/embeddings and not of rankings")
    ignored = check_foreign(extra)
    (task,) = limits.tasks if len(limits.tasks) == 1 else (choose_task(request.task, request.model, limits.tasks),)
    said = {
        "task": prompt_of_task(request.task, task),
        "model": prompt_of_model(request.model, task, limits.model_names),
    }
    for name, prompt in said.items():
        if prompt not in (None, NO_PREFIX):
            value = getattr(request, name)
            message = f"{name}={shorten(value)} names the prompt {prompt}; a ranking uses both prompts: leave it out"
            raise invalid(name, message, value)
    check_max_pixels(request.max_pixels, limits)
    for item in (*queries, *documents):
        if item.pdf is not None:
            raise invalid(item.path, f"{item.path}: a PDF file is many pages; a ranking has texts and images")

    def side(items: Sequence[Item], prompt_name: str, field: str, unknown: Sequence[str]) -> EmbedRequest:
        used, prefix = text_prompt(said["model"] or prompt_name, limits.prompts[task])
        if not prefix:
            check_not_empty(items)
        return EmbedRequest(
            task=task,
            model=request.model or model_name(task),
            items=items,
            prompt_name=used,
            prefix=prefix,
            outputs=frozenset({request.by or "multivector"}),
            encodings=["float"],
            dimensions=None,
            max_length=_max_length(request, field, limits),
            max_pixels=request.max_pixels,
            late_chunking=False,
            keyed=False,
            priority=request.priority or FIRST,
            ignored=unknown,
        )

    return side(queries, "query", "max_tokens_per_query", ()), side(documents, "passage", "max_tokens_per_doc", ignored)


def _max_length(request: RankingBody, field: str, limits: Limits) -> int | None:
    value: int | None = getattr(request, field)
    if not value:
        return limits.max_length if request.truncate else None
    if request.truncate is False:
        raise invalid(field, f"{field} contradicts truncate=false; send one of them")
    if value > limits.max_length:
        raise invalid(field, f"{field}={value} is not offered; choose 0 to {limits.max_length}", value)
    return value
