"""What one call asks for, whichever kind of server answers, and how it is cut into requests."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from jina_v4_client._images import PreparedImage
from jina_v4_client._model import MAX_PIXELS, PromptName, count_image_tokens
from jina_v4_client._pooling import Vector
from jina_v4_client.errors import BadReplyError
from jina_v4_client.results import Both

Output = Literal["dense", "multivector"]
Item = Vector | Both
_BYTES_PER_TOKEN = 4  # of text: a server of ours estimates by the same rule whether a request fits its budget
_IMAGE_PROMPT_TOKENS = 11  # around an image's own


@dataclass(frozen=True)
class Texts:
    """Texts, without prefix.

    Attributes:
        places: where each item stands in the call.
        prompt_name: what is put before each; None for nothing.
        outputs: a vector an item, a row a token, or both.
        truncate_dim: of dense vectors.
    """

    items: Sequence[str]
    places: Sequence[int]
    prompt_name: PromptName | None
    max_length: int
    outputs: Sequence[Output]
    truncate_dim: int | None


@dataclass(frozen=True)
class Images:
    """Images; `places`, `outputs` and `truncate_dim` as for texts."""

    items: Sequence[PreparedImage]
    places: Sequence[int]
    max_pixels: int | None
    outputs: Sequence[Output]
    truncate_dim: int | None


Batch = Texts | Images


@dataclass(frozen=True)
class BatchLimits:
    """What goes into one request at most; one item that is over them alone goes alone.

    Attributes:
        max_tokens: as estimated from the lengths of texts and the sizes of images.
        max_bytes: of the items as they are sent.
    """

    max_items: int
    max_tokens: int
    max_bytes: int


def cut(whole: Batch, limits: BatchLimits) -> Iterator[Batch]:
    """Cut a batch into smaller ones, in order, each as large as the limits allow."""
    measure = _measure_of(whole)
    start, n_tokens, n_bytes = 0, 0, 0
    for index in range(len(whole.items)):
        item_tokens, item_bytes = measure(index)
        n_tokens, n_bytes = n_tokens + item_tokens, n_bytes + item_bytes
        full = index - start >= limits.max_items or n_tokens > limits.max_tokens or n_bytes > limits.max_bytes
        if full and index > start:
            yield part(whole, range(start, index))
            start, n_tokens, n_bytes = index, item_tokens, item_bytes
    if start < len(whole.items):
        yield part(whole, range(start, len(whole.items)))


def part(whole: Batch, indexes: Sequence[int]) -> Batch:
    """Give the batch of some of the items."""
    places = [whole.places[index] for index in indexes]
    if isinstance(whole, Texts):
        return replace(whole, items=[whole.items[index] for index in indexes], places=places)
    return replace(whole, items=[whole.items[index] for index in indexes], places=places)


def together(dense: Sequence[Vector] | None, multivectors: Sequence[Vector] | None) -> list[Item]:
    """Give for each item what was asked for: one of the two kinds, or both."""
    if dense is None or multivectors is None:
        return [*(dense or ()), *(multivectors or ())]
    return [Both(vector, rows) for vector, rows in zip(dense, multivectors, strict=True)]


def check_widths(items: Sequence[Item]) -> None:
    """Refuse vectors of several requests that differ in their dimensions; those of multi-vectors are always 128."""
    dims = sorted({(item.dense if isinstance(item, Both) else item).shape[-1] for item in items})
    if len(dims) > 1:
        raise BadReplyError(f"the server answered one call with vectors of {dims} dimensions: nothing is returned")


def _measure_of(whole: Batch) -> Callable[[int], tuple[int, int]]:
    """Give the function that estimates tokens and bytes of an item."""
    if isinstance(whole, Texts):
        texts, longest = whole.items, whole.max_length

        def measure(index: int) -> tuple[int, int]:
            n_bytes = len(texts[index].encode())
            return min(n_bytes // _BYTES_PER_TOKEN + 2, longest), n_bytes
    else:
        images, max_pixels = whole.items, MAX_PIXELS if whole.max_pixels is None else whole.max_pixels

        def measure(index: int) -> tuple[int, int]:
            image = images[index]
            n_tokens = count_image_tokens(image.width, image.height, max_pixels) + _IMAGE_PROMPT_TOKENS
            return n_tokens, len(image.content) * 4 // 3  # base64

    return measure
