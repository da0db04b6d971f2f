"""Carries requests to a server: the openai package sends them, each once, over connections straight on asyncio.

By default openai's HTTP library, httpx2, reaches the network through anyio, which takes a fifth of the CPU of a small
request. Imported when a client is made, because openai alone takes about a second of CPU.
"""

import asyncio
import functools
import ipaddress
import select
import ssl
import weakref
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import httpcore2  # what httpx2 is built on; it pins its version
import httpx2  # the HTTP library that openai 3 is built on and depends on
import openai

from jina_v4_client._calls import choose_api_key
from jina_v4_client._fetch import USER_AGENT, open_http, trusted
from jina_v4_client._loop import watch_forks
from jina_v4_client._server import TASK_HEADER, Reply, Request, refusal
from jina_v4_client.errors import (
    ArgumentError,
    BadReplyError,
    ServerConnectionError,
    ServerError,
    ServerTimeoutError,
)

REQUEST_ID_HEADER = "X-Request-ID"
_CONNECT_TIMEOUT_S = 5.0
_MAX_UNREAD = 2**20  # bytes that no reply waits for; beyond them the connection is not read
_TIMEOUT = openai.Timeout(None, connect=_CONNECT_TIMEOUT_S)  # the whole of a request is limited where it is sent
_HEADERS: dict[str, str | openai.Omit] = {
    "Accept": "application/json",
    "Accept-Encoding": "gzip, deflate",
    "Content-Type": "application/json",
    "User-Agent": USER_AGENT,
}
_parsed = functools.lru_cache(maxsize=64)(httpx2.URL)
_TAKEN: weakref.WeakSet[object] = weakref.WeakSet()


class Transport:
    """Sends requests to one server.

    The connections belong to a process and an event loop. In another loop, and in a forked child, new ones are made:
    two processes on one connection would read each other's replies.
    """

    def __init__(
        self,
        base_url: object,
        api_key: str | None,
        http_client: httpx2.AsyncClient | None,
        openai_client: openai.AsyncOpenAI | None,
    ) -> None:
        self._closed = self._is_parents = False
        self._by_loop: dict[asyncio.AbstractEventLoop, tuple[openai.AsyncOpenAI, AsyncGenerator[Any]]] = {}
        self._callers: openai.AsyncOpenAI | None = None
        self._given: object = http_client if openai_client is None else openai_client
        if http_client is not None and not isinstance(http_client, httpx2.AsyncClient):
            raise ArgumentError(
                f"http_client is not allowed: both clients take an httpx2.AsyncClient, not {type(http_client).__name__}"
            )
        if openai_client is None:
            self.url, self._key = check_base_url(base_url), choose_api_key(api_key)
            self._callers = None if http_client is None else _api(self.url, self._key, http_client)
        elif (base_url, api_key, http_client) != (None, None, None):
            raise ArgumentError("openai_client brings its own address, key and HTTP client: pass it alone")
        elif not isinstance(openai_client, openai.AsyncOpenAI):
            raise ArgumentError(f"openai_client must be an openai.AsyncOpenAI, not {type(openai_client).__name__}")
        else:
            self.url = check_base_url(str(openai_client.base_url))
            self._callers = openai_client.with_options(max_retries=0)
        trusted()  # read here, because it would hold up a running loop
        watch_forks(self)

    @property
    def closed(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._closed or (self._callers is not None and self._callers.is_closed())

    def take_callers(self) -> None:
        """Reserve the caller's connections for one event loop."""
        if self._given is None:
            return
        if self._given in _TAKEN:
            name = type(self._given).__name__
            raise ArgumentError(f"this {name} is used by another EmbeddingsClient: its connections belong to one loop")
        _TAKEN.add(self._given)

    async def send(self, request: Request, timeout_s: float) -> Reply:
        """Send one request and return its reply; refuse another status than 2xx, and a reply to another request."""
        self._check_open()
        if self._is_parents:
            raise ArgumentError("the connections that were passed to this client are the parent's; make a new client")
        api = self._callers or await self._connected()
        request_id, url = uuid4().hex, f"{self.url}{request.path}"
        options: openai.RequestOptions = {
            # A redirected POST would become a GET, or send texts and key to a server that nobody chose.
            "follow_redirects": False,
            "headers": {"Accept": request.accept, REQUEST_ID_HEADER: request_id},
            "timeout": _TIMEOUT,
        }
        try:
            async with asyncio.timeout(timeout_s) as limit:
                if request.body is None:
                    response = await api.get(url, cast_to=httpx2.Response, options=options)
                else:
                    response = await api.post(url, cast_to=httpx2.Response, body=request.body, options=options)
        except openai.APIStatusError as error:
            answer = error.response
            await self._check_id(answer, request_id, url)
            raise refusal(self.url, request.path, answer.status_code, answer.headers, answer.content) from error
        except openai.OpenAIError as error:
            raise self._translate(error, url) from error
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise ServerTimeoutError(f"{url} did not answer within timeout_s={timeout_s:g}") from error
        except RuntimeError as error:
            self._check_open()
            if self._callers is not None:
                message = f"the HTTP client that was passed cannot be used ({error}): it is closed, or of another loop"
                raise ArgumentError(message) from error
            if not api.is_closed():
                raise
            # Another call closed them, after a reply to another request; nothing of this request was sent.
            raise ServerConnectionError(f"the connections to {self.url} were closed; repeat the call") from error
        await self._check_id(response, request_id, url)
        return Reply(response.headers, response.content)

    async def close(self, *, callers: bool = False) -> None:
        """Close the connections of this loop, and with `callers` those that the caller passed."""
        self._closed = True
        await self._disconnect()
        if callers and self._callers is not None:
            _TAKEN.discard(self._given)
            await self._callers.close()

    def leave_to_parent(self) -> object:
        """Reset in a forked child."""
        left, self._by_loop = self._by_loop, {}
        self._is_parents = self._callers is not None
        return left, self._callers

    def _check_open(self) -> None:
        if self.closed:
            raise ArgumentError("this client was closed in the middle of the call")

    async def _connected(self) -> openai.AsyncOpenAI:
        """Return openai's client for this loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._by_loop:
            for ended in [other for other in list(self._by_loop) if other.is_closed()]:
                self._by_loop.pop(ended, None)
            guard = _connections(self.url, self._key)
            self._by_loop[loop] = await anext(guard), guard
        return self._by_loop[loop][0]

    async def _disconnect(self) -> None:
        """Close the connections of this loop; the next request makes new ones."""
        _, guard = self._by_loop.pop(asyncio.get_running_loop(), (None, None))
        if guard is not None:
            await guard.aclose()

    async def _check_id(self, response: httpx2.Response, request_id: str, url: str) -> None:
        """Refuse a reply to another request: only its id shows that two replies were swapped."""
        found = response.headers.get(REQUEST_ID_HEADER)
        if found == request_id or (found is None and not (response.is_success and TASK_HEADER in response.headers)):
            return  # a stock vLLM, or the error page of a proxy, does not repeat it
        await self._disconnect()  # other replies on these connections may be swapped too
        raise BadReplyError(
            f"{url} answered with {REQUEST_ID_HEADER}: {found}, and {request_id} was sent: this is the reply to "
            "another request; nothing is returned. A proxy in between must pass this header on unchanged"
        )

    def _translate(self, error: openai.OpenAIError, url: str) -> ServerError:
        name = f"{type(error.__cause__).__name__}: {error.__cause__}".rstrip(": ")
        if isinstance(error, openai.APITimeoutError):
            return ServerTimeoutError(f"no connection to {self.url} within {_CONNECT_TIMEOUT_S:g} s ({name})")
        if isinstance(error, openai.APIConnectionError):
            return ServerConnectionError(
                f"no server answers at {self.url} ({name}); start one, for example with "
                "`make serve-retrieval`, or pass the address of yours as base_url"
            )
        return ServerError(f"{url}: {error}")


async def _connections(url: str, key: str) -> AsyncGenerator[openai.AsyncOpenAI]:
    """Yield openai's client. A loop closes its generators when it ends, and so these connections."""
    # A server on this machine is reached without the environment's proxies.
    async with open_http(Http, trust_env=not _is_on_this_machine(httpx2.URL(url).host)) as http_client:
        yield _api(url, key, http_client)


def _api(url: str, key: str, http_client: httpx2.AsyncClient) -> openai.AsyncOpenAI:
    return _Api(base_url=url, api_key=key, timeout=_TIMEOUT, max_retries=0, http_client=http_client)


class _Api(openai.AsyncOpenAI):
    """openai's client, without the headers that it makes of the OPENAI_* variables of the environment.

    These hold an organisation, a project and, in OPENAI_CUSTOM_HEADERS, perhaps a key, which are for OpenAI only. Its
    description of this machine is left out as well.
    """

    @property
    def default_headers(self) -> dict[str, str | openai.Omit]:
        """What every request carries beside its key."""
        return _HEADERS


class Http(httpx2.AsyncClient):
    """An HTTP client for requests that carry all their headers already."""

    def __init__(self, verify: ssl.SSLContext, *, trust_env: bool) -> None:
        super().__init__(verify=verify, trust_env=trust_env, limits=httpx2.Limits(keepalive_expiry=5.0))
        # httpx2's argument for a transport would turn off the environment's proxies. If these private names change,
        # requests go through anyio: slower, not wrong.
        pool: Any = getattr(getattr(self, "_transport", None), "_pool", None)
        if pool is not None:
            pool._network_backend = _Network()

    def build_request(self, method: str, url: Any, *, headers: Any = None, content: Any = None, **rest: Any) -> Any:
        """Build a request without merging it with the client's settings, a tenth of the CPU of a small one."""
        options: dict[str, Any] = {"cookies": self.cookies, "extensions": {"timeout": rest["timeout"].as_dict()}}
        return httpx2.Request(method, _parsed(url), headers=headers, content=content, **options)


@asynccontextmanager
async def _connecting(timeout: float | None) -> AsyncIterator[None]:
    """Raise httpcore2's errors where a connection fails or takes too long."""
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
        # With several addresses of a name, asyncio tries the next after 0.25 s (other loops cannot). Not for a single
        # address: when such a race is cancelled at its end, asyncio leaks the socket.
        is_address = ":" in host or host.replace(".", "").isdigit()
        races = isinstance(loop, asyncio.BaseEventLoop) and not is_address
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
        self._error: Exception | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._unread += data
        self._changed.set()
        if len(self._unread) > _MAX_UNREAD:
            self._transport.pause_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self._error = error
        self._changed.set()

    async def write(self, buffer: bytes, *_: Any, **__: Any) -> None:
        self._unsent.append(buffer)

    async def read(self, max_bytes: int, *_: Any, **__: Any) -> bytes:
        if not self._transport.is_closing():
            if self._unsent:
                self._transport.write(b"".join(self._unsent))
                self._unsent.clear()
            if not self._unread:
                self._changed.clear()
                await self._changed.wait()
        if self._error is not None and not self._unread:
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
        # A server that answered before it read the whole request must not get another one on this connection.
        if self._unread or self._transport.is_closing() or self._transport.get_write_buffer_size():
            return True
        poll = select.poll()  # the server may have closed an idle connection, and the loop has not noticed yet
        poll.register(self._transport.get_extra_info("socket"), select.POLLIN)
        return bool(poll.poll(0))


def _is_on_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_base_url(base_url: object) -> str:
    """Return the address of the server without its ``/v1``."""
    if not isinstance(base_url, str):
        raise ArgumentError(f"base_url must be a str, not {type(base_url).__name__}")
    message = f"base_url={base_url!r} is no address of a server; give one like http://127.0.0.1:8000"
    try:
        url = httpx2.URL(base_url)
    except httpx2.InvalidURL as error:
        raise ArgumentError(message) from error
    labels = url.host.removesuffix(".").split(".")
    port = 80 if url.port is None else url.port
    if url.scheme not in ("http", "https") or not 0 < port < 2**16 or not all(0 < len(label) < 64 for label in labels):
        raise ArgumentError(message)
    if url.userinfo or url.query or url.fragment:
        raise ArgumentError("base_url must not hold a user name, a query or a fragment; a key is given as api_key=")
    return base_url.rstrip("/").removesuffix("/v1").rstrip("/")
