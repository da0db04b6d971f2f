"""The content of a row: what is sent to be embedded, and the digest by which equal content is known.

Rows are read lazily: a resumed run passes over the rows that are done without opening an image or rendering a page.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from jina_v4_client.embed.errors import RowError

Kind = Literal["text", "image"]
DIGEST_BYTES = 16  # of sha256: among 10 million rows two different ones share it with a chance of 1e-25


@dataclass(frozen=True)
class Content:
    """One thing to embed.

    Attributes:
        value: a text; or an image as the bytes of a file, a URL, a data URI or a PIL image.
        digest: equal for equal content.
    """

    kind: Kind
    value: str | bytes | Image.Image
    digest: bytes


@dataclass(frozen=True)
class Row:
    """A row of the corpus.

    Attributes:
        read: gives the content; raises RowError if there is none. To be called before the next row is asked for.
    """

    id: str
    read: Callable[[], Content]


def make_row(row_id: object, read: Callable[[], Content]) -> Row:
    """Make a row; what cannot be written as UTF-8 in its id (file names can hold it) is escaped."""
    return Row(str(row_id).encode("utf-8", "backslashreplace").decode("utf-8"), read)


def broken_row(row_id: object, message: str) -> Row:
    """Make a row that has no content."""

    def read() -> Content:
        raise RowError(message)

    return make_row(row_id, read)


def text_content(text: str) -> Content:
    """Give a text as content."""
    # A lone surrogate cannot be sent; the client says so, and the row fails there.
    return Content("text", text, _digest(b"text", text.encode("utf-8", "surrogatepass")))


def bytes_content(file: bytes) -> Content:
    """Give the bytes of an image file as content."""
    return Content("image", file, _digest(b"file", file))


def file_content(path: Path) -> Content:
    """Give an image file as content.

    Raises:
        RowError: it cannot be read. Whether it is an image is found out later, by the client.
    """
    try:
        return bytes_content(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RowError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def named_image_content(name: str, folder: Path) -> Content:
    """Give an image that is named by a path, a URL or a data URI as content.

    Args:
        name: of the image.
        folder: what a path is relative to.
    """
    # What is behind a URL is fetched by a worker, so equal URLs are equal content.
    if name[:8].lower().startswith(("http://", "https://", "data:")):
        return Content("image", name, _digest(b"name", name.encode("utf-8", "surrogatepass")))
    return file_content(folder / name)


def picture_content(picture: Image.Image) -> Content:
    """Give a picture as content."""
    size = f"{picture.mode} {picture.width} {picture.height}".encode()
    return Content("image", picture, _digest(size, picture.tobytes()))


def _digest(kind: bytes, content: bytes) -> bytes:
    return hashlib.sha256(kind + b"\0" + content).digest()[:DIGEST_BYTES]
