"""The request body of `POST /v1/embeddings`: OpenAI's fields, Jina's, and ours.

Unknown fields are ignored, as by the hosted service. A field that is null is a field that is absent.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from jina_v4_serve.api.errors import ApiError, invalid, shorten

Encoding = Literal["float", "base64", "binary", "ubinary"]
Output = Literal["dense", "multivector"]

_ITEM_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "description": "A text."},
        {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
        {
            "type": "object",
            "properties": {"image": {"type": "string", "description": "http(s) URL, data URI or base64 of a file."}},
            "required": ["image"],
        },
    ]
}


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


Encodings = Annotated[
    list[Encoding] | None, BeforeValidator(_one_or_many, json_schema_input_type=Encoding | list[Encoding] | None)
]


class EmbeddingsRequest(BaseModel):
    """What may be asked of `POST /v1/embeddings`."""

    model_config = ConfigDict(extra="ignore", strict=True)

    input: Annotated[
        Any, WithJsonSchema({"anyOf": [_ITEM_SCHEMA, {"type": "array", "items": _ITEM_SCHEMA, "minItems": 1}]})
    ] = Field(description="One item or a list of items, texts and images mixed.")
    model: str | None = Field(
        None, description="jina-embeddings-v4, optionally with -{task} and then -query or -passage at its end."
    )
    task: str | None = Field(
        None, description="text-matching, retrieval, retrieval.query, retrieval.passage, code, code.query, code.passage"
    )
    prompt_name: Literal["query", "passage", "none"] | None = Field(
        None, description="The prefix of texts; query if absent. none: texts as they are."
    )
    input_type: Literal["query", "passage", "document", "search_query", "search_document"] | None = Field(
        None, description="Other words for prompt_name."
    )
    dimensions: int | None = Field(None, description="128, 256, 512, 1024 or 2048; all if absent.")
    embedding_type: Encodings = Field(None, description="float, base64, binary, ubinary or a list of them.")
    encoding_format: Encodings = Field(None, description="Another name of embedding_type.")
    outputs: list[Output] | None = Field(None, description="dense, multivector or both, from one pass.")
    return_multivector: bool | None = Field(None, description='The same as outputs=["multivector"].')
    late_chunking: bool | None = Field(None, description="Embed the texts as parts of one text, each its own vector.")
    truncate: bool | None = Field(None, description="Cut the tail of a text over the limit instead of refusing it.")
    max_length: int | None = Field(None, ge=1, description="Cut texts to so many tokens, prefix included.")
    max_pixels: int | None = Field(None, ge=3136, description="Scale images down to so many pixels.")


def parse(body: bytes) -> EmbeddingsRequest:
    """Read a request body.

    Raises:
        ApiError: 400 when it is no JSON, 422 for the first field that holds what is not offered.
    """
    try:
        return EmbeddingsRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        raise ApiError(400, f"the body is not JSON: {_plain(first['msg'])}", code="INVALID_JSON")
    if first["type"] == "model_type":
        raise ApiError(400, "the body is JSON, but not an object", code="INVALID_JSON")
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] == "missing":
        raise invalid(where, f"{where} is required")
    raise invalid(where, f"{where}={shorten(first['input'])} is not offered: {_plain(first['msg'])}", first["input"])


def _plain(message: str) -> str:
    """Take pydantic's way of naming itself out of its message."""
    return re.sub(r"^(Invalid JSON|Value error|Input): ?", "", message)
