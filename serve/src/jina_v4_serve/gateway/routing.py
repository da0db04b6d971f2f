"""Finds the task of a request: its `task`, or else the task in its model's name.

The body is scanned once for three strings; megabytes of pictures are not turned into objects. If a key occurs twice,
the last one counts, as in the servers.
"""

from collections.abc import Collection

import msgspec

from jina_v4_serve.api.errors import ApiError, invalid
from jina_v4_serve.api.tasks import choose_task, names_no_task


class _Head(msgspec.Struct):
    task: str | None = None
    task_type: str | None = None
    model: str | None = None


_DECODER = msgspec.json.Decoder(_Head)


def _read_head(body: bytes) -> _Head:
    try:
        return _DECODER.decode(body)
    except msgspec.DecodeError:
        # A body with a lone surrogate is sent on all the same, as the error of the server names the text. No task or
        # model has an escape from \ud000 on, so all of them may be read as other characters.
        repaired = body.replace(rb"\ud", rb"\u0").replace(rb"\uD", rb"\u0")
        if repaired == body:
            raise
        return _DECODER.decode(repaired)


def find_task(body: bytes, served: Collection[str], default: str | None = None) -> str:
    """Return the task of a body, one of the served tasks; the default is for a body that names none.

    Raises:
        ApiError: 400 if the body is not a JSON object, 422 for no task, two tasks, or one that is not served, 404 if
            its model is not served.
    """
    try:
        head = _read_head(body)
    except msgspec.ValidationError as error:
        message = str(error)
        if "$." not in message:
            raise ApiError(400, "the body is JSON, but not an object", code="INVALID_JSON") from None
        field = message.rpartition("$.")[2].rstrip("`")
        raise invalid(field, f"{field} is a string") from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="INVALID_JSON") from None
    field = "task" if head.task is not None or head.task_type is None else "task_type"
    task = getattr(head, field)
    if default in served and task is None and names_no_task(head.model):
        task = default
    return choose_task(task, head.model, served, field)
