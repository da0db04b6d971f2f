"""Checks of arguments, before anything is sent: what is wrong, what is allowed.

The first three checks of a call are the published model's, in its order and its words.
"""

import math
import numbers
import os
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

import numpy as np

from jina_v4_client._model import (
    MAX_LENGTH,
    MIN_PIXELS,
    PROMPT_NAMES,
    STRUCTURE_TOKENS,
    TASKS,
    TRUNCATE_DIMS,
    PromptName,
    Task,
    named_task,
)
from jina_v4_client._wire import WIRE_DTYPES, WIRE_FORMATS, WireDtype, WireFormat
from jina_v4_client.errors import ArgumentError

_REVISION = re.compile(r"[0-9a-f]{16}-[a-z0-9_+]+-[0-9]+")
_STRUCTURE_TOKEN = re.compile("|".join(map(re.escape, STRUCTURE_TOKENS)))


def check_prompt_name(prompt_name: object) -> PromptName:
    """Refuse a prompt name other than "query", for which None stands too, and "passage"."""
    for known in PROMPT_NAMES:
        if prompt_name == known:
            return known
    if prompt_name is None:
        return "query"
    raise ArgumentError(f"Invalid prompt_name: {prompt_name}. Must be one of {list(PROMPT_NAMES)}.")


def check_revision(revision: object) -> str | None:
    """Refuse what is no revision that a server could tell."""
    if revision is None or (isinstance(revision, str) and _REVISION.fullmatch(revision)):
        return revision
    raise ArgumentError(f"revision={revision!r} is not allowed; give what `revision()` of a client returned, or None")


def check_truncate_dim(truncate_dim: object) -> int | None:
    """Refuse a dimension that the model was not trained for."""
    if truncate_dim is None:
        return None
    dim = _as_integer(truncate_dim)
    if dim not in TRUNCATE_DIMS:
        raise ArgumentError(f"Invalid truncate_dim: {truncate_dim}. Must be one of {list(TRUNCATE_DIMS)}.")
    return dim


def check_known_task(task: object) -> Task:
    """Refuse a name that is not a task."""
    for known in TASKS:
        if task == known:
            return known
    raise ArgumentError(f"Invalid task: {task}. Must be one of {list(TASKS)}.")


def choose_task(task: object, default: Task | None) -> Task:
    """Give the task of the call, else the client's; refuse if neither names one."""
    if task is not None:
        return check_known_task(task)
    if default is None:
        raise ArgumentError(
            "No task is given, and the vectors of one task are of no use for another: pass task= to this call, or once "
            f"for all calls to EmbeddingsClient(..., task=...). Must be one of {list(TASKS)}."
        )
    return default


def check_model(model: object, task: Task | None = None) -> str | None:
    """Refuse a model whose name says another task than the one asked for."""
    if model is None:
        return None
    if not isinstance(model, str) or not model:
        raise ArgumentError(f"model={model!r} is not allowed; give the name of a served model, or None")
    named = named_task(model)
    if task is not None and named not in (None, task):
        raise ArgumentError(
            f"model={model!r} is for the task {named!r}, and {task!r} was asked for: leave model out, and it is chosen "
            "by the task"
        )
    return model


def check_wire(wire_format: object, wire_dtype: object) -> tuple[WireFormat, WireDtype]:
    """Refuse a format or a dtype that no server of ours sends."""
    forms = [known for known in WIRE_FORMATS if wire_format == known]
    dtypes = [known for known in WIRE_DTYPES if wire_dtype == known]
    if not forms:
        raise ArgumentError(f"wire_format={wire_format!r} is not offered; choose {', '.join(WIRE_FORMATS)}")
    if not dtypes:
        raise ArgumentError(f"wire_dtype={wire_dtype!r} is not offered; choose {' or '.join(WIRE_DTYPES)}")
    if dtypes[0] == "float16" and forms[0] != "safetensors":
        raise ArgumentError(f"wire_dtype='float16' is sent as safetensors only, not as wire_format={wire_format!r}")
    return forms[0], dtypes[0]


def check_count(name: str, value: object, *, at_least: int, at_most: int | None = None) -> int:
    """Refuse what is no integer within the limits; True and False are no integers here."""
    limits = f"at least {at_least}" if at_most is None else f"{at_least} to {at_most}"
    count = _as_integer(value)
    if count is None or count < at_least or (at_most is not None and count > at_most):
        raise ArgumentError(f"{name}={value!r} is not allowed; give an integer, {limits}")
    return count


def check_max_length(max_length: object) -> int:
    """Refuse a token limit outside 1 to 32768."""
    return check_count("max_length", max_length, at_least=1, at_most=MAX_LENGTH)


def check_max_pixels(max_pixels: object) -> int | None:
    """Refuse a pixel limit below the smallest image."""
    return None if max_pixels is None else check_count("max_pixels", max_pixels, at_least=MIN_PIXELS)


def check_seconds(name: str, value: object) -> float:
    """Refuse a time that is not positive and finite."""
    seconds = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not 0 < seconds < math.inf:
        raise ArgumentError(f"{name}={value!r} is not allowed; give a number of seconds above 0")
    return seconds


def check_on_error(on_error: object) -> bool:
    """Tell whether items that fail are skipped."""
    if on_error not in ("raise", "skip"):
        raise ArgumentError(f"on_error={on_error!r} is not offered; choose raise or skip")
    return on_error == "skip"


def as_list(name: str, items: object, single: tuple[type, ...]) -> tuple[list[object], bool]:
    """Give the items as a list, and whether one item was given instead of a sequence of them."""
    if isinstance(items, single):
        return [items], True
    if not isinstance(items, Sequence | np.ndarray) or isinstance(items, str | bytes | bytearray):
        raise ArgumentError(f"{name} must be one item or a list of items, not {type(items).__name__}")
    if len(items) == 0:
        raise ArgumentError(f"{name} is empty; give at least one item")
    return list(items), False


def check_text(where: str, text: object) -> str:
    """Refuse what is no text or cannot be sent; `where` names it in the message."""
    if not isinstance(text, str):
        raise ArgumentError(f"{where} must be a str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(
            f"{where} cannot be written as UTF-8: character {error.start} is a lone surrogate "
            f"(U+{ord(text[error.start]):04X}); decode the text with errors='replace'"
        ) from error
    return text


def check_sentence(where: str, text: object, prompt_name: PromptName | None) -> str:
    """Refuse what is no text, and the empty text where no prompt stands before it: no token would be left to embed."""
    checked = check_text(where, text)
    if not checked and prompt_name is None:
        raise ArgumentError(f"{where} is empty, and without prompt_name nothing stands before it")
    return checked


def structure_token_error(place: int, text: str) -> ArgumentError | None:
    """Refuse a text that would change the structure of the prompt on a stock vLLM; ours reads it as plain text."""
    if token := _STRUCTURE_TOKEN.search(text):
        return ArgumentError(
            f"texts[{place}] holds {token.group()!r} at character {token.start()}, which a stock vLLM reads as part of "
            "the prompt and not as text; take it out, break it up, or ask a server of ours"
        )
    return None


def check_base_url(base_url: object) -> str:
    """Give the address of the server without its ``/v1``."""
    if not isinstance(base_url, str):
        raise ArgumentError(f"base_url must be a str, not {type(base_url).__name__}")
    try:
        parts = urlsplit(base_url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        whole = False
    if not whole:
        raise ArgumentError(f"base_url={base_url!r} is no address of a server; give one like http://127.0.0.1:8000")
    if parts.username is not None or parts.query or parts.fragment:
        raise ArgumentError("base_url must not hold a user name, a query or a fragment; a key is given as api_key=")
    return base_url.rstrip("/").removesuffix("/v1").rstrip("/")


def choose_api_key(api_key: object) -> str:
    """Give the key of the call, else of JINA_V4_API_KEY, else a stand-in; never repeat it in a message."""
    origin = "api_key"
    if api_key is None:
        api_key, origin = os.environ.get("JINA_V4_API_KEY"), "the environment variable JINA_V4_API_KEY"
    if not api_key:
        # With no key at all the openai package would look for the user's own OpenAI key.
        return "none"
    if not isinstance(api_key, str) or not api_key.isascii() or not api_key.isprintable() or " " in api_key:
        raise ArgumentError(f"{origin} must be one word of printable ASCII characters, to be sent in a header")
    return api_key


def _as_integer(value: object) -> int | None:
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None
