"""The task and the prompt of a request: from its `task`, or else from the name of its model."""

from collections.abc import Collection

from jina_v4_serve.api.errors import ApiError, invalid, shorten
from jina_v4_serve.facts import MODEL, PORTS, PROMPT_NAMES, TASK_VALUES, model_name

NO_PREFIX = "none"  # texts without a prefix, like in sentence-transformers without a prompt name
_ENDINGS = (*PROMPT_NAMES, NO_PREFIX)  # of model names, for programs that cannot set other fields


def choose_task(task: str | None, model: str | None, served: Collection[str], field: str = "task") -> str:
    """Return the task of a request.

    Args:
        task: in the request, maybe with a prompt name after a dot.
        model: in the request.
        served: the served tasks.
        field: the name of the field that has the task.

    Raises:
        ApiError: 422 for no task, two tasks, or one that is not served; 404 when its model is not served.
    """
    from_model = None if model is None else task_of_model(model)
    if task is None:
        if from_model is not None and from_model in served:
            return from_model
        names = ", ".join(map(model_name, served))
        if names_no_task(model):
            raise invalid("task", f"the request names no task; send task ({_values(served)}) or a model ({names})")
        raise _no_model(str(model), f"choose {names}, or {MODEL} and a task")
    name = task.partition(".")[0]
    if name not in served:
        raise invalid(field, f"{field}={shorten(task)} is not served here; choose {_values(served)}", task)
    if from_model not in (None, name):
        raise invalid(field, f"the request contradicts itself: {field}={shorten(task)}, model={shorten(str(model))}")
    return name


def task_of_model(name: str) -> str | None:
    """Return the task in a model's name; None if it has none."""
    model, _ = _split(name)
    task = model.removeprefix(f"{MODEL}-")
    return task if task != model and task in TASK_VALUES else None


def names_no_task(model: str | None) -> bool:
    """Tell whether a model's name has no task: it is absent or the published one, maybe with a prompt name."""
    return model is None or _split(model)[0] == MODEL


def _split(name: str) -> tuple[str, str | None]:
    """Split a model's name into model and prompt name; the hub's form (jinaai/jina-embeddings-v4) is accepted."""
    whole = name.rpartition("/")[2]
    model, _, ending = whole.rpartition("-")
    return (model, ending) if ending in _ENDINGS else (whole, None)


def _no_model(name: str, advice: str) -> ApiError:
    message = f"there is no model {shorten(name)} here; {advice}"
    return ApiError(404, message, code="MODEL_NOT_FOUND", param="model")


def _values(served: Collection[str]) -> str:
    return ", ".join(value for task in served for value in TASK_VALUES[task])


def prompt_of_model(name: str | None, served: str, model_names: Collection[str]) -> str | None:
    """Return the prompt name at the end of a model's name; None if there is none, and for `model_names`.

    Raises:
        ApiError: 422 for the model of another task, 404 for any other.
    """
    if name is None or name in model_names:
        return None
    rest, prompt = _split(name)
    model = model_name(served)
    if rest in (MODEL, model, *model_names):
        return prompt
    if (task := task_of_model(name)) is not None:
        raise _elsewhere("model", name, task, served)
    offered = (MODEL, model, *(f"{model}-{ending}" for ending in _ENDINGS))
    raise _no_model(name, f"this server has {', '.join(offered)}")


def prompt_of_task(name: str | None, served: str, field: str = "task") -> str | None:
    """Return the prompt name after the dot of a `task`; None if there is none.

    Args:
        name: the value in the request.
        served: the task of the request.
        field: the name of the field that has the value.

    Raises:
        ApiError: 422 for another task or an unknown value.
    """
    if name is None:
        return None
    task, _, prompt = name.partition(".")
    if name in TASK_VALUES[served]:
        return prompt or None
    if name in TASK_VALUES.get(task, ()):
        raise _elsewhere(field, name, task, served)
    raise invalid(
        field, f"{field}={shorten(name)} is not offered; this server has {', '.join(TASK_VALUES[served])}", name
    )


def _elsewhere(param: str, value: str, task: str, served: str) -> ApiError:
    return invalid(
        param,
        f"{param}={value} is for the {task} server and this is the {served} server: send it to the address that"
        f" `make serve-{task}` serves (port {PORTS[task]} unless set otherwise), or to the gateway",
        value,
    )
