"""Reads the images and PDF files of a request from a URL, a data URI or base64.

A URL may only lead to public addresses: names are resolved here, every address is checked, and the connection goes to
the checked address. Redirects are checked in the same way. Hosts on the allow-list may be private. A URL is parsed only
once, by yarl like in aiohttp, as another parser could read another host in it.
"""

import asyncio
import ipaddress
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from jina_v4_serve.api.encoded import read_base64
from jina_v4_serve.api.errors import ApiError, invalid
from jina_v4_serve.api.metrics import IMAGE_FETCH_BYTES, IMAGE_FETCHES
from jina_v4_serve.api.record import current
from jina_v4_serve.settings import Settings

MAX_REDIRECTS = 5
BLANKS = " \t\r\n\f\v\ufeff"  # around a source
MAX_URL_CHARACTERS = 16_384
# A host has up to 253 characters, and a user name may precede it. yarl takes 14 s for a host of a million.
_SHORT_HOST = re.compile(r"https?://[^/?#]{0,512}(?:[/?#]|\Z)", re.IGNORECASE)
LOOK_UPS = 16  # names at a time; a name server that does not answer takes 10 s or more
_IPV6_INTERNET = ipaddress.ip_network("2000::/3")  # outside are NAT64, site-local and wrapped addresses
# Python counts parts of these as global: protocol assignments, which clouds use internally; relays of 6to4; the service
# that each machine of Azure reaches.
_IPV4_RESERVED = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32")))


def is_public(address: str) -> bool:
    """Tell whether an IP address belongs to the public internet, also if it is wrapped in an IPv6 address."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip.sixtofour is not None or ip.teredo is not None or ip not in _IPV6_INTERNET:
            return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _IPV4_RESERVED)


class _PublicResolver(AbstractResolver):
    """Resolves names to public addresses only, except for names on the allow-list.

    It has its own threads, as a name server that does not answer must not block the threads of other requests.
    """

    def __init__(self, hosts: frozenset[str], threads: ThreadPoolExecutor) -> None:
        self._hosts = hosts
        self._threads = threads

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Resolve a name; refuse a name with any address that is not public."""
        loop = asyncio.get_running_loop()
        results = await loop.run_in_executor(self._threads, _look_up, host, port, family)
        if host not in self._hosts and not all(is_public(result["host"]) for result in results):
            raise PrivateAddressError(host)
        return results

    async def close(self) -> None:
        """Do nothing: the threads are shared."""


def _look_up(host: str, port: int, family: socket.AddressFamily) -> list[ResolveResult]:
    results: list[ResolveResult] = []
    for kind, _, protocol, _, address in socket.getaddrinfo(
        host, port, family, socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
    ):
        zone = f"%{address[3]}" if len(address) == 4 and address[3] else ""  # of a link-local IPv6 address
        results.append(
            ResolveResult(
                hostname=host,
                host=f"{address[0]}{zone}",
                port=port,
                family=kind,
                proto=protocol,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
        )
    return results


class PrivateAddressError(OSError):
    """A name has an address that is not public."""


@dataclass(frozen=True)
class FileKind:
    """A kind of file: its name in messages, and its media types."""

    name: str
    media_type: str
    accept: str


IMAGE = FileKind("an image file", "image/png", "image/*")
PDF = FileKind("a PDF file", "application/pdf", "application/pdf")


class SourceReader:
    """Reads the files of requests."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._look_ups = ThreadPoolExecutor(LOOK_UPS, "look-up")

    async def read(self, source: str, where: str, kind: FileKind, max_bytes: int) -> bytes:
        """Fetch or decode one file.

        Args:
            source: URL, data URI or base64.
            where: the field, for messages: `input[2].image`.
            kind: the expected kind of file, which is not checked here.
            max_bytes: the largest file.

        Raises:
            ApiError: 422 if the file cannot be read or is over the limit.
        """
        source = source.strip(BLANKS)
        if source[:8].lower().startswith(("http://", "https://")):
            with current().stage("fetch"):
                return await self._fetch(source, where, kind, max_bytes)
        return await asyncio.to_thread(_decode_base64, source, where, kind, max_bytes)

    async def _fetch(self, source: str, where: str, kind: FileKind, max_bytes: int) -> bytes:
        def failure(why: str, message: str) -> ApiError:
            IMAGE_FETCHES.labels(why).inc()
            return invalid(where, f"{where}: {message}", source)

        if len(source) > MAX_URL_CHARACTERS:
            message = f"{where}: the URL has {len(source)} characters; at most {MAX_URL_CHARACTERS} are fetched"
            raise invalid(where, message, source)
        resolver = _PublicResolver(self.settings.image_hosts, self._look_ups)
        try:
            if not _SHORT_HOST.match(source):
                raise ValueError("not the name of a host")
            url = self._checked(URL(source))
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
                    async with session.get(url, allow_redirects=False) as response:
                        if response.status in (301, 302, 303, 307, 308) and "location" in response.headers:
                            url = self._checked(url.join(URL(response.headers["location"])))
                            continue
                        if response.status != 200:
                            raise failure("status", f"the URL answered with status {response.status}")
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
            message = f"the URL was not fetched within {self.settings.fetch_timeout_s:g} s"
            raise failure("timeout", message) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if any(isinstance(cause, PrivateAddressError) for cause in (error, error.__cause__, error.__context__)):
                message = "the URL leads to an address that is not public; those are fetched only if allowed"
                raise failure("private", message) from error
            raise failure("unreachable", "the URL cannot be fetched") from error
        raise failure("redirects", f"more than {MAX_REDIRECTS} redirects")

    def _checked(self, url: URL) -> URL:
        """Check what aiohttp does not pass to the resolver: the scheme, and hosts that are addresses."""
        host = url.raw_host
        if url.scheme not in ("http", "https") or not host:
            raise ValueError("not an http(s) URL")
        is_address = ":" in host or host.replace(".", "").isdigit()  # aiohttp's own rule
        if is_address and host not in self.settings.image_hosts and not is_public(host):
            raise PrivateAddressError(host)
        return url


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
