"""The items of a call: how they are checked and read, and cut into requests."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jina_v4_client._calls import Call
from jina_v4_client._images import PreparedImage, describe, is_data_uri, is_image_file, is_url, prepare, read_source
from jina_v4_client._model import MAX_PIXELS, count_image_tokens
from jina_v4_client._pdf import PdfFile, PdfPage
from jina_v4_client.errors import ArgumentError, BadReplyError, ImageError, JinaV4Error
from jina_v4_client.results import DenseAndMulti, Vector

Item = Vector | DenseAndMulti
MAX_BYTES = 32 * 2**20  # of a request: half of what a server of ours takes in one body
UNIT_TOLERANCE = 1e-3  # of the length of a vector
_BYTES_PER_TOKEN = 4  # of text: a server of ours estimates by the same rule whether a request fits its budget
_IMAGE_PROMPT_TOKENS = 11  # around an image's own
_A4 = (1191, 1684)  # pixels, as a server renders a page


def read_items(call: Call) -> tuple[dict[int, str | PreparedImage], dict[int, str], dict[int, JinaV4Error]]:
    """Check the items, and read the images that are files; without skip up to the first that fails.

    Returns:
        What can be sent, the URLs that must be fetched, and the errors of the others, all by place.
    """
    ready: dict[int, str | PreparedImage] = {}
    urls: dict[int, str] = {}
    errors: dict[int, JinaV4Error] = {}
    for place, item in enumerate(call.items):
        is_image = call.name == "images" or (call.name == "sentences" and _is_image(item))
        try:
            if not is_image:
                ready[place] = _check_text(call, place, item)
            elif is_url(item):
                urls[place] = item
            else:
                ready[place] = prepare(read_source(item))
        except ArgumentError as error:
            errors[place] = located(call, place, error) if is_image else error
            if not call.skip:
                break
    return ready, urls, errors


def located(call: Call, place: int, error: Exception) -> ImageError:
    """Say which image of the call an error is about."""
    located = ImageError(f"{call.name}[{place}] ({describe(call.items[place])}): {error}")
    located.__cause__ = error
    return located


def _is_image(item: object) -> bool:
    """Tell whether one of several sentences is an image: a string may be either, or name a file that is opened."""
    return not isinstance(item, str) or is_url(item) or is_data_uri(item) or is_image_file(item)


def _check_text(call: Call, place: int, text: object) -> str:
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
    return text


@dataclass(frozen=True)
class Batch:
    """Some items of a call, either texts without prefix, images, or pages of one PDF file.

    Attributes:
        places: where each item stands in the call.
    """

    call: Call
    items: Sequence[Any]
    places: Sequence[int]

    @property
    def is_text(self) -> bool:
        """Whether these are texts."""
        return isinstance(self.items[0], str)

    def file(self, index: int) -> PdfFile | None:
        """Return the PDF file that an item is a page of."""
        item = self.items[index]
        return item.file if isinstance(item, PdfPage) else None

    def part(self, indexes: Sequence[int]) -> "Batch":
        """Return the batch of some of the items."""
        items, places = ([of[index] for index in indexes] for of in (self.items, self.places))
        return replace(self, items=items, places=places)

    def size(self, index: int) -> tuple[int, int]:
        """Estimate the tokens and the bytes of an item as it is sent."""
        item: str | PreparedImage | PdfPage = self.items[index]
        if isinstance(item, str):
            n_bytes = len(item.encode())
            return min(n_bytes // _BYTES_PER_TOKEN + 2, self.call.max_length), n_bytes
        if isinstance(item, PdfPage):
            return count_image_tokens(*_A4, self.call.max_pixels or MAX_PIXELS) + _IMAGE_PROMPT_TOKENS, 0
        n_tokens = count_image_tokens(item.width, item.height, self.call.max_pixels or MAX_PIXELS)
        return n_tokens + _IMAGE_PROMPT_TOKENS, len(item.content) * 4 // 3  # base64


@dataclass(frozen=True)
class BatchLimits:
    """What goes into one request at most; one item that is over them alone goes alone."""

    max_items: int
    max_tokens: int
    max_bytes: int


def cut(whole: Batch, limits: BatchLimits) -> Iterator[Batch]:
    """Cut a batch into smaller ones, in order, each as large as the limits allow."""
    start, n_tokens, n_bytes = 0, 0, 0
    for index in range(len(whole.items)):
        item_tokens, item_bytes = whole.size(index)
        n_tokens, n_bytes = n_tokens + item_tokens, n_bytes + item_bytes
        full = index - start >= limits.max_items or n_tokens > limits.max_tokens or n_bytes > limits.max_bytes
        full = full or whole.file(index) is not whole.file(start)
        if full and index > start:
            yield whole.part(range(start, index))
            start, n_tokens, n_bytes = index, item_tokens, item_bytes
    if start == 0 and whole.items:
        yield whole
    elif start < len(whole.items):
        yield whole.part(range(start, len(whole.items)))


def together(dense: Sequence[Vector] | None, multivectors: Sequence[Vector] | None) -> list[Item]:
    """Return for each item what was asked for: one of the two kinds, or both."""
    if dense is None or multivectors is None:
        return [*(dense or ()), *(multivectors or ())]
    return [DenseAndMulti(vector, rows) for vector, rows in zip(dense, multivectors, strict=True)]


def check_widths(items: Sequence[Item]) -> None:
    """Refuse vectors of several requests that differ in their dimensions; those of multi-vectors are always 128."""
    dims = sorted({(item.dense if isinstance(item, DenseAndMulti) else item).shape[-1] for item in items})
    if len(dims) > 1:
        raise BadReplyError(f"the server answered one call with vectors of {dims} dimensions: nothing is returned")


def row_lengths(rows: Vector) -> NDArray[np.float64]:
    """Return the length of each row of (n, dim)."""
    lengths: NDArray[np.float64] = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))  # (n,)
    return lengths
