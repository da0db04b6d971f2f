"""The files of a request, images and PDF: from a URL, a data URI or base64 to bytes.

A URL may only lead to public addresses: each name is resolved here, every address is checked, and the connection goes
to the checked address. Redirects are checked in the same way. Names on the allow-list may be private.
"""

import asyncio
import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

from jina_v4_serve.api.encoded import read_base64
from jina_v4_serve.api.errors import ApiError, invalid
from jina_v4_serve.api.metrics import IMAGE_FETCH_BYTES, IMAGE_FETCHES
from jina_v4_serve.api.record import current
from jina_v4_serve.settings import Settings

MAX_REDIRECTS = 5
BLANKS = " \t\r\n\f\v\ufeff"  # around a source
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


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


@dataclass(frozen=True)
class FileKind:
    """A kind of file, as messages and requests name it."""

    name: str
    media_type: str
    accept: str


IMAGE = FileKind("an image file", "image/png", "image/*")
PDF = FileKind("a PDF file", "application/pdf", "application/pdf")


class SourceReader:
    """Reads the files that requests hold or lead to."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    async def read(self, source: str, where: str, kind: FileKind, max_bytes: int) -> bytes:
        """Fetch or decode one file.

        Args:
            source: URL, data URI or base64.
            where: the field, for messages: `input[2].image`.
            kind: what the file should be; it is not checked here.
            max_bytes: the largest file.

        Raises:
            ApiError: 422 for what cannot be read or is over the limit.
        """
        source = source.strip(BLANKS)
        if source[:8].lower().startswith(("http://", "https://")):
            with current().stage("fetch"):
                return await self._fetch(source, where, kind, max_bytes)
        return await asyncio.to_thread(_decode_base64, source, where, kind, max_bytes)

    async def _fetch(self, url: str, where: str, kind: FileKind, max_bytes: int) -> bytes:
        resolver = _PublicResolver(self.settings.image_hosts)
        try:
            async with (
                aiohttp.ClientSession(
                    connector=aiohttp.TCPConnector(resolver=resolver, use_dns_cache=False),
                    timeout=aiohttp.ClientTimeout(total=None),
                    cookie_jar=aiohttp.DummyCookieJar(),
                    auto_decompress=False,
                    headers={"Accept": kind.accept, "Accept-Encoding": "identity"},
                ) as session,
                asyncio.timeout(self.settings.fetch_timeout_s),
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
                            if len(content) > max_bytes:
                                IMAGE_FETCHES.labels("too_large").inc()
                                raise _too_large(where, max_bytes)
                        IMAGE_FETCHES.labels("ok").inc()
                        IMAGE_FETCH_BYTES.inc(len(content))
                        return bytes(content)
        except TimeoutError as error:
            message = f"{where}: the URL was not fetched within {self.settings.fetch_timeout_s:g} s"
            raise _not_fetched("timeout", where, message, url) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if any(isinstance(cause, PrivateAddressError) for cause in (error, error.__cause__, error.__context__)):
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
        if host not in self.settings.image_hosts and not is_public(host):
            raise PrivateAddressError(host)


def _decode_base64(source: str, where: str, kind: FileKind, max_bytes: int) -> bytes:
    if source[:5].lower() == "data:":
        head, comma, source = source.partition(",")
        if not comma or "base64" not in [word.strip().lower() for word in head.split(";")[1:]]:
            message = f"{where}: a data URI must be base64: data:{kind.media_type};base64,..."
            raise invalid(where, f'{message} A text that begins with data: is sent as {{"text": ...}}', head)
    elif "://" in source[:16]:
        raise invalid(where, f"{where}: only http and https URLs are fetched", source)
    try:
        content = read_base64(source)
    except ValueError as error:
        message = f"{where} is neither an http(s) URL nor base64 of {kind.name}: {error}"
        raise invalid(where, message, source) from error
    if len(content) > max_bytes:
        raise _too_large(where, max_bytes)
    return content


def _too_large(where: str, max_bytes: int) -> ApiError:
    return invalid(where, f"{where}: the file is over the limit of {max_bytes} bytes")


def _not_fetched(why: str, where: str, message: str, url: str) -> ApiError:
    IMAGE_FETCHES.labels(why).inc()
    return invalid(where, message, url)
