"""Checks and decodes the images of requests, exactly as the published code does.

That is `PIL.Image.open(x).convert("RGB")`: EXIF does not rotate the picture, and transparent pixels are not made white.
vLLM gets pixels without metadata, in which it would look for an orientation and for an id in its cache.
"""

import asyncio
import io
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from PIL import Image, UnidentifiedImageError

from jina_v4_serve.api.errors import ApiError, invalid, shorten
from jina_v4_serve.api.record import current
from jina_v4_serve.api.sources import IMAGE, SourceReader
from jina_v4_serve.settings import Settings

# Still images that Pillow decodes by itself; EPS, for one, would start another program on a stranger's file.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP")
# Modes with more than 8 bits per pixel. convert("RGB") cuts values off at 255: 16-bit grey becomes white.
CLIPPED_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
MAX_ASPECT_RATIO = 200
DECODED_IMAGES = 8  # of all requests; vLLM prepares one after the other


class ImageLoader:
    """Loads the `image` of an item as an RGB picture."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._sources = SourceReader(settings)
        self._decoded = asyncio.Semaphore(DECODED_IMAGES)

    @asynccontextmanager
    async def opened(self, source: str, where: str) -> AsyncIterator[Image.Image]:
        """Fetch, check and decode one image. Few are decoded at a time, as one may have 256 MB; others wait.

        Args:
            source: URL, data URI or base64.
            where: the field, for messages: `input[2].image`.

        Yields:
            An RGB picture.

        Raises:
            ApiError: 422 if the image cannot be read or is over a limit.
        """
        content = await self._sources.read(source, where, IMAGE, self.settings.max_image_bytes)
        async with self._decoded:
            yield await asyncio.to_thread(decode, content, where, self.settings)


def decode(content: bytes, where: str, settings: Settings) -> Image.Image:
    """Decode an image file as the published code does; record a picture whose values are cut off.

    Returns:
        An RGB picture without the metadata of the file.

    Raises:
        ApiError: 422 if the file is not an image, broken, of another format, or too large.
    """
    largest = settings.max_image_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            # Pillow refuses more than twice this, also in a PNG file within an ICO file that names a smaller size.
            Image.MAX_IMAGE_PIXELS = largest // 2
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        converted = image.convert("RGB")
        width, height = converted.size
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise invalid(
                where, f"{where}: {width} x {height} pixels; the model takes aspect ratios up to {MAX_ASPECT_RATIO}"
            )
        if image.mode in CLIPPED_MODES:
            current().clipped.append(where)
        converted.info = {}  # the only metadata that convert() keeps
        return converted
    except ApiError:
        raise
    except UnidentifiedImageError as error:
        hint = '; send a PDF file as {"pdf": ...}' if b"%PDF-" in content[:1024] else ""
        raise invalid(where, f"{where} is not an image of a known format{hint} ({', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise invalid(where, f"{where}: the picture is over the limit of {largest} pixels") from error
    except Exception as error:  # Pillow's readers raise all kinds of errors for broken files
        raise invalid(where, f"{where} is a broken image: {shorten(str(error))}") from error
