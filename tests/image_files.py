"""Pictures as the content of files."""

import io
from typing import Any

from PIL import Image


def written(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def plain(size: tuple[int, int], colour: Any = 0, kind: str = "PNG", mode: str = "RGB") -> bytes:
    """A picture of one colour."""
    return written(Image.new(mode, size, colour), kind)
