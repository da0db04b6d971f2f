"""What one call asks for, whichever kind of server answers, and how it is cut into requests."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from jina_v4_client._images import PreparedImage
from jina_v4_client._model import MAX_PIXELS, PromptName, count_image_tokens
from jina_v4_client._pooling import Vector
from jina_v4_client.errors import BadReplyError

_BYTES_PER_TOKEN = 4  # of text: a server of ours estimates by the same rule whether a request fits its budget
_IMAGE_PROMPT_TOKENS = 11  # around an image's own


@dataclass(frozen=True)
class Texts:
    """Texts, without prefix.

    Attributes:
        places: where each item stands in the call.
        multivector: whether a row a token is wanted; truncate_dim is of no concern then.
    """

    items: Sequence[str]
    places: Sequence[int]
    prompt_name: PromptName
    max_length: int
    multivector: bool
    truncate_dim: int | None


@dataclass(frozen=True)
class Images:
    """Images; `places` and `multivector` as for texts."""

    items: Sequence[PreparedImage]
    places: Sequence[int]
    max_pixels: int | None
    multivector: bool
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


def check_widths(vectors: Sequence[Vector]) -> None:
    """Refuse vectors of several requests that differ in their dimensions."""
    dims = sorted({vector.shape[-1] for vector in vectors})
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
