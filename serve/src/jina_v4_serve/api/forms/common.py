"""Rules that several forms share: fields with several names, tasks, prompts, and ranges of numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from jina_v4_serve.api.errors import invalid
from jina_v4_serve.api.forms.schema import Body
from jina_v4_serve.api.request import Encoding, Limits
from jina_v4_serve.api.tasks import NO_PREFIX, choose_task
from jina_v4_serve.checkpoint import Prompts
from jina_v4_serve.facts import PROMPT_NAMES

# The prompt of each `input_type`; Cohere's other values have none.
INPUT_TYPES = {
    "query": "query",
    "passage": "passage",
    "document": "passage",
    "search_query": "query",
    "search_document": "passage",
}


def agreed(request: Body, *names: str) -> tuple[str, Any]:
    """Return the name and the value of a field that has several names; if none was sent, the first name and None.

    Raises:
        ApiError: 422 for two different values.
    """
    sent = {name: value for name in names if (value := getattr(request, name)) is not None}
    first = next(iter(sent), names[0])
    for name, value in sent.items():
        if value != sent[first]:
            raise invalid(name, f"{name} contradicts {first}; they are two names of one field")
    return first, sent.get(first)


def settle_task(task: str | None, model: str | None, limits: Limits, field: str = "task") -> str:
    """Return the task of a request. A server of one task serves requests without a task too."""
    return limits.tasks[0] if len(limits.tasks) == 1 else choose_task(task, model, limits.tasks, field)


def agreed_prompt(by_field: Mapping[str, str | None]) -> str | None:
    """Return the prompt name that fields have; None if no field has one.

    Raises:
        ApiError: 422 for two different prompt names.
    """
    prompts = {name: value for name, value in by_field.items() if value is not None}
    if len(set(prompts.values())) > 1:
        values = ", ".join(f"{name} says {value}" for name, value in prompts.items())
        raise invalid(next(iter(prompts)), f"the request contradicts itself: {values}")
    return next(iter(prompts.values()), None)


def text_prompt(prompt_name: str, prompts: Prompts) -> tuple[str, str]:
    """Return the name and the prefix of the prompt of texts.

    If two names have the same prefix, as in text-matching, the first name is returned.
    """
    if prompt_name == NO_PREFIX:
        return prompt_name, ""
    prefix = prompts.prefixes[prompt_name]
    return next(name for name in PROMPT_NAMES if prompts.prefixes[name] == prefix), prefix


def check_range(name: str, value: int | None, lowest: int, highest: int, where: str = "") -> None:
    """Refuse a number outside of a range (422); None is allowed."""
    if value is not None and not lowest <= value <= highest:
        raise invalid(name, f"{name}={value} is not offered{where}; choose {lowest} to {highest}", value)


def check_dimensions(name: str, value: int | None, limits: Limits, encodings: Sequence[Encoding]) -> None:
    """Refuse a size of dense vectors that is not offered, or for bits one that does not fill bytes (422)."""
    check_range(name, value, 1, limits.max_dimensions)
    if value is not None and value % 8 and {"binary", "ubinary"} & set(encodings):
        raise invalid(name, f"{name}={value} does not fill whole bytes; for bits choose a multiple of 8", value)


def check_max_pixels(value: int | None, limits: Limits) -> None:
    """Refuse an image area that is not offered (422)."""
    check_range("max_pixels", value, limits.min_pixels, limits.max_pixels, " by this server")


def text_length(
    name: str, value: int | None, limits: Limits, *, cut: bool | None, switch: str, lowest: int = 1
) -> int | None:
    """Return the length in tokens to which texts are cut; None refuses texts over the server's limit.

    Args:
        name: the field that has the length.
        value: of that field.
        limits: of this server.
        cut: the value of the field that says whether to cut texts; None if it is absent.
        switch: the name and the "no" of that field, for messages.
        lowest: the lowest length that is offered.

    Raises:
        ApiError: 422 for a length that is not offered, or that contradicts `cut`.
    """
    if value is None:
        return limits.max_length if cut else None
    if cut is False:
        raise invalid(name, f"{name} contradicts {switch}; send one of them")
    check_range(name, value, lowest, limits.max_length)
    return value
