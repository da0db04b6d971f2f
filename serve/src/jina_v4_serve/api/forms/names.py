"""What fields of several forms say: names of one field, prompts, the sizes of vectors and images."""

from collections.abc import Mapping, Sequence
from typing import Any

from jina_v4_serve.api.errors import invalid
from jina_v4_serve.api.request import Encoding, Limits
from jina_v4_serve.api.tasks import NO_PREFIX
from jina_v4_serve.checkpoint import Prompts
from jina_v4_serve.facts import PROMPT_NAMES


def agreed(fields: Mapping[str, Any]) -> tuple[str, Any]:
    """Return the name and the value of a field; where none of its names was sent, the first one and None.

    Args:
        fields: the names of one field, with what was sent under each.

    Raises:
        ApiError: 422 for two values.
    """
    sent = {name: value for name, value in fields.items() if value is not None}
    first = next(iter(sent), next(iter(fields)))
    for name, value in sent.items():
        if value != sent[first]:
            raise invalid(name, f"{name} contradicts {first}; they are two names of one field")
    return first, sent.get(first)


def agreed_prompt(said: Mapping[str, str | None]) -> str | None:
    """Return the prompt name that fields say; None where none does.

    Raises:
        ApiError: 422 for two prompts.
    """
    prompts = {name: value for name, value in said.items() if value is not None}
    if len(set(prompts.values())) > 1:
        held = ", ".join(f"{name} says {value}" for name, value in prompts.items())
        raise invalid(next(iter(prompts)), f"the request contradicts itself: {held}")
    return next(iter(prompts.values()), None)


def check_dimensions(name: str, value: int, limits: Limits, encodings: Sequence[Encoding]) -> int:
    """Check the size of dense vectors.

    Raises:
        ApiError: 422 for one that is not offered, or whose bits do not fill bytes.
    """
    if not 1 <= value <= limits.max_dimensions:
        raise invalid(name, f"{name}={value} is not offered; choose 1 to {limits.max_dimensions}", value)
    if value % 8 and {"binary", "ubinary"} & set(encodings):
        raise invalid(name, f"{name}={value} does not fill whole bytes; for bits choose a multiple of 8", value)
    return value


def check_max_pixels(value: int | None, limits: Limits) -> None:
    """Check the size that images are scaled down to.

    Raises:
        ApiError: 422 for one that is not offered.
    """
    lowest, highest = limits.min_pixels, limits.max_pixels
    if value is not None and not lowest <= value <= highest:
        message = f"max_pixels={value} is not offered by this server; choose {lowest} to {highest}"
        raise invalid("max_pixels", message, value)


def text_prompt(prompt_name: str, prompts: Prompts) -> tuple[str, str]:
    """Return the name and the prefix of the prompt that texts get.

    Where two names have one prefix, as in text-matching, it is the first name's.

    Args:
        prompt_name: that the request says.
        prompts: of its task.
    """
    if prompt_name == NO_PREFIX:
        return prompt_name, ""
    prefix = prompts.prefixes[prompt_name]
    return next(name for name in PROMPT_NAMES if prompts.prefixes[name] == prefix), prefix
