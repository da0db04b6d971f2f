"""`POST /v2/embed`: Cohere's form. Its vectors are the same as those of `POST /v1/embeddings`.

Source: Cohere's API reference and its Python client (7.3). As there, texts over the limit are cut unless `truncate` is
NONE, and the reply holds every embedding type by its name. Texts need an `input_type`, so that no prompt is guessed.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from jina_v4_serve.api.errors import invalid
from jina_v4_serve.api.forms.common import (
    INPUT_TYPES,
    agreed_prompt,
    check_dimensions,
    settle_task,
    text_length,
    text_prompt,
)
from jina_v4_serve.api.forms.foreign import check_foreign
from jina_v4_serve.api.forms.items import check_count, check_not_empty, read_content
from jina_v4_serve.api.forms.reply import encode
from jina_v4_serve.api.forms.schema import CONTENT, IMAGE, Body, ListOf, Priority, describe
from jina_v4_serve.api.request import FIRST, EmbedRequest, Encoding, Item, Limits
from jina_v4_serve.api.tasks import prompt_of_model, prompt_of_task
from jina_v4_serve.api.vectors import Vectors
from jina_v4_serve.facts import model_name

_SYMMETRIC = "text-matching"  # the task for classification and clustering


class CohereBody(Body):
    """The fields of `POST /v2/embed`."""

    model: str | None = Field(None, description="jina-embeddings-v4-{task}, as for /v1/embeddings.")
    input_type: Literal["search_query", "search_document", "classification", "clustering", "image"] | None = Field(
        None, description="Required with texts. classification and clustering are for the text-matching model."
    )
    texts: ListOf[str] | None = Field(None, description="Texts to embed; send texts, images or inputs.")
    images: ListOf[Annotated[str, WithJsonSchema(IMAGE)]] | None = Field(None, description="Images to embed.")
    inputs: Annotated[
        list[Any] | None,
        WithJsonSchema({"type": "array", "items": describe(content=CONTENT), "minItems": 1}),
    ] = Field(None, description="Texts and images mixed, one in each input.")
    embedding_types: ListOf[Encoding] | None = Field(None, description="float if absent.")
    output_dimension: int | None = Field(None, description="1 to 2048; all if absent.")
    truncate: Literal["NONE", "START", "END"] | None = Field(
        None, description="END, the default, cuts long texts at their end; NONE refuses them; START is not offered."
    )
    max_tokens: int | None = Field(None, description="Cut texts to this many tokens, prefix included.")
    priority: Priority = None
    task: str | None = Field(None, description="As for /v1/embeddings; not a field of Cohere's.")


def settle(request: CohereBody, limits: Limits) -> EmbedRequest:
    """Make the inner request.

    Raises:
        ApiError: a field is wrong; the message names the field, its value and the allowed values.
    """
    ignored = check_foreign(request, "/v2/embed")
    task = settle_task(request.task, request.model, limits)
    items = _items(request, limits)
    has_texts = any(item.text is not None for item in items)
    prompt_name, prefix = text_prompt(_prompt_name(request, task, limits, has_texts=has_texts), limits.prompts[task])
    if not prefix:
        check_not_empty(items)
    encodings: list[Encoding] = list(dict.fromkeys(request.embedding_types or ["float"]))
    check_dimensions("output_dimension", request.output_dimension, limits, encodings)
    if request.truncate == "START":
        message = "truncate=START is not offered: texts are cut at their end; choose END or NONE"
        raise invalid("truncate", message, request.truncate)
    cut = request.truncate != "NONE"
    return EmbedRequest(
        task=task,
        model=request.model or model_name(task),
        items=items,
        prompt_name=prompt_name,
        prefix=prefix,
        encodings=encodings,
        dimensions=request.output_dimension,
        max_length=text_length("max_tokens", request.max_tokens, limits, cut=cut, switch="truncate=NONE"),
        priority=request.priority or FIRST,
        ignored=ignored,
    )


def write(request: EmbedRequest, items: Sequence[Vectors], request_id: str) -> dict[str, Any]:
    """Return the content of the reply."""
    rows = [vectors.dense[0] for vectors in items]
    return {
        "id": request_id,
        "embeddings": {encoding: [encode(row, encoding) for row in rows] for encoding in request.encodings},
        "texts": [item.text for item in request.items if item.text is not None],
        "meta": meta(request.items, items),
        "response_type": "embeddings_by_type",
    }


def meta(items: Sequence[Item], vectors: Sequence[Vectors]) -> dict[str, Any]:
    """Return the `meta` of a reply, with the tokens of its items."""
    pairs = list(zip(items, vectors, strict=True))
    return {
        "api_version": {"version": "2"},
        "billed_units": {
            "input_tokens": sum(each.n_tokens for item, each in pairs if item.text is not None),
            "image_tokens": sum(each.n_tokens for item, each in pairs if item.text is None),
        },
    }


def _items(request: CohereBody, limits: Limits) -> list[Item]:
    sent = {name: getattr(request, name) for name in ("texts", "images", "inputs")}
    sent = {name: values for name, values in sent.items() if values is not None}
    sent = {name: values for name, values in sent.items() if values} or sent
    if len(sent) != 1:
        names = " and ".join(sent) or "none of texts, images and inputs"
        raise invalid(next(iter(sent), "texts"), f"the request has {names}; send one of texts, images and inputs")
    ((name, values),) = sent.items()
    check_count(values, name, limits.max_items)
    if name == "texts":
        return [Item(text=text, path=f"texts[{i}]") for i, text in enumerate(values)]
    if name == "images":
        return [Item(image=image, path=f"images[{i}]") for i, image in enumerate(values)]
    return [_input(value, f"inputs[{i}]") for i, value in enumerate(values)]


def _input(value: object, where: str) -> Item:
    if not isinstance(value, dict) or {name for name in value if value[name] is not None} != {"content"}:
        raise invalid(where, f'{where} is {{"content": [...]}}, a list of one part: a text or an image', value)
    return read_content(value["content"], f"{where}.content")


def _prompt_name(request: CohereBody, task: str, limits: Limits, *, has_texts: bool) -> str:
    kind = request.input_type
    if kind in ("classification", "clustering") and task != _SYMMETRIC:
        message = f"input_type={kind} is not offered by the {task} model; choose search_query or search_document"
        raise invalid("input_type", f"{message}, or the {_SYMMETRIC} model", kind)
    if kind == "image" and has_texts:
        raise invalid("input_type", "input_type=image is for images; for texts send search_query or search_document")
    prompt_name = agreed_prompt(
        {
            "input_type": INPUT_TYPES.get(kind or ""),
            "task": prompt_of_task(request.task, task),
            "model": prompt_of_model(request.model, task, limits.model_names),
        }
    )
    if prompt_name is None and kind is None and has_texts and task != _SYMMETRIC:
        raise invalid("input_type", "input_type is required with texts; choose search_query or search_document")
    return prompt_name or "query"
