"""TCP and TLS for httpx2's connections, straight on asyncio.

By default httpx2 reaches the network through anyio, which takes a fifth of the CPU of a small request.
"""

import asyncio
import functools
import ipaddress
import select
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpcore2  # what httpx2 is built on; it pins its version
import httpx2

_LIMITS = httpx2.Limits(max_connections=None, keepalive_expiry=5.0)  # through proxies, as directly
_MAX_UNREAD_BYTES = 2**20  # of a reply; then the server has to wait


def is_address(host: str) -> bool:
    """Tell whether this is the number of a host and not its name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


_parsed = functools.lru_cache(maxsize=64)(httpx2.URL)


class Http(httpx2.AsyncClient):
    """An HTTP client of requests that bring all their headers with them."""

    def __init__(self, verify: ssl.SSLContext, *, trust_env: bool) -> None:
        super().__init__(verify=verify, trust_env=trust_env, limits=_LIMITS)
        # httpx2 has no argument for it that leaves the environment's proxies in use, which keep their own transports.
        # Were these two called otherwise, all would work as well, through anyio.
        direct: Any = getattr(self, "_transport", None)
        if direct is not None:
            direct._pool = httpcore2.AsyncConnectionPool(
                verify, max_connections=None, keepalive_expiry=5.0, network_backend=_Network()
            )

    def build_request(self, method: str, url: Any, *, headers: Any = None, content: Any = None, **rest: Any) -> Any:
        """Build a request; merging it with the settings of the client takes a tenth of the CPU of a small one."""
        options: dict[str, Any] = {"cookies": self.cookies, "extensions": {"timeout": rest["timeout"].as_dict()}}
        return httpx2.Request(method, _parsed(url), headers=headers, content=content, **options)


@asynccontextmanager
async def _connecting(timeout: float | None) -> AsyncIterator[None]:
    """Raise httpcore2's errors where a connection cannot be made in time, or at all."""
    try:
        async with asyncio.timeout(timeout):
            yield
    except TimeoutError as error:
        raise httpcore2.ConnectTimeout from error
    except (OSError, UnicodeError) as error:  # also ssl.SSLError, and a name that cannot be looked up
        raise httpcore2.ConnectError(str(error)) from error


class _Network(httpcore2.AsyncNetworkBackend):
    async def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, *_: Any, **__: Any
    ) -> httpcore2.AsyncNetworkStream:
        loop = asyncio.get_running_loop()
        # The addresses of a name race, except in other loops than asyncio's, which have no races. A lone address must
        # not: asyncio loses the socket of a race that is cancelled as it ends.
        races = isinstance(loop, asyncio.BaseEventLoop) and not is_address(host)
        options: dict[str, Any] = {"happy_eyeballs_delay": 0.25} if races else {}
        async with _connecting(timeout):
            connected: tuple[Any, _Stream] = await loop.create_connection(_Stream, host, port, **options)
        return connected[1]


class _Stream(asyncio.Protocol, httpcore2.AsyncNetworkStream):
    """One connection. What is written is sent when a reply is waited for: headers and body with one system call."""

    _transport: asyncio.Transport

    def __init__(self) -> None:
        self._unsent: list[bytes] = []
        self._unread = bytearray()
        self._changed = asyncio.Event()  # something to read, or the end
        self._lost = False
        self._error: Exception | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._unread += data
        if len(self._unread) > _MAX_UNREAD_BYTES:
            self._transport.pause_reading()
        self._changed.set()

    def connection_lost(self, error: Exception | None) -> None:
        self._lost, self._error = True, error
        self._changed.set()

    async def write(self, buffer: bytes, *_: Any, **__: Any) -> None:
        self._unsent.append(buffer)

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._unsent and not self._lost and not self._transport.is_closing():
            self._transport.write(b"".join(self._unsent))
        self._unsent.clear()
        if not self._unread and not self._lost:
            self._changed.clear()
            try:
                async with asyncio.timeout(timeout):
                    await self._changed.wait()
            except TimeoutError as error:
                raise httpcore2.ReadTimeout from error
        if not self._unread and self._error is not None:
            raise httpcore2.ReadError(str(self._error)) from self._error
        data = bytes(self._unread[:max_bytes])
        del self._unread[:max_bytes]
        self._transport.resume_reading()
        return data  # none at the end of the connection

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.AsyncNetworkStream:
        loop = asyncio.get_running_loop()
        async with _connecting(timeout):
            tls = await loop.start_tls(self._transport, self, ssl_context, server_hostname=server_hostname)
        if tls is None:
            raise httpcore2.ConnectError("the connection was lost")
        self._transport = tls
        return self

    async def aclose(self) -> None:
        self._transport.abort()
        await asyncio.sleep(0)  # the loop closes the socket

    def get_extra_info(self, info: str) -> Any:
        if info != "is_readable":
            return self._transport.get_extra_info(info)
        # A server that answered early, and did not read the request to its end, must not get another one behind it.
        if self._unread or self._transport.is_closing() or self._transport.get_write_buffer_size():
            return True
        poll = select.poll()  # an idle connection that the server closed, and the loop has not seen it yet
        poll.register(self._transport.get_extra_info("socket"), select.POLLIN)
        return bool(poll.poll(0))
