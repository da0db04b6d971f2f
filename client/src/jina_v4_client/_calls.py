"""A call: its arguments and its items, how they are checked and read, and cut into batches.

The first three checks of a call are the published model's, in its order and its words.
"""

import math
import numbers
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from jina_v4_client._images import (
    SINGLE_IMAGE,
    PreparedImage,
    describe,
    is_data_uri,
    is_image_file,
    is_url,
    prepare,
    read_source,
)
from jina_v4_client._model import (
    IMAGE_FRAME,
    MAX_LENGTH,
    MAX_PIXELS,
    MIN_PIXELS,
    PROMPT_NAMES,
    TASKS,
    TRUNCATE_DIMS,
    Output,
    PromptName,
    Task,
    count_image_tokens,
    named_task,
    text_prefix,
)
from jina_v4_client._server import WIRE_DTYPES, WIRE_FORMATS, WireDtype, WireFormat
from jina_v4_client.errors import ArgumentError, ImageError, JinaV4Error
from jina_v4_client.results import Vector

T = TypeVar("T")
FIRST, LAST = 0, 999  # priorities: the lower is computed first
SENTENCES_MAX_LENGTH = 8192  # tokens, in the published sentence-transformers code
MAX_BYTES = 32 * 2**20  # of a request: half of the largest body that our server accepts
_BYTES_PER_TOKEN = 4  # of text: our server uses the same rule to estimate whether a request fits its budget
_IMAGE_PROMPT_TOKENS = sum(IMAGE_FRAME) + 2  # around an image's own
_A4 = (1191, 1684)  # pixels, as a server renders a page
_PUBLISHED = "Invalid {name}: {value}. Must be one of {allowed}."
_REVISION = re.compile(r"[0-9a-f]{16}-[a-z0-9_+]+-[0-9]+")


@dataclass(eq=False)
class PdfFile:
    """A PDF file, its number of pages once a server has counted them, and its vectors so far, by page."""

    name: str
    content: bytes
    n_pages: int = 0
    vectors: dict[int, Vector] = field(default_factory=dict)


@dataclass(frozen=True)
class PdfPage:
    """A page of a file; the first is number 1."""

    file: PdfFile
    number: int


@dataclass
class Call:
    """One call. Its arguments are checked when it is made, its items by `read_items`."""

    name: str  # of the items, for messages: texts, images, sentences (of both kinds), files or, of these, pages
    items: list[Any]  # one item or several; once they are read, texts without prefix, PreparedImage or PdfPage
    task: Task
    batch_size: int
    truncate_dim: int | None
    progress: object
    on_error: object = "raise"
    outputs: tuple[Output, ...] = ("dense",)
    as_array: bool = False
    max_length: int = MAX_LENGTH
    max_pixels: int | None = None
    prompt_name: PromptName | None = None  # what the server puts before each text; None for nothing
    prompt: object = None
    pages: Sequence[int] | None = None  # of each file; None for all
    single: bool = field(init=False)  # one item, not a list
    skip: bool = field(init=False)  # an item that fails is left out instead of ending the call

    def __post_init__(self) -> None:
        """Check every argument."""
        if self.name == "texts" or self.prompt_name is not None:
            prompt_name = "query" if self.prompt_name is None else self.prompt_name
            self.prompt_name = check_choice("prompt_name", prompt_name, PROMPT_NAMES, _PUBLISHED)
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

    def locate(self, place: int, error: Exception) -> ImageError:
        """Add to an error which image of the call it is about."""
        located = ImageError(f"{self.name}[{place}] ({describe(self.items[place])}): {error}")
        located.__cause__ = error
        return located


def check_choice(
    name: str, value: object, allowed: Sequence[T], refusal: str = "{name}={value!r} is not offered; choose {choices}"
) -> T:
    """Refuse what is not one of the allowed values."""
    for known in allowed:
        if isinstance(value, str) and value == known:
            return known
    choices = (", " if len(allowed) > 2 else " or ").join(map(str, allowed))
    raise ArgumentError(refusal.format(name=name, value=value, allowed=list(allowed), choices=choices))


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
    """Refuse a model whose name contradicts the task."""
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
    """Refuse anything but an integer within the limits; True and False do not count as integers."""
    count = _as_integer(value)
    if count is None or count < at_least or (at_most is not None and count > at_most):
        limits = f"at least {at_least}" if at_most is None else f"{at_least} to {at_most}"
        raise ArgumentError(f"{name}={value!r} is not allowed; give an integer, {limits}")
    return count


def _as_integer(value: object) -> int | None:
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None


def as_list(name: str, items: object, single: tuple[type, ...]) -> tuple[list[object], bool]:
    """Return the items as a list, and whether the caller passed a single item instead of a sequence."""
    if isinstance(items, single):
        return [items], True
    is_no_list = isinstance(items, str | bytes | bytearray) or getattr(items, "ndim", 1) == 0  # an array of one text
    if is_no_list or not isinstance(items, Sequence | np.ndarray):
        raise ArgumentError(f"{name} must be one item or a list of items, not {type(items).__name__}")
    if len(items) == 0:
        raise ArgumentError(f"{name} is empty; give at least one item")
    return list(items), False


def check_seconds(name: str, value: object) -> float:
    """Refuse anything but a positive, finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ArgumentError(f"{name}={value!r} is not allowed; give a number of seconds above 0")
    return value


def check_revision(revision: object) -> str | None:
    """Refuse anything but a revision as servers write it."""
    if revision is None or (isinstance(revision, str) and _REVISION.fullmatch(revision)):
        return revision
    raise ArgumentError(f"revision={revision!r} is not allowed; give what `revision()` of a client returned, or None")


def check_wire(wire_format: object, wire_dtype: object) -> tuple[WireFormat, WireDtype]:
    """Refuse a format or a dtype that our server does not send."""
    form = check_choice("wire_format", wire_format, WIRE_FORMATS)
    dtype = check_choice("wire_dtype", wire_dtype, WIRE_DTYPES)
    if dtype == "float16" and form != "safetensors":
        raise ArgumentError(f"wire_dtype='float16' is sent as safetensors only, not as wire_format={wire_format!r}")
    return form, dtype


def choose_api_key(api_key: object) -> str:
    """Return the caller's key, or that of JINA_V4_API_KEY, or a placeholder; no message may contain it."""
    origin = "api_key"
    if api_key is None:
        # A key that was read from a file into the environment often ends with a newline.
        api_key, origin = os.environ.get("JINA_V4_API_KEY", "").strip(), "the environment variable JINA_V4_API_KEY"
    if not api_key:
        # With no key at all the openai package would look for the user's own OpenAI key.
        return "none"
    if not isinstance(api_key, str) or not api_key.isascii() or not api_key.isprintable() or " " in api_key:
        raise ArgumentError(f"{origin} must be one word of printable ASCII characters, to be sent in a header")
    return api_key


def read_items(call: Call) -> tuple[list[int], dict[int, JinaV4Error]]:
    """Check the items, and read the images that are files. Without skip, stop at the first that fails.

    Returns:
        The places of the URLs, which must be fetched, and errors by place.
    """
    urls: list[int] = []
    errors: dict[int, JinaV4Error] = {}
    for place, item in enumerate(call.items):
        is_image = call.name == "images" or (call.name == "sentences" and _is_image(item))
        try:
            if not is_image:
                _check_text(call, place, item)
            elif is_url(item):
                urls.append(place)
            else:
                call.items[place] = prepare(read_source(item))
        except ArgumentError as error:
            errors[place] = call.locate(place, error) if is_image else error
            if not call.skip:
                break
    return urls, errors


def _is_image(item: object) -> bool:
    """Tell whether a sentence is an image. A string may be a text, an image, or the path of an image file."""
    return not isinstance(item, str) or is_url(item) or is_data_uri(item) or is_image_file(item)


def _check_text(call: Call, place: int, text: object) -> None:
    where = f"{call.name}[{place}]"
    if not isinstance(text, str):
        raise ArgumentError(f"{where} must be a str, not {type(text).__name__}")
    if not text and call.name == "sentences" and call.prompt_name is None:
        raise ArgumentError(f"{where} is empty, and without prompt_name no token is left of it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(
            f"{where} cannot be written as UTF-8: character {error.start} is a lone surrogate "
            f"(U+{ord(text[error.start]):04X}); decode the text with errors='replace'"
        ) from error


@dataclass(frozen=True)
class Batch:
    """Some places of a call, all texts, all images or all pages; pages of a batch that is sent are of one PDF file."""

    call: Call
    places: Sequence[int]

    @property
    def items(self) -> list[Any]:
        """What is at the places."""
        return [self.call.items[place] for place in self.places]

    @property
    def is_text(self) -> bool:
        """Whether these are texts."""
        return isinstance(self.call.items[self.places[0]], str)

    @property
    def file(self) -> PdfFile | None:
        """The PDF file that the first is a page of."""
        return getattr(self.call.items[self.places[0]], "file", None)


def cut(whole: Batch, max_items: int, max_tokens: int, max_bytes: int = MAX_BYTES) -> Iterator[Batch]:
    """Cut a batch into smaller ones, in order, each as large as the limits allow; a larger item goes alone."""
    places: list[int] = []
    file, n_tokens, n_bytes = None, 0, 0
    for place, item in zip(whole.places, whole.items, strict=True):
        item_tokens, item_bytes = _size(whole.call, item)
        n_tokens, n_bytes = n_tokens + item_tokens, n_bytes + item_bytes
        last_file, file = file, getattr(item, "file", None)
        full = len(places) >= max_items or n_tokens > max_tokens or n_bytes > max_bytes or file is not last_file
        if full and places:
            yield Batch(whole.call, places)
            places, n_tokens, n_bytes = [], item_tokens, item_bytes
        places.append(place)
    if places:
        yield Batch(whole.call, places)


def _size(call: Call, item: str | PreparedImage | PdfPage) -> tuple[int, int]:
    """Estimate the tokens and the bytes of an item as it is sent."""
    if isinstance(item, str):
        n_bytes = len(item.encode())
        return min(n_bytes // _BYTES_PER_TOKEN + 2, call.max_length), n_bytes
    if isinstance(item, PdfPage):
        width, height, n_bytes = *_A4, 0  # its file is sent once for all of its pages
    else:
        width, height, n_bytes = item.width, item.height, len(item.content) * 4 // 3  # base64
    return count_image_tokens(width, height, call.max_pixels or MAX_PIXELS) + _IMAGE_PROMPT_TOKENS, n_bytes
