"""The body of an error reply. OpenAI's clients read `error` in it, Jina's read `detail` and `errors`.

On Cohere's routes the body has Cohere's form: an id and a message.
"""

from typing import Any

import orjson

from jina_v4_serve.api.door import COHERE, COHERE_RERANK
from jina_v4_serve.api.errors import ApiError, shorten

# OpenAI's types of errors, by status.
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(error: ApiError, request_id: str, path: str = "") -> bytes:
    """Write an error as JSON, in the form of the route."""
    if path in (COHERE, COHERE_RERANK):
        return orjson.dumps({"id": request_id, "message": error.message})
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    content: dict[str, Any] = {
        "error": {"message": error.message, "type": kind, "param": error.param, "code": error.code},
        "detail": {"message": error.message, "request_id": request_id, "code": error.code},
    }
    if error.status == 401:  # the hosted service's 401 is flat
        content |= {"detail": error.message, "code": error.code}
    if error.status == 422:
        field = f"body -> {error.param}" if error.param else "body"
        shown = None if error.value is None else shorten(error.value)
        content["errors"] = [{"field": field, "message": error.message, "type": error.code, "input": shown}]
    return orjson.dumps(content)
