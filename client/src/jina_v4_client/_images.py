"""Images of every kind, read and checked, as the bytes that are sent.

What is sent must be seen by the server as the published model sees it: ``PIL.Image.open(x).convert("RGB")``, which
ignores transparency and EXIF orientation. vLLM opens images its own way (``vllm/multimodal/media/image.py``): it turns
them upright by EXIF or XMP, and pastes transparent ones on white. So a file that both ways read alike is sent byte for
byte, and every other one is decoded here, the published way, and sent as RGB PNG: lossless, no alpha, no metadata.
"""

import base64
import binascii
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from PIL import ExifTags, Image, UnidentifiedImageError

from jina_v4_client._model import MAX_ASPECT_RATIO
from jina_v4_client.errors import ImageError

ImageSource = str | os.PathLike[str] | bytes | bytearray | Image.Image
SINGLE_IMAGE: tuple[type, ...] = (str, os.PathLike, bytes, bytearray, Image.Image)

# Still images that Pillow decodes by itself: EPS, for one, would start Ghostscript on a file from anywhere.
_READABLE = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP")
# MPO is a JPEG with more pictures behind the first, as many phones write it.
_SENT_AS_THEY_ARE = {"PNG": "image/png", "JPEG": "image/jpeg", "MPO": "image/jpeg", "WEBP": "image/webp"}
# How 16 bits or CMYK become RGB is a matter of taste, so it is left to this process and its Pillow, as published.
_SAFE_MODES = ("1", "L", "P", "RGB")

_DATA_URI = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)


@dataclass(frozen=True)
class PreparedImage:
    """An image file that the server reads as the published model would, and its size in pixels."""

    content: bytes
    media_type: str
    width: int
    height: int

    def data_uri(self) -> str:
        """Give the file as a data URI."""
        return f"data:{self.media_type};base64,{base64.b64encode(self.content).decode('ascii')}"


def is_url(source: object) -> TypeGuard[str]:
    """Tell whether this is the URL of an image that must be fetched."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def is_image_file(text: str) -> bool:
    """Tell whether this names a file that begins like an image; most texts do not even name a file."""
    try:
        if not Path(text).is_file():
            return False
        with Image.open(text, formats=_READABLE):
            return True
    except (OSError, ValueError):  # also UnidentifiedImageError, and names too long for a file
        return False
    except Image.DecompressionBombError:
        return True  # and says so when it is read


def describe(source: object) -> str:
    """Name a source in a message, shortly."""
    if isinstance(source, Image.Image):
        return f"PIL image, {source.mode}, {source.width} x {source.height}"
    if isinstance(source, bytes | bytearray):
        return f"{len(source)} bytes"
    if isinstance(source, str | os.PathLike):
        text = repr(os.fspath(source))
        return text if len(text) <= 120 else f"{text[:100]}...{text[-1]}"
    return type(source).__name__


def read_source(source: object) -> bytes | Image.Image:
    """Give the bytes of a path, a data URI or bytes; a PIL image is given as it is.

    Raises:
        ImageError: there is nothing to read, or not at this address.
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, bytes | bytearray):
        return bytes(source)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _decode_data_uri(source)
    if isinstance(source, str | os.PathLike):
        return _read_file(source)
    raise ImageError(f"an image is a path, a URL, a data URI, bytes or a PIL image, not {type(source).__name__}")


def prepare(source: bytes | Image.Image) -> PreparedImage:
    """Check an image and choose what is sent for it.

    Raises:
        ImageError: no image, a broken one, or one that the model refuses.
    """
    if isinstance(source, Image.Image):
        _check_shape(source)
        return _as_png(source)
    try:
        with Image.open(io.BytesIO(source), formats=_READABLE) as image:
            _check_shape(image)
            image.load()
            media_type = _SENT_AS_THEY_ARE.get(image.format or "")
            if media_type is not None and _reads_alike(image):
                return PreparedImage(source, media_type, image.width, image.height)
            return _as_png(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("not an image, or in a format that is not read here") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"more pixels than Pillow allows, see PIL.Image.MAX_IMAGE_PIXELS ({error})") from error
    except Exception as error:  # Pillow's readers raise whatever a broken file makes them stumble over
        raise ImageError(f"a broken image ({type(error).__name__}: {error})") from error


def _decode_data_uri(uri: str) -> bytes:
    head = _DATA_URI.match(uri)
    if head is None:
        raise ImageError("a data URI must be base64: data:image/png;base64,...")
    try:
        return base64.b64decode(uri[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"a data URI with broken base64 ({error})") from error


def _read_file(path: str | os.PathLike[str]) -> bytes:
    try:
        file = Path(path)
        if file.is_file():
            return file.read_bytes()
        exists = file.exists()
    except OSError as error:
        raise ImageError(f"cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ImageError(f"cannot be read ({error})") from error
    raise ImageError("not a regular file" if exists else "no such file (and no http, https or data URL)")


def _check_shape(image: Image.Image) -> None:
    short, long = sorted(image.size)
    if short < 1:
        raise ImageError(f"no pixels ({image.width} x {image.height})")
    if long / short > MAX_ASPECT_RATIO:
        raise ImageError(
            f"{image.width} x {image.height} pixels: the model refuses aspect ratios above {MAX_ASPECT_RATIO}"
        )


def _reads_alike(image: Image.Image) -> bool:
    """Tell whether vLLM sees the same RGB pixels in this file as ``convert("RGB")`` gives."""
    if image.mode not in _SAFE_MODES or "transparency" in image.info:
        return False
    try:
        return bool(image.getexif().get(ExifTags.Base.Orientation, 1) == 1)
    except Exception:  # metadata too broken to tell
        return False


def _as_png(image: Image.Image) -> PreparedImage:
    try:
        bare = image.copy()
        bare.info = {}  # else a colour profile or transparency would be written too
        rgb = bare.convert("RGB")
        file = io.BytesIO()
        rgb.save(file, "PNG", compress_level=1)
    except Exception as error:  # a PIL image is read no sooner than here, so it may turn out broken or closed
        raise ImageError(f"cannot be read as RGB ({type(error).__name__}: {error})") from error
    return PreparedImage(file.getvalue(), "image/png", rgb.width, rgb.height)
