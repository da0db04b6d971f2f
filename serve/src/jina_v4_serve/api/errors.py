"""The errors that a caller sees. They hold facts; `forms.errors` writes them.

Any other exception is logged with the request id and answered without details.
"""

from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass


@dataclass(eq=False)
class ApiError(Exception):
    """A reply that is not 2xx.

    Attributes:
        status: the HTTP status.
        message: for people.
        code: for programs.
        param: the path of the wrong field: `input[3].image`.
        value: the value of that field; None if it does not help.
        retry_after_s: seconds after which the same request may succeed.
        allow: the methods of the route.
        closes: whether the connection must be closed.
    """

    status: int
    message: str
    _: KW_ONLY
    code: str
    param: str | None = None
    value: object = None
    retry_after_s: int | None = None
    allow: str | None = None
    closes: bool = False

    def __str__(self) -> str:
        """Return the message."""
        return self.message

    def headers(self) -> Mapping[str, str]:
        """Return the headers that only this error has."""
        connection = "close" if self.closes else None
        headers = {"retry-after": self.retry_after_s, "allow": self.allow, "connection": connection}
        return {name: str(value) for name, value in headers.items() if value is not None}


def invalid(param: str, message: str, value: object = None) -> ApiError:
    """Make the error for a field with a wrong value."""
    return ApiError(422, message, code="VALIDATION_ERROR", param=param, value=value)


def shorten(value: object) -> str:
    """Write a value for a message, in at most 80 characters."""
    text = ""
    for piece in [value] if isinstance(value, str) else _repr(value):
        text += piece[:200]
        if len(text) > 80:
            break
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _repr(value: object) -> Iterator[str]:
    """Yield the repr of a value from JSON in pieces: a caller that stops early does not pay for megabytes."""
    if isinstance(value, list):
        yield "["
        for i, each in enumerate(value):
            yield ", " if i else ""
            yield from _repr(each)
        yield "]"
    elif isinstance(value, dict):
        yield "{"
        for i, (name, each) in enumerate(value.items()):
            yield f"{', ' if i else ''}{name[:200]!r}: "
            yield from _repr(each)
        yield "}"
    else:
        yield repr(value[:200] if isinstance(value, str) else value)
