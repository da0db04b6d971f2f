"""The arguments of a client and of a call: what is allowed, what is wrong, and the checked call that the core sends.

The first three checks of a call are the published model's, in its order and its words.
"""

import math
import numbers
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import urlsplit

import numpy as np

from jina_v4_client._images import SINGLE_IMAGE
from jina_v4_client._model import (
    MAX_LENGTH,
    MIN_PIXELS,
    PROMPT_NAMES,
    TASKS,
    TRUNCATE_DIMS,
    Output,
    PromptName,
    Task,
    named_task,
    text_prefix,
)
from jina_v4_client._wire import WIRE_DTYPES, WIRE_FORMATS, WireDtype, WireFormat
from jina_v4_client.errors import ArgumentError

T = TypeVar("T")
FIRST, LAST = 0, 999  # priorities: the lower is computed first
SENTENCES_MAX_LENGTH = 8192  # tokens, in the published sentence-transformers code
_PUBLISHED = "Invalid {name}: {value}. Must be one of {allowed}."
_REVISION = re.compile(r"[0-9a-f]{16}-[a-z0-9_+]+-[0-9]+")


@dataclass(frozen=True)
class Limits:
    """How long, how often and how many at a time."""

    timeout_s: float  # of one request
    total_timeout_s: float | None  # of a whole call
    max_retries: int  # of one request
    max_concurrency: int  # requests of a call that are in flight or wait to be repeated

    def __post_init__(self) -> None:
        """Check every limit."""
        check_seconds("timeout_s", self.timeout_s)
        if self.total_timeout_s is not None:
            check_seconds("total_timeout_s", self.total_timeout_s)
        check_count("max_retries", self.max_retries, at_least=0)
        check_count("max_concurrency", self.max_concurrency, at_least=1)


@dataclass(kw_only=True)
class Call:
    """One call. Its arguments are checked when it is made, its items by those who read them."""

    name: str  # of the argument that holds the items, for messages: texts, images, sentences (of both kinds) or pages
    items: list[object]  # one item or several before they are checked
    task: Task
    batch_size: int
    truncate_dim: int | None
    progress: object
    outputs: tuple[Output, ...] = ("dense",)
    as_array: bool = False
    on_error: object = "raise"
    max_length: int = MAX_LENGTH
    max_pixels: int | None = None
    prompt_name: PromptName | None = None  # what the server puts before each text; None for nothing
    prompt: object = None
    single: bool = field(init=False)  # one item, not a list
    skip: bool = field(init=False)  # an item that fails is left out instead of ending the call

    def __post_init__(self) -> None:
        """Check every argument."""
        if self.name == "texts" or self.prompt_name is not None:
            self.prompt_name = check_prompt_name(self.prompt_name)
        if self.prompt is not None:
            prompts = {text_prefix("retrieval", name): name for name in (*PROMPT_NAMES, None)}
            if self.prompt_name is not None or not isinstance(self.prompt, str) or self.prompt not in prompts:
                raise ArgumentError(
                    f"prompt={self.prompt!r} is not offered: give prompt_name='query' or 'passage' instead"
                )
            self.prompt_name = prompts[self.prompt]
        self.truncate_dim = check_truncate_dim(self.truncate_dim)
        self.task = choose_task(self.task)
        self.max_length = check_count("max_length", self.max_length, at_least=1, at_most=MAX_LENGTH)
        self.max_pixels = check_max_pixels(self.max_pixels)
        self.batch_size = check_count("batch_size", self.batch_size, at_least=1)
        self.items, self.single = as_list(self.name, self.items, (str,) if self.name == "texts" else SINGLE_IMAGE)
        self.skip = check_choice("on_error", self.on_error, ("raise", "skip")) == "skip"
        self.as_array = self.as_array and self.outputs == ("dense",)


def check_choice(
    name: str, value: object, allowed: Sequence[T], refusal: str = "{name}={value!r} is not offered; choose {choices}"
) -> T:
    """Refuse what is not one of the allowed values."""
    for known in allowed:
        if isinstance(value, str) and value == known:
            return known
    choices = (", " if len(allowed) > 2 else " or ").join(map(str, allowed))
    raise ArgumentError(refusal.format(name=name, value=value, allowed=list(allowed), choices=choices))


def check_prompt_name(prompt_name: object) -> PromptName:
    """Refuse a prompt name other than "query", for which None stands too, and "passage"."""
    return check_choice("prompt_name", "query" if prompt_name is None else prompt_name, PROMPT_NAMES, _PUBLISHED)


def check_truncate_dim(truncate_dim: object) -> int | None:
    """Refuse a dimension that the model was not trained for."""
    dim = _as_integer(truncate_dim)
    if truncate_dim is not None and dim not in TRUNCATE_DIMS:
        raise ArgumentError(_PUBLISHED.format(name="truncate_dim", value=truncate_dim, allowed=list(TRUNCATE_DIMS)))
    return dim


def check_known_task(task: object) -> Task:
    """Refuse a name that is not a task."""
    return check_choice("task", task, TASKS, _PUBLISHED)


def choose_task(task: object) -> Task:
    """Refuse a call without a task: neither it nor its client has one."""
    if task is None:
        raise ArgumentError(
            "No task is given, and the vectors of one task are of no use for another: pass task= to this call, or once "
            f"for all calls to EmbeddingsClient(..., task=...). Must be one of {list(TASKS)}."
        )
    return check_known_task(task)


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


def check_max_pixels(max_pixels: object) -> int | None:
    """Refuse a pixel limit below the smallest image."""
    return None if max_pixels is None else check_count("max_pixels", max_pixels, at_least=MIN_PIXELS)


def check_count(name: str, value: object, *, at_least: int, at_most: int | None = None) -> int:
    """Refuse what is no integer within the limits; True and False are no integers here."""
    count = _as_integer(value)
    if count is None or count < at_least or (at_most is not None and count > at_most):
        limits = f"at least {at_least}" if at_most is None else f"{at_least} to {at_most}"
        raise ArgumentError(f"{name}={value!r} is not allowed; give an integer, {limits}")
    return count


def _as_integer(value: object) -> int | None:
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None


def as_list(name: str, items: object, single: tuple[type, ...]) -> tuple[list[object], bool]:
    """Return the items as a list, and whether one item was given instead of a sequence of them."""
    if isinstance(items, single):
        return [items], True
    is_no_list = isinstance(items, str | bytes | bytearray) or getattr(items, "ndim", 1) == 0  # an array of one text
    if is_no_list or not isinstance(items, Sequence | np.ndarray):
        raise ArgumentError(f"{name} must be one item or a list of items, not {type(items).__name__}")
    if len(items) == 0:
        raise ArgumentError(f"{name} is empty; give at least one item")
    return list(items), False


def check_seconds(name: str, value: object) -> None:
    """Refuse what is no positive and finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ArgumentError(f"{name}={value!r} is not allowed; give a number of seconds above 0")


def check_revision(revision: object) -> str | None:
    """Refuse what is no revision that a server could name."""
    if revision is None or (isinstance(revision, str) and _REVISION.fullmatch(revision)):
        return revision
    raise ArgumentError(f"revision={revision!r} is not allowed; give what `revision()` of a client returned, or None")


def check_wire(wire_format: object, wire_dtype: object) -> tuple[WireFormat, WireDtype]:
    """Refuse a format or a dtype that no server of ours sends."""
    form = check_choice("wire_format", wire_format, WIRE_FORMATS)
    dtype = check_choice("wire_dtype", wire_dtype, WIRE_DTYPES)
    if dtype == "float16" and form != "safetensors":
        raise ArgumentError(f"wire_dtype='float16' is sent as safetensors only, not as wire_format={wire_format!r}")
    return form, dtype


def check_base_url(base_url: object) -> str:
    """Return the address of the server without its ``/v1``."""
    if not isinstance(base_url, str):
        raise ArgumentError(f"base_url must be a str, not {type(base_url).__name__}")
    try:
        parts = urlsplit(base_url)
        labels = (parts.hostname or "").removesuffix(".").split(".")
        whole = parts.scheme in ("http", "https") and parts.port != 0 and all(0 < len(label) < 64 for label in labels)
    except ValueError:
        whole = False
    if not whole:
        raise ArgumentError(f"base_url={base_url!r} is no address of a server; give one like http://127.0.0.1:8000")
    if parts.username is not None or parts.query or parts.fragment:
        raise ArgumentError("base_url must not hold a user name, a query or a fragment; a key is given as api_key=")
    return base_url.rstrip("/").removesuffix("/v1").rstrip("/")


def choose_api_key(api_key: object) -> str:
    """Return the key of the caller, else of JINA_V4_API_KEY, else a stand-in; never repeat it in a message."""
    origin = "api_key"
    if api_key is None:
        # A key that was read from a file into the environment often keeps the end of its line.
        api_key, origin = os.environ.get("JINA_V4_API_KEY", "").strip(), "the environment variable JINA_V4_API_KEY"
    if not api_key:
        # With no key at all the openai package would look for the user's own OpenAI key.
        return "none"
    if not isinstance(api_key, str) or not api_key.isascii() or not api_key.isprintable() or " " in api_key:
        raise ArgumentError(f"{origin} must be one word of printable ASCII characters, to be sent in a header")
    return api_key
