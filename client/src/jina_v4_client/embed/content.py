"""Rows and their content: what is sent to be embedded, and a digest that is equal for equal content.

The content of a row is read late: a resumed run skips the rows that are done without opening an image or a page.
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
_DIGEST_BYTES = 16  # of sha256; the chance that any two of 10 million contents share one is 1e-25


@dataclass(frozen=True)
class Content:
    """One thing to embed.

    Attributes:
        value: a text; or an image as the bytes of a file, a URL, a data URI or a PIL image.
        note: how the model sees this in an unexpected way, for the end of the run; None if it does not.
    """

    kind: Kind
    value: str | bytes | Image.Image
    digest: bytes
    note: str | None = None


@dataclass(frozen=True)
class Row:
    """A row of the corpus.

    Attributes:
        read: returns the content; raises RowError if there is none. Call it before the next row is taken from the
            source. For a row of a table it can be pickled: with `--ray`, another process calls it.
    """

    id: str
    read: Callable[[], Content]


def escaped(text: str) -> str:
    """Escape what is not UTF-8: names of files can hold it, and so can messages with such names."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def make_row(row_id: str, read: Callable[[], Content]) -> Row:
    """Make a row; its id is escaped."""
    return Row(escaped(row_id), read)


def broken_row(row_id: str, message: str) -> Row:
    """Make a row that has no content."""
    return make_row(row_id, partial(_no_content, message))


def text_content(text: str) -> Content:
    """Make content of a text.

    Raises:
        RowError: it holds half of a surrogate pair, which cannot be sent.
    """
    return Content("text", text, _digest(b"text", _utf8(text)))


def bytes_content(file: bytes) -> Content:
    """Make content of the bytes of an image file; the client finds out later whether they are one."""
    digest, note = _digest(b"file", file), None
    try:
        with open_image(io.BytesIO(file)) as image:
            if image.mode in CLIPPED_MODES:
                return Content("image", image.convert("RGB"), digest, CLIPPED)
            # The second picture in a phone's JPEG (MPO) is no page of its own.
            if image.format != "MPO" and getattr(image, "is_animated", False):
                note = FIRST_FRAME
    except Exception:  # Pillow's readers raise whatever a broken file makes them stumble over
        note = None
    return Content("image", file, digest, note)


def file_content(path: Path) -> Content:
    """Make content of an image file.

    Raises:
        RowError: it cannot be read.
    """
    try:
        return bytes_content(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RowError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def named_image_content(name: str, folder: Path) -> Content:
    """Make content of an image that a string refers to (path, URL) or holds (data URI, base64).

    Args:
        name: the string.
        folder: what a path is relative to.

    Raises:
        RowError: it is none of these, or cannot be read.
    """
    text = name.strip(BLANKS)
    if is_url(text):
        # The client fetches it when it is sent, so the digest is that of the URL.
        return Content("image", text, _digest(b"name", _utf8(text)))
    try:
        file = read_string(name, folder)
    except ImageError as error:
        raise RowError(f"{describe(name)}: {error}") from error
    return bytes_content(file)


def picture_content(picture: Image.Image, note: str | None = None) -> Content:
    """Make content of a picture."""
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
    return hashlib.sha256(kind + b"\0" + content).digest()[:_DIGEST_BYTES]
