"""The content of a row: what is sent to be embedded, and the digest by which equal content is known.

Rows are read lazily: a resumed run passes over the rows that are done without opening an image or rendering a page.
"""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from PIL import Image

from jina_v4_client._images import BLANKS, CLIPPED, CLIPPED_MODES, describe, is_url, open_image, read_string
from jina_v4_client.embed.errors import RowError
from jina_v4_client.errors import ImageError

Kind = Literal["text", "image"]
FIRST_FRAME = "an animation or several pictures in one file: the first is embedded, as by the published code"
DIGEST_BYTES = 16  # of sha256: among 10 million rows two different ones share it with a chance of 1e-25


@dataclass(frozen=True)
class Content:
    """One thing to embed.

    Attributes:
        value: a text; or an image as the bytes of a file, a URL, a data URI or a PIL image.
        digest: equal for equal content.
        note: what somebody should know of what the model will see; None if nothing.
    """

    kind: Kind
    value: str | bytes | Image.Image
    digest: bytes
    note: str | None = None


@dataclass(frozen=True)
class Row:
    """A row of the corpus.

    Attributes:
        read: returns the content; raises RowError if there is none. Call it before the next row is read. That of a
            table's row can be pickled: with `--ray`, another process calls it.
    """

    id: str
    read: Callable[[], Content]


def escaped(text: str) -> str:
    """Escape what cannot be written as UTF-8: names of files can hold it, and so can messages that repeat them."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def make_row(row_id: object, read: Callable[[], Content]) -> Row:
    """Make a row; its id is escaped."""
    return Row(escaped(str(row_id)), read)


def broken_row(row_id: object, message: str) -> Row:
    """Make a row that has no content."""
    return make_row(row_id, partial(_no_content, message))


def text_content(text: str) -> Content:
    """Make content of a text.

    Raises:
        RowError: it holds half of a character, which cannot be sent.
    """
    return Content("text", text, _digest(b"text", _utf8(text)))


def bytes_content(file: bytes) -> Content:
    """Give the bytes of an image file as content."""
    digest, note = _digest(b"file", file), None
    try:
        with open_image(io.BytesIO(file)) as image:
            if image.mode in CLIPPED_MODES:
                return Content("image", image.convert("RGB"), digest, CLIPPED)
            # What is behind the first picture of a phone's JPEG (MPO) is no other page, but a help to show it.
            if image.format != "MPO" and getattr(image, "is_animated", False):
                note = FIRST_FRAME
    except Exception:  # the client says what is wrong with it
        note = None
    return Content("image", file, digest, note)


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
    """Make content of an image that a string refers to (path, URL) or holds (data URI, base64).

    Args:
        name: of the image.
        folder: what a path is relative to.

    Raises:
        RowError: there is nothing to read.
    """
    text = name.strip(BLANKS)
    if is_url(text):
        # What is behind a URL is fetched by a worker, so equal URLs are equal content.
        return Content("image", text, _digest(b"name", _utf8(text)))
    try:
        file = read_string(name, folder)
    except ImageError as error:
        raise RowError(f"{describe(name)}: {error}") from error
    return bytes_content(file)


def picture_content(picture: Image.Image, note: str | None = None) -> Content:
    """Give a picture as content."""
    size = f"{picture.mode} {picture.width} {picture.height}".encode()
    return Content("image", picture, _digest(size, picture.tobytes()), note)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"a lone surrogate, {text[error.start]!a}, at character {error.start + 1}: half of a character, "
            "which UTF-8 does not have"
        ) from error


def _no_content(message: str) -> Content:
    raise RowError(message)


def _digest(kind: bytes, content: bytes) -> bytes:
    return hashlib.sha256(kind + b"\0" + content).digest()[:DIGEST_BYTES]
