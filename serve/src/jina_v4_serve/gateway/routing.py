"""Which task is a request for: its `task`, or else the task in its model's name.

The body is scanned once and nothing of it is kept but two strings: a request with megabytes of pictures is not turned
into objects. Of two equal keys the last one counts, as it does for the servers.
"""

from collections.abc import Collection

import msgspec

from jina_v4_serve.api.errors import ApiError, invalid, shorten

MODEL = "jina-embeddings-v4"
_TASK_VALUES = {
    "retrieval": ("retrieval", "retrieval.query", "retrieval.passage"),
    "text-matching": ("text-matching",),
    "code": ("code", "code.query", "code.passage"),
}


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
    from_model = None if head.model is None else task_of_model(head.model)
    if head.task is None:
        if from_model is not None and from_model in served:
            return from_model
        raise _no_task(head.model, from_model, served)
    task = head.task.partition(".")[0]
    if task not in served:
        raise invalid("task", f"task={shorten(head.task)} is not served here; choose {_values(served)}", head.task)
    if from_model not in (None, task):
        raise invalid(
            "task", f"the request contradicts itself: task={shorten(head.task)}, model={shorten(str(head.model))}"
        )
    return task


def task_of_model(name: str) -> str | None:
    """Tell the task in a model's name, None when there is none in it."""
    rest = name.rpartition("/")[2]  # as the hub writes it: jinaai/jina-embeddings-v4-code
    for ending in ("-query", "-passage"):
        rest = rest.removesuffix(ending)
    task = rest.removeprefix(f"{MODEL}-")
    return task if task != rest and task in _TASK_VALUES else None


def _no_task(model: str | None, from_model: str | None, served: Collection[str]) -> ApiError:
    names = ", ".join(f"{MODEL}-{task}" for task in served)
    if model is not None and (from_model is not None or model.rpartition("/")[2] not in _TASKLESS):
        return ApiError(
            404,
            f"there is no model {shorten(model)} here; choose {names}, or {MODEL} and a task",
            code="MODEL_NOT_FOUND",
            param="model",
        )
    return invalid("task", f"the request names no task; give task ({_values(served)}) or a model ({names})")


_TASKLESS = (MODEL, f"{MODEL}-query", f"{MODEL}-passage")


def _values(served: Collection[str]) -> str:
    return ", ".join(value for task in served for value in _TASK_VALUES[task])
