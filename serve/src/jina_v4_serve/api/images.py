"""Images from requests: checked and decoded, the way the published code sees them.

That way is `PIL.Image.open(x).convert("RGB")`: EXIF does not turn the picture, transparent pixels are not set on white.
vLLM gets bare pixels: in a picture's metadata it would look for an orientation, and for an id in its cache.
"""

import asyncio
import io
import warnings

from PIL import Image, UnidentifiedImageError

from jina_v4_serve.api.errors import ApiError, invalid, shorten
from jina_v4_serve.api.record import current
from jina_v4_serve.api.sources import IMAGE, SourceReader
from jina_v4_serve.settings import Settings

# Still images that Pillow decodes by itself; EPS, for one, would start another program on a stranger's file.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP")
# More than 8 bits a pixel, which convert("RGB") cuts off at 255: 16-bit grey becomes white.
CLIPPED_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
MAX_ASPECT_RATIO = 200


class ImageLoader:
    """Turns the `image` of an item into an RGB picture."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._sources = SourceReader(settings)

    async def load(self, source: str, where: str) -> Image.Image:
        """Fetch, check and decode one image.

        Args:
            source: URL, data URI or base64.
            where: the field, for messages: `input[2].image`.

        Returns:
            An RGB picture.

        Raises:
            ApiError: 422 for what cannot be read or is over a limit.
        """
        content = await self._sources.read(source, where, IMAGE, self.settings.max_image_bytes)
        return await asyncio.to_thread(decode, content, where, self.settings)


def decode(content: bytes, where: str, settings: Settings) -> Image.Image:
    """Decode an image file as the published code does; record a picture that loses values.

    Returns:
        An RGB picture that holds pixels and nothing else of the file.

    Raises:
        ApiError: 422 for what is no image, broken, of another kind, or too large to decode.
    """
    largest = settings.max_image_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked below
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        width, height = image.size
        if width * height > largest:
            raise invalid(where, f"{where}: {width} x {height} pixels are over the limit of {largest} in all")
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise invalid(
                where, f"{where}: {width} x {height} pixels; the model takes aspect ratios up to {MAX_ASPECT_RATIO}"
            )
        converted = image.convert("RGB")
        if image.mode in CLIPPED_MODES:
            current().clipped.append(where)
        converted.info = {}  # the metadata of the file, of which convert() keeps nothing else
        return converted
    except ApiError:
        raise
    except UnidentifiedImageError as error:
        hint = '; a PDF file goes into {"pdf": ...}' if b"%PDF-" in content[:1024] else ""
        raise invalid(where, f"{where} is no image of a known kind{hint} ({', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise invalid(where, f"{where}: the picture is over the limit of {largest} pixels") from error
    except Exception as error:  # Pillow's readers raise whatever a broken file makes them stumble over
        raise invalid(where, f"{where} is a broken image: {shorten(str(error))}") from error
