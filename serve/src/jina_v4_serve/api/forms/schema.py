"""Parses bodies, and defines the fields of `POST /v1/embeddings`: OpenAI's, Jina's, and ours.

`foreign` decides about other fields. A field that is null counts as absent.
"""

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from jina_v4_serve.api.errors import ApiError, invalid, shorten
from jina_v4_serve.api.request import FIRST, LAST, Encoding, Output

IMAGE = {
    "type": "string",
    "contentMediaType": "image/*",
    "description": "http(s) URL, data URI or base64 of a file.",
}
PDF = {
    "type": "string",
    "contentMediaType": "application/pdf",
    "description": "http(s) URL, data URI or base64 of a file. Each page gets its own vectors.",
}
PAGES = {
    "type": "string",
    "pattern": r"^\d+(-\d*)?(,\d+(-\d*)?)*$",
    "description": "Which pages, from 1: 1-4,9 or 10-. All if absent.",
}


def describe(**properties: object) -> dict[str, Any]:
    """Return the schema of an object with these properties, all of which are required."""
    return {"type": "object", "properties": properties, "required": list(properties)}


_PARTS = [
    describe(type={"enum": ["text", "input_text"]}, text={"type": "string"}),
    describe(type={"enum": ["image_url"]}, image_url=describe(url=IMAGE)),
    describe(type={"enum": ["input_image"]}, image_url=IMAGE),
]
CONTENT = {"type": "array", "items": {"anyOf": _PARTS}, "minItems": 1, "maxItems": 1}
ITEM: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "description": "A text."},
        describe(text={"type": "string"}),
        describe(image=IMAGE),
        {**describe(pdf=PDF, pages=PAGES), "required": ["pdf"]},
        *_PARTS,
        describe(content=CONTENT),
    ]
}
ITEMS = {"anyOf": [ITEM, {"type": "array", "items": ITEM, "minItems": 1}]}
_MESSAGE_SCHEMA = describe(role={"enum": ["user"]}, content={"anyOf": [{"type": "string"}, CONTENT]})
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


Member = TypeVar("Member")
# Only the first error is used. Without fail_fast pydantic makes an error per member: 24 s for a list of 8 MB.
ListOf = Annotated[list[Member], Field(fail_fast=True)]
Encodings = Annotated[
    ListOf[Encoding] | None, BeforeValidator(_one_or_many, json_schema_input_type=Encoding | list[Encoding] | None)
]


def _as_boolean(value: object) -> object:
    return {"END": True, "NONE": False}.get(value, value) if isinstance(value, str) else value


# NVIDIA's NIM and its clients write END and NONE for true and false, as in Cohere's form.
Truncate = Annotated[
    bool | None,
    BeforeValidator(_as_boolean, json_schema_input_type=bool | Literal["END", "NONE"] | None),
]

Priority = Annotated[
    int | None, Field(ge=FIRST, le=LAST, description="0 (the default) to 999; lower ones are computed first.")
]


class Body(BaseModel):
    """The base of the fields of all forms."""

    model_config = ConfigDict(extra="allow", strict=True)


Fields = TypeVar("Fields", bound=Body)


class EmbeddingsBody(Body):
    """The fields of `POST /v1/embeddings`."""

    input: Annotated[Any, WithJsonSchema(ITEMS)] = Field(
        None, description="One item or a list of items, texts, images and PDF files mixed."
    )
    content: Annotated[Any, WithJsonSchema(ITEMS)] = Field(None, description="Another name of input.")
    texts: Annotated[Any, WithJsonSchema(ITEMS)] = Field(None, description="Another name of input.")
    messages: Annotated[Any, WithJsonSchema({"type": "array", "items": _MESSAGE_SCHEMA, "minItems": 1})] = Field(
        None, description="vLLM's: in place of input, a chat with one user turn, a text or an image; or several chats."
    )
    model: str | None = Field(
        None, description="jina-embeddings-v4, optionally with -{task} and then -query, -passage or -none."
    )
    task: str | None = Field(
        None, description="text-matching, retrieval, retrieval.query, retrieval.passage, code, code.query, code.passage"
    )
    task_type: str | None = Field(None, description="Another name of task.")
    prompt_name: Literal["query", "passage", "none"] | None = Field(
        None, description="The prefix of texts; query if absent. none adds no prefix."
    )
    input_type: Literal["query", "passage", "document", "search_query", "search_document"] | None = Field(
        None, description="Other words for prompt_name."
    )
    dimensions: int | None = Field(None, description="1 to 2048; all if absent.")
    output_dimension: int | None = Field(None, description="Another name of dimensions.")
    output_dimensionality: int | None = Field(None, description="Another name of dimensions.")
    truncate_dim: int | None = Field(None, description="Another name of dimensions.")
    embedding_type: Encodings = Field(
        None, description="float, base64, int8, uint8, binary, ubinary or a list of them."
    )
    encoding_format: Encodings = Field(None, description="Another name of embedding_type.")
    encoding_type: Encodings = Field(None, description="Another name of embedding_type.")
    embedding_types: Encodings = Field(None, description="Another name of embedding_type.")
    output_dtype: Literal["float", "int8", "uint8", "binary", "ubinary"] | None = Field(
        None, description="Another name of embedding_type, for one value."
    )
    outputs: ListOf[Output] | None = Field(None, description="dense, multivector or both, from one pass.")
    return_multivector: bool | None = Field(None, description='The same as outputs=["multivector"].')
    pool_factor: int | None = Field(
        None,
        ge=1,
        le=64,
        description="How many rows of a multi-vector become one, on average; for documents, not for queries.",
    )
    late_chunking: bool | None = Field(None, description="Embed the texts as parts of one text, each its own vector.")
    truncate: Truncate = Field(
        None, description="Cut the tail of a text over the limit instead of refusing it. END is true, NONE is false."
    )
    truncation: Truncate = Field(None, description="Another name of truncate.")
    max_length: int | None = Field(None, ge=1, description="Cut texts to this many tokens, prefix included.")
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, description="vLLM's name of max_length; -1 is the server's limit."
    )
    modality: Literal["text", "image"] | None = Field(
        None, description="infinity's: the kind of bare strings. If absent, a text, or an image if it begins like one."
    )
    max_pixels: int | None = Field(None, ge=1, description="Scale images down to this many pixels.")
    priority: Priority = None


def parse(body: bytes, form: type[Fields]) -> Fields:
    """Read the fields of a request body.

    Raises:
        ApiError: 400 if the body is not JSON, 422 for the first field with a wrong value.
    """
    try:
        return form.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        reason = _plain(first["msg"])
        path = _path_of_broken_text(body) if re.search("escape|unicode", reason) else None
        if path is not None:
            reason = f"{path or 'a name'} is not Unicode: it has a lone surrogate, or bytes that are not UTF-8"
        raise ApiError(400, f"the body is not JSON: {reason}", code="INVALID_JSON", param=path or None)
    if first["type"] == "model_type":
        raise ApiError(400, "the body is JSON, but not an object", code="INVALID_JSON")
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] == "missing":
        raise invalid(where, f"{where} is required")
    raise invalid(where, f"{where}={shorten(first['input'])} is not offered: {_plain(first['msg'])}", first["input"])


def _path_of_broken_text(body: bytes) -> str | None:
    """Find the text that has a lone surrogate or bytes that are not UTF-8.

    Returns:
        Its path, such as `input[3].text`; "" for the name of a field; None if there is no such text.
    """
    try:
        content = json.loads(body.decode("utf-8", "surrogateescape"))
        path = next(_broken_texts(content, ""), None)
    except (ValueError, RecursionError):
        return None
    return None if path is None else shorten(path)


def _broken_texts(value: object, path: str) -> Iterator[str]:
    if isinstance(value, str):
        if _SURROGATE.search(value):
            yield path
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _broken_texts(item, f"{path}[{i}]")
    elif isinstance(value, dict):
        for name, item in value.items():
            if _SURROGATE.search(name):
                yield ""
            yield from _broken_texts(item, f"{path}.{name}".lstrip("."))


def _plain(message: str) -> str:
    """Remove pydantic's prefix from its message."""
    return re.sub(r"^(Invalid JSON|Value error|Input): ?", "", message)
