"""Which task is a request for: its `task`, or else the task in its model's name.

The body is scanned once and nothing of it is kept but two strings: a request with megabytes of pictures is not turned
into objects. Of two equal keys the last one counts, as it does for the servers.
"""

from collections.abc import Collection

import msgspec

from jina_v4_serve.api.errors import ApiError, invalid
from jina_v4_serve.api.tasks import choose_task


class _Head(msgspec.Struct):
    task: str | None = None
    model: str | None = None


_DECODER = msgspec.json.Decoder(_Head)


def find_task(body: bytes, served: Collection[str]) -> str:
    """Tell which task a request is for.

    Args:
        body: of `POST /v1/embeddings`.
        served: the tasks that there are servers for.

    Raises:
        ApiError: 400 when it is no JSON object, 422 when it names no task or two or one that is not served, 404 when
            its model is not served.
    """
    try:
        head = _DECODER.decode(body)
    except msgspec.ValidationError as error:
        message = str(error)
        if "$." not in message:
            raise ApiError(400, "the body is JSON, but not an object", code="INVALID_JSON") from None
        field = message.rpartition("$.")[2].rstrip("`")
        raise invalid(field, f"{field} is a string") from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="INVALID_JSON") from None
    return choose_task(head.task, head.model, served)
