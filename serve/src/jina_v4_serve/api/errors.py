"""Errors that a caller sees: one body that OpenAI clients (`error`) and Jina clients (`detail`) can both read.

Everything else that goes wrong is logged with the request id and answered without any detail.
"""

from collections.abc import Mapping
from typing import Any

import orjson

# OpenAI's names for kinds of errors, by status.
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is not 2xx.

    Attributes:
        status: the HTTP status.
        code: a word for programs.
        param: the field at fault, as a path: `input[3].image`.
        value: what the field held, shortened; None if that does not help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        value: object = None,
        retry_after_s: int | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.value = value
        self.retry_after_s = retry_after_s
        self.allow = allow

    def body(self, request_id: str) -> bytes:
        """Return the JSON of the answer."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        content: dict[str, Any] = {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code},
            "detail": {"message": self.message, "request_id": request_id, "code": self.code},
        }
        if self.status == 401:  # the hosted service's 401 is flat
            content |= {"detail": self.message, "code": self.code}
        if self.status == 422:
            field = f"body -> {self.param}" if self.param else "body"
            shown = None if self.value is None else shorten(self.value)
            content["errors"] = [{"field": field, "message": self.message, "type": self.code, "input": shown}]
        return orjson.dumps(content)

    def headers(self) -> Mapping[str, str]:
        """Return the headers of the answer beside those of every answer."""
        given = {"retry-after": self.retry_after_s, "allow": self.allow}
        return {name: str(value) for name, value in given.items() if value is not None}


def invalid(param: str, message: str, value: object = None) -> ApiError:
    """Make the error for a field that holds what is not offered."""
    return ApiError(422, message, code="VALIDATION_ERROR", param=param, value=value)


def shorten(value: object) -> str:
    """Show a value in a message, at most 80 characters of it."""
    text = value if isinstance(value, str) else repr(value)
    text = "".join(character if character.isprintable() else "?" for character in text[:200])
    return text if len(text) <= 80 else f"{text[:77]}..."
