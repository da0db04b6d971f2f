"""Images of every kind, read and checked, as the bytes that are sent.

What is sent must be seen by the server as the published model sees it: ``PIL.Image.open(x).convert("RGB")``, which
ignores transparency and EXIF orientation. vLLM opens images its own way (``vllm/multimodal/media/image.py``): it turns
them upright by EXIF or XMP, and pastes transparent ones on white. So a file that both ways read alike is sent byte for
byte, and every other one is decoded here, the published way, and sent as RGB PNG: lossless, no alpha, no metadata.
"""

import base64
import errno
import functools
import io
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeGuard
from urllib.parse import unquote

from PIL import ExifTags, Image, UnidentifiedImageError

from jina_v4_client._model import MAX_ASPECT_RATIO
from jina_v4_client.errors import ImageError

ImageSource = str | os.PathLike[str] | bytes | bytearray | Image.Image
SINGLE_IMAGE: tuple[type, ...] = (str, os.PathLike, bytes, bytearray, Image.Image)

# Still images that Pillow decodes by itself: EPS, for one, would start Ghostscript on a file from anywhere.
_READABLE = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP")
# TGA files do not begin with a mark of their own, so what is not known to be an image is not tried as one.
_READABLE_WITHOUT_MARK = ("TGA",)
# MPO is a JPEG with more pictures behind the first, as many phones write it.
_SENT_AS_THEY_ARE = {"PNG": "image/png", "JPEG": "image/jpeg", "MPO": "image/jpeg", "WEBP": "image/webp"}
# How 16 bits or CMYK become RGB is a matter of taste, so it is left to this process and its Pillow, as published.
_SAFE_MODES = ("1", "L", "P", "RGB")

# More than 8 bits a pixel, of which convert("RGB") cuts off what is above 255.
CLIPPED_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
CLIPPED = "more than 8 bits a pixel; values above 255 become white, as in the published code: scale to 8 bits first"

BLANKS = " \t\r\n\f\v\ufeff"  # around a string that says where an image is
_DATA_URI = re.compile(r"[\s\ufeff]*data:(?:\S|[^,]{0,200}(?:image/|base64))", re.IGNORECASE)
_URL_SAFE = str.maketrans("-_", "+/")
_NOT_BASE64 = re.compile(r"[^A-Za-z0-9+/_-]")
# *+ never goes back into what it has matched: with * alone, fifty comments before another word would take for ever.
_SVG = re.compile(
    rb"\xef?\xbb?\xbf?(?:\s|<\?xml.*?\?>|<!--.*?-->|<!doctype\s+svg.*?>)*+<svg\b", re.DOTALL | re.IGNORECASE
)
HEAD_BYTES = 1024
IMAGE_ENDINGS = frozenset(
    [
        *(".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".hif", ".ico", ".icb", ".j2c", ".j2k", ".jfif"),
        *(".jif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
        *(".qoi", ".tga", ".tif", ".tiff", ".vda", ".vst", ".webp"),
    ]
)
PDF_ENDING = ".pdf"
TIFF_MARKS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# How files begin that are images even if Pillow cannot open them: PNG, JPEG, GIF, TIFF, JPEG XL, Photoshop, EPS.
_MARKS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", *TIFF_MARKS, b"\0\0\0\x0cJXL ", b"\xff\x0a", b"8BPS", b"%!PS")
NOT_READ = "not an image, or in a format that is not read here"
_NO_FILE = "no such file, and neither an http(s) URL, a data URI nor the base64 of an image file"
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"}


class ImageWarning(UserWarning):
    """The model sees less of an image than its file holds."""


@dataclass(frozen=True)
class PreparedImage:
    """An image file that the server reads as the published model would, and its size in pixels."""

    content: bytes
    media_type: str
    width: int
    height: int

    def data_uri(self) -> str:
        """Return the file as a data URI."""
        return f"data:{self.media_type};base64,{base64.b64encode(self.content).decode('ascii')}"


def is_url(source: object) -> TypeGuard[str]:
    """Tell whether this is the URL of an image that must be fetched."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def is_data_uri(text: str) -> bool:
    """Tell whether a string is a data URI, by the same rule as our server: "Data: 12 March" is a text."""
    return _DATA_URI.match(text) is not None


def is_image_file(text: str) -> bool:
    """Tell whether this names a file that is meant as an image or a PDF file; most texts do not even name a file.

    By its name or by how it begins, also if it is broken: the path of an image must never be embedded as a text.
    """
    path = Path(text)
    named = path.suffix.lower() in (*IMAGE_ENDINGS, PDF_ENDING)
    try:
        is_there = path.is_file()
    except OSError as error:  # such as a name too long for a file
        return named and error.errno == errno.EACCES
    if named or not is_there:
        return is_there
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return True
    return head.startswith(_MARKS) or why_not_read(head) != NOT_READ or opens_as_image(path)


def opens_as_image(path: Path) -> bool:
    """Tell whether a file begins like an image that is read here."""
    try:
        with Image.open(path, formats=_formats()):
            return True
    except (OSError, ValueError):  # also UnidentifiedImageError
        return False
    except Image.DecompressionBombError:
        return True  # and says so when it is read


def open_image(file: BinaryIO) -> Image.Image:
    """Open an image of a format that is read here; its pixels are not read yet. Pillow's errors come as they are."""
    return Image.open(file, formats=(*_formats(), *_READABLE_WITHOUT_MARK))


def why_not_read(head: bytes) -> str:
    """Say why a file that begins like this is not read; head has up to HEAD_BYTES."""
    if head.lstrip().startswith(b"%PDF-"):
        return "a PDF file; encode_pdf embeds its pages"
    if _is_heic(head) and "HEIF" not in _formats():
        return "HEIC, which needs the package pillow-heif; install it with: pip install 'jina-v4-client[heif]'"
    if _SVG.match(head):
        return "SVG, a drawing without pixels; convert it to PNG"
    return NOT_READ


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
    """Return the bytes of a path, a data URI, base64 or bytes; a PIL image is returned as it is."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, bytes | bytearray):
        return bytes(source)
    if isinstance(source, str):
        return read_string(source, Path())
    if isinstance(source, os.PathLike):
        return _read_file(source, Path())
    raise ImageError(f"an image is a path, a URL, a data URI, bytes or a PIL image, not {type(source).__name__}")


def read_string(text: str, folder: Path) -> bytes:
    """Return the bytes of an image from a data URI, base64 or a path relative to a folder."""
    stripped = text.strip(BLANKS)
    return _decode_data_uri(stripped) if stripped[:5].lower() == "data:" else _read_file(text, folder)


def read_base64(text: str) -> bytes:
    """Decode base64; white space, %-escapes, either alphabet and missing padding are accepted, as by our server."""
    digits = "".join(unquote(text).split()).rstrip("=")
    wrong = _NOT_BASE64.search(digits)
    if wrong is not None:
        raise ValueError(f"character {wrong.start() + 1} (white space not counted) is {wrong[0]!a}")
    if len(digits) % 4 == 1:
        raise ValueError(f"its end is missing: {len(digits)} characters without padding are never whole bytes")
    return base64.b64decode(digits.translate(_URL_SAFE) + "=" * (-len(digits) % 4))


def prepare(source: bytes | Image.Image) -> PreparedImage:
    """Check an image and choose what is sent for it; warn of pixels of more than 8 bits."""
    if isinstance(source, Image.Image):
        _check(source)
        return _as_png(source)
    try:
        with open_image(io.BytesIO(source)) as image:
            image.load()
            _check(image)
            media_type = _SENT_AS_THEY_ARE.get(image.format or "")
            if media_type is not None and _reads_alike(image):
                return PreparedImage(source, media_type, image.width, image.height)
            return _as_png(image)
    except (ImageError, ImageWarning):
        raise
    except UnidentifiedImageError as error:
        raise ImageError(why_not_read(source[:HEAD_BYTES])) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"more pixels than Pillow allows, see PIL.Image.MAX_IMAGE_PIXELS ({error})") from error
    except Exception as error:  # Pillow's readers raise any error on broken files
        raise ImageError(f"a broken image ({type(error).__name__}: {error})") from error


def _is_heic(head: bytes) -> bool:
    """Tell whether a file is HEIC, by the brands that it lists."""
    end = min(int.from_bytes(head[:4]), len(head))
    return head[4:8] == b"ftyp" and any(head[i : i + 4] in _HEIC_BRANDS for i in range(8, end, 4))


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return the formats that are known by how a file begins: Pillow's, and HEIF where pillow-heif is installed."""
    try:
        import pillow_heif  # type: ignore[import-not-found, unused-ignore] # an extra of the client
    except ImportError:
        return _READABLE
    pillow_heif.register_heif_opener()
    return (*_READABLE, "HEIF")


def _decode_data_uri(uri: str) -> bytes:
    head, comma, payload = uri.partition(",")
    if not comma or "base64" not in [word.strip().lower() for word in head.split(";")[1:]]:
        raise ImageError("a data URI must be base64: data:image/png;base64,...")
    try:
        return read_base64(payload)
    except ValueError as error:
        raise ImageError(f"a data URI with broken base64: {error}") from error


def _read_file(path: str | os.PathLike[str], folder: Path) -> bytes:
    try:
        file = folder / path
        if file.is_file():
            return file.read_bytes()
        why = "not a regular file" if file.exists() else _NO_FILE
    except OSError as error:
        # Base64 is too long for the name of a file.
        why = _NO_FILE if error.errno == errno.ENAMETOOLONG else f"cannot be read ({error.strerror})"
    except ValueError as error:
        why = f"cannot be read ({error})"
    content = _image_in_base64(path) if isinstance(path, str) and why == _NO_FILE else None
    if content is None:
        raise ImageError(why)
    return content


def _image_in_base64(text: str) -> bytes | None:
    """Decode a bare base64 string; None if what it holds does not begin like an image."""
    try:
        content = read_base64(text)
        with Image.open(io.BytesIO(content), formats=_formats()):
            return content
    except UnidentifiedImageError:
        return None if why_not_read(content[:HEAD_BYTES]) == NOT_READ else content
    except ValueError:
        return None
    except Exception:  # it begins like an image, and is broken or too large: said when it is read
        return content


def _check(image: Image.Image) -> None:
    if image.mode in CLIPPED_MODES:
        warnings.warn(f"an image of mode {image.mode} has {CLIPPED}", ImageWarning, stacklevel=3)
    short, long = sorted(image.size)
    if short < 1:
        raise ImageError(f"no pixels ({image.width} x {image.height})")
    if long / short > MAX_ASPECT_RATIO:
        raise ImageError(
            f"{image.width} x {image.height} pixels: the model refuses aspect ratios above {MAX_ASPECT_RATIO}"
        )


def _reads_alike(image: Image.Image) -> bool:
    """Tell whether vLLM reads the same RGB pixels from this file as ``convert("RGB")``."""
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
