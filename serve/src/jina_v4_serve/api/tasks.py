"""Which task and prompt a request is for: its `task`, or else what its model's name says."""

from collections.abc import Collection

from jina_v4_serve.api.errors import ApiError, invalid, shorten
from jina_v4_serve.facts import MODEL, PORTS, PROMPT_NAMES, TASK_VALUES, model_name

NO_PREFIX = "none"  # texts as they are, as sentence-transformers has it without a prompt name
_ENDINGS = (*PROMPT_NAMES, NO_PREFIX)  # of model names, for programs that can set no other field


def choose_task(task: str | None, model: str | None, served: Collection[str], field: str = "task") -> str:
    """Tell which of the served tasks a request is for.

    Args:
        task: of the request, with or without a prompt name after a dot.
        model: of the request.
        served: tasks.
        field: the name under which the task was sent.

    Raises:
        ApiError: 422 for no task, two tasks, or one that is not served; 404 when its model is not served.
    """
    from_model = None if model is None else task_of_model(model)
    if task is None:
        if from_model is not None and from_model in served:
            return from_model
        names = ", ".join(map(model_name, served))
        if names_no_task(model):
            raise invalid("task", f"the request names no task; give task ({_values(served)}) or a model ({names})")
        raise _no_model(str(model), f"choose {names}, or {MODEL} and a task")
    name = task.partition(".")[0]
    if name not in served:
        raise invalid(field, f"{field}={shorten(task)} is not served here; choose {_values(served)}", task)
    if from_model not in (None, name):
        raise invalid(field, f"the request contradicts itself: {field}={shorten(task)}, model={shorten(str(model))}")
    return name


def task_of_model(name: str) -> str | None:
    """Return the task in a model's name; None where there is none."""
    model, _ = _split(name)
    task = model.removeprefix(f"{MODEL}-")
    return task if task != model and task in TASK_VALUES else None


def names_no_task(model: str | None) -> bool:
    """Tell whether a model's name leaves the task open: it is absent, or the published one, maybe with a prompt."""
    return model is None or _split(model)[0] == MODEL


def _split(name: str) -> tuple[str, str | None]:
    """Split a model's name, also as the hub writes it (jinaai/jina-embeddings-v4-code-query), off its prompt name."""
    whole = name.rpartition("/")[2]
    model, _, ending = whole.rpartition("-")
    return (model, ending) if ending in _ENDINGS else (whole, None)


def _no_model(name: str, advice: str) -> ApiError:
    message = f"there is no model {shorten(name)} here; {advice}"
    return ApiError(404, message, code="MODEL_NOT_FOUND", param="model")


def _values(served: Collection[str]) -> str:
    return ", ".join(value for task in served for value in TASK_VALUES[task])


def prompt_of_model(name: str | None, served: str, model_names: Collection[str]) -> str | None:
    """Return the prompt name at the end of a model's name; None where there is none, and for one of `model_names`.

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
    """Return the prompt name after the dot of a `task`; None where there is none.

    Args:
        name: the task, as the request has it.
        served: the task that the request is for.
        field: the name under which it was sent.

    Raises:
        ApiError: 422 for another task, or anything else.
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
