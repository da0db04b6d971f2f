"""Which task a request is for, where several are served: its `task`, or else the task in its model's name."""

from collections.abc import Collection

from jina_v4_serve.api.errors import ApiError, invalid, shorten

MODEL = "jina-embeddings-v4"
TASK_VALUES = {
    "retrieval": ("retrieval", "retrieval.query", "retrieval.passage"),
    "text-matching": ("text-matching",),
    "code": ("code", "code.query", "code.passage"),
}
_TASKLESS = (MODEL, f"{MODEL}-query", f"{MODEL}-passage")


def choose_task(task: str | None, model: str | None, served: Collection[str]) -> str:
    """Tell which of the served tasks a request is for.

    Args:
        task: as the request names it, with or without what follows a dot.
        model: as the request names it.
        served: tasks.

    Raises:
        ApiError: 422 when no task is named, or two, or one that is not served; 404 when its model is not served.
    """
    from_model = None if model is None else task_of_model(model)
    if task is None:
        if from_model is not None and from_model in served:
            return from_model
        raise _no_task(model, from_model, served)
    name = task.partition(".")[0]
    if name not in served:
        raise invalid("task", f"task={shorten(task)} is not served here; choose {_values(served)}", task)
    if from_model not in (None, name):
        raise invalid("task", f"the request contradicts itself: task={shorten(task)}, model={shorten(str(model))}")
    return name


def task_of_model(name: str) -> str | None:
    """Tell the task in a model's name, None when there is none in it."""
    rest = name.rpartition("/")[2]  # as the hub writes it: jinaai/jina-embeddings-v4-code
    for ending in ("-query", "-passage"):
        rest = rest.removesuffix(ending)
    task = rest.removeprefix(f"{MODEL}-")
    return task if task != rest and task in TASK_VALUES else None


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


def _values(served: Collection[str]) -> str:
    return ", ".join(value for task in served for value in TASK_VALUES[task])
