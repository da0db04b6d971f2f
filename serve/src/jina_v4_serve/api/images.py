"""Images from requests: fetched, checked and decoded, the way the published code sees them.

That way is `PIL.Image.open(x).convert("RGB")`: no turning by EXIF, no pasting of transparent pictures on white.

A URL may only lead to public addresses: each name is resolved here, every address is checked, and the connection is
made to the checked address; each redirect goes through the same. Names on the allow-list may be private.
"""

import asyncio
import base64
import binascii
import io
import ipaddress
import socket
import warnings
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from PIL import Image, UnidentifiedImageError

from jina_v4_serve.api.errors import ApiError, invalid, shorten
from jina_v4_serve.api.metrics import IMAGE_FETCH_BYTES, IMAGE_FETCHES
from jina_v4_serve.api.record import current

# Still images that Pillow decodes by itself; EPS, for one, would start another program on a stranger's file.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP")
MAX_ASPECT_RATIO = 200
MAX_REDIRECTS = 5
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True)
class ImageLimits:
    """What an image may cost.

    Attributes:
        max_bytes: of the file.
        max_pixels: of the decoded picture, before it is scaled down.
        fetch_timeout_s: for all of a URL, redirects included.
        hosts: names and addresses that URLs may lead to though they are not public.
    """

    max_bytes: int = 20 * 2**20
    max_pixels: int = 64_000_000
    fetch_timeout_s: float = 10.0
    hosts: frozenset[str] = frozenset()


def is_public(address: str) -> bool:
    """Tell whether an IP address belongs to the public internet, also when it is wrapped into an IPv6 one."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip.sixtofour is not None or ip.teredo is not None or ip in _NAT64:
            return False
    return ip.is_global and not ip.is_multicast


class _PublicResolver(AbstractResolver):
    """Resolves names to public addresses only, but for those on the allow-list."""

    def __init__(self, hosts: frozenset[str]) -> None:
        self._hosts = hosts
        self._resolver = ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Resolve a name; a name with any address that is not public has none."""
        found = await self._resolver.resolve(host, port, family)
        if host.lower() not in self._hosts and not all(is_public(entry["host"]) for entry in found):
            raise PrivateAddressError(host)
        return found

    async def close(self) -> None:
        """Nothing is held."""


class PrivateAddressError(OSError):
    """A name that leads to an address that is not public."""


class ImageLoader:
    """Turns the `image` of an item into an RGB picture."""

    def __init__(self, limits: ImageLimits) -> None:
        self.limits = limits

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
        if source[:8].lower().startswith(("http://", "https://")):
            with current().stage("fetch"):
                content = await self._fetch(source, where)
        else:
            content = await asyncio.to_thread(self._decode_base64, source, where)
        return await asyncio.to_thread(decode, content, where, self.limits)

    def _decode_base64(self, source: str, where: str) -> bytes:
        if source[:5].lower() == "data:":
            head, comma, source = source.partition(",")
            if not comma or not head.lower().endswith(";base64"):
                raise invalid(where, f"{where}: a data URI must be base64: data:image/png;base64,...")
        elif "://" in source[:16]:
            raise invalid(where, f"{where}: only http and https URLs are fetched", source)
        source = source.replace("\n", "").replace("\r", "")  # as MIME and many encoders write it
        if len(source) > self.limits.max_bytes * 4 // 3 + 4:
            raise self._too_large(where)
        try:
            return base64.b64decode(source, validate=True)
        except (binascii.Error, ValueError) as error:
            raise invalid(where, f"{where} is neither an http(s) URL nor base64 of an image file", source) from error

    async def _fetch(self, url: str, where: str) -> bytes:
        try:
            async with (
                aiohttp.ClientSession(
                    connector=aiohttp.TCPConnector(resolver=_PublicResolver(self.limits.hosts), use_dns_cache=False),
                    timeout=aiohttp.ClientTimeout(total=None),
                    cookie_jar=aiohttp.DummyCookieJar(),
                    auto_decompress=False,
                    headers={"Accept": "image/*", "Accept-Encoding": "identity"},
                ) as session,
                asyncio.timeout(self.limits.fetch_timeout_s),
            ):
                for _ in range(MAX_REDIRECTS + 1):
                    self._check_address(url)
                    async with session.get(url, allow_redirects=False) as response:
                        if response.status in (301, 302, 303, 307, 308) and "location" in response.headers:
                            url = urljoin(url, response.headers["location"])
                            continue
                        if response.status != 200:
                            message = f"{where}: the URL answered with status {response.status}"
                            raise _not_fetched("status", where, message, url)
                        content = bytearray()
                        async for chunk in response.content.iter_any():
                            content += chunk
                            if len(content) > self.limits.max_bytes:
                                IMAGE_FETCHES.labels("too_large").inc()
                                raise self._too_large(where)
                        IMAGE_FETCHES.labels("ok").inc()
                        IMAGE_FETCH_BYTES.inc(len(content))
                        return bytes(content)
        except PrivateAddressError as error:
            message = f"{where}: the URL leads to an address that is not public; those are fetched only if allowed"
            raise _not_fetched("private", where, message, url) from error
        except TimeoutError as error:
            message = f"{where}: the URL was not fetched within {self.limits.fetch_timeout_s:g} s"
            raise _not_fetched("timeout", where, message, url) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if isinstance(error.__cause__, PrivateAddressError) or isinstance(error.__context__, PrivateAddressError):
                message = f"{where}: the URL leads to an address that is not public; those are fetched only if allowed"
                raise _not_fetched("private", where, message, url) from error
            raise _not_fetched("unreachable", where, f"{where}: the URL cannot be fetched", url) from error
        raise _not_fetched("redirects", where, f"{where}: more than {MAX_REDIRECTS} redirects", url)

    def _check_address(self, url: str) -> None:
        """Check what aiohttp would not ask the resolver about: other schemes and bare addresses."""
        parts = urlsplit(url)
        host = (parts.hostname or "").lower()
        if parts.scheme not in ("http", "https") or not host:
            raise ValueError("not an http(s) URL")
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return
        if host not in self.limits.hosts and not is_public(host):
            raise PrivateAddressError(host)

    def _too_large(self, where: str) -> ApiError:
        return invalid(where, f"{where}: the file is over the limit of {self.limits.max_bytes} bytes")


def _not_fetched(why: str, where: str, message: str, url: str) -> ApiError:
    IMAGE_FETCHES.labels(why).inc()
    return invalid(where, message, url)


def decode(content: bytes, where: str, limits: ImageLimits) -> Image.Image:
    """Decode an image file as the published code does.

    Raises:
        ApiError: 422 for what is no image, broken, of another kind, or too large to decode.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked below
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        width, height = image.size
        if width * height > limits.max_pixels:
            raise invalid(where, f"{where}: {width} x {height} pixels are over the limit of {limits.max_pixels} in all")
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise invalid(
                where, f"{where}: {width} x {height} pixels; the model takes aspect ratios up to {MAX_ASPECT_RATIO}"
            )
        return image.convert("RGB")
    except ApiError:
        raise
    except UnidentifiedImageError as error:
        raise invalid(where, f"{where} is no image of a known kind ({', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise invalid(where, f"{where}: the picture is over the limit of {limits.max_pixels} pixels") from error
    except Exception as error:  # Pillow's readers raise whatever a broken file makes them stumble over
        raise invalid(where, f"{where} is a broken image: {shorten(str(error))}") from error
