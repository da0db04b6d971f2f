"""Carries requests to a server: the openai package sends them, each once.

Imported when a client is made, because openai alone takes about a second of CPU.
"""

import asyncio
import ipaddress
import weakref
from collections.abc import AsyncGenerator
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import httpx2  # the HTTP library that openai 3 is built on and depends on
import openai

from jina_v4_client import _forks as forks
from jina_v4_client._calls import check_base_url, choose_api_key
from jina_v4_client._fetch import USER_AGENT, trusted
from jina_v4_client._network import Http, is_address
from jina_v4_client._server import TASK_HEADER
from jina_v4_client._wire import Reply, Request, refusal
from jina_v4_client.errors import (
    ArgumentError,
    BadReplyError,
    ServerConnectionError,
    ServerError,
    ServerTimeoutError,
)

REQUEST_ID_HEADER = "X-Request-ID"
_CONNECT_TIMEOUT_S = 5.0
_TIMEOUT = openai.Timeout(None, connect=_CONNECT_TIMEOUT_S)  # the whole of a request is limited where it is sent
_HEADERS: dict[str, str | openai.Omit] = {
    "Accept": "application/json",
    "Accept-Encoding": "gzip, deflate",
    "Content-Type": "application/json",
    "User-Agent": USER_AGENT,
}


class _Api(openai.AsyncOpenAI):
    """openai's client, with headers that owe nothing to the OPENAI_* variables of the environment.

    They hold an organisation, a project and, in OPENAI_CUSTOM_HEADERS, perhaps a key; all are for OpenAI and for nobody
    else. The description of this machine, which openai adds as well, concerns nobody either.
    """

    @property
    def default_headers(self) -> dict[str, str | openai.Omit]:
        """What every request carries beside its key."""
        return _HEADERS


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
        self._closed = False
        self._by_loop: dict[asyncio.AbstractEventLoop, tuple[openai.AsyncOpenAI, AsyncGenerator[None]]] = {}
        self._callers: openai.AsyncOpenAI | None = None
        self._given: object = http_client
        self._is_parents = False
        if openai_client is not None:
            if (base_url, api_key, http_client) != (None, None, None):
                raise ArgumentError("openai_client brings its own address, key and HTTP client: give it alone")
            if not isinstance(openai_client, openai.AsyncOpenAI):
                raise ArgumentError(f"openai_client must be an openai.AsyncOpenAI, not {type(openai_client).__name__}")
            self.url = check_base_url(str(openai_client.base_url))
            self._callers, self._given = openai_client.with_options(max_retries=0), openai_client
            forks.watch(self)
            return
        self.url, self._key = check_base_url(base_url), choose_api_key(api_key)
        if http_client is not None and not isinstance(http_client, httpx2.AsyncClient):
            raise ArgumentError(
                f"http_client is not allowed: both clients take an httpx2.AsyncClient, not {type(http_client).__name__}"
            )
        try:
            httpx2.URL(self.url)
            if http_client is not None:
                self._callers = self._api(http_client)
        except httpx2.InvalidURL as error:
            raise ArgumentError(f"base_url={base_url!r} is no address of a server: {error}") from error
        trusted()  # read here, because it would hold up a running loop
        forks.watch(self)

    @property
    def closed(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._closed or (self._callers is not None and self._callers.is_closed())

    def take_callers(self) -> None:
        """Have the caller's connections used in one event loop only."""
        if self._given is not None and self._given in _TAKEN:
            name = type(self._given).__name__
            raise ArgumentError(f"this {name} is used by another EmbeddingsClient: its connections belong to one loop")
        if self._given is not None:
            _TAKEN.add(self._given)

    async def send(self, request: Request, timeout_s: float) -> Reply:
        """Send one request and return its reply; refuse another status than 2xx, and a reply to another request."""
        self._check_open()
        if self._is_parents:
            raise ArgumentError("the connections that were passed to this client are the parent's; make a new client")
        api = self._callers or await self._connected()
        path, request_id = request.path, uuid4().hex
        options: openai.RequestOptions = {
            # A redirected POST would come back as a GET, or hand texts and key to a server that nobody chose.
            "follow_redirects": False,
            "headers": {"Accept": request.accept, REQUEST_ID_HEADER: request_id},
            "timeout": _TIMEOUT,
        }
        url = f"{self.url}{path}"
        try:
            async with asyncio.timeout(timeout_s) as limit:
                if request.body is None:
                    response = await api.get(url, cast_to=httpx2.Response, options=options)
                else:
                    response = await api.post(url, cast_to=httpx2.Response, body=request.body, options=options)
        except openai.APIStatusError as error:
            answer = error.response
            await self._check_id(answer, request_id, path)
            raise refusal(self.url, path, answer.status_code, answer.headers, answer.content) from error
        except openai.OpenAIError as error:
            raise _translate(error, self.url, path) from error
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
            # By another call, whose reply was not its own; of this request nothing was sent.
            raise ServerConnectionError(f"the connections to {self.url} were closed; repeat the call") from error
        await self._check_id(response, request_id, path)
        return Reply(response.headers, response.content)

    def _check_open(self) -> None:
        if self.closed:
            raise ArgumentError("this client was closed in the middle of the call")

    async def close(self, *, callers: bool = False) -> None:
        """Close the connections of this loop; those that a caller brought only with `callers`."""
        self._closed = True
        await self._disconnect()
        if callers and self._callers is not None:
            _TAKEN.discard(self._given)
            await self._callers.close()

    def leave_to_parent(self) -> object:
        """Start anew in a forked child."""
        left, self._by_loop = self._by_loop, {}
        self._is_parents = self._callers is not None
        return left, self._callers

    async def _connected(self) -> openai.AsyncOpenAI:
        """Return openai's client for this loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._by_loop:
            for ended in [other for other in list(self._by_loop) if other.is_closed()]:
                self._by_loop.pop(ended, None)
            http_client = Http(trusted(), trust_env=not _is_on_this_machine(self.url))
            # A loop closes its generators when it ends, and those that nobody holds any more: so the connections too.
            guard = _closing(http_client)
            self._by_loop[loop] = self._api(http_client), guard
            await anext(guard)
        return self._by_loop[loop][0]

    async def _disconnect(self) -> None:
        """Close the connections of this loop; the next request makes new ones."""
        _, guard = self._by_loop.pop(asyncio.get_running_loop(), (None, None))
        if guard is not None:
            await guard.aclose()

    def _api(self, http_client: httpx2.AsyncClient) -> openai.AsyncOpenAI:
        return _Api(base_url=self.url, api_key=self._key, timeout=_TIMEOUT, max_retries=0, http_client=http_client)

    async def _check_id(self, response: httpx2.Response, request_id: str, path: str) -> None:
        """Refuse a reply to another request: nothing but its id shows that two replies changed places."""
        found = response.headers.get(REQUEST_ID_HEADER)
        if found == request_id or (found is None and not (response.is_success and TASK_HEADER in response.headers)):
            return  # a stock vLLM, or a proxy that failed, need not repeat it
        await self._disconnect()  # whatever else comes over these connections is not to be trusted either
        raise BadReplyError(
            f"{self.url}{path} answered with {REQUEST_ID_HEADER}: {found}, and {request_id} was sent: this is the "
            "reply to another request; nothing is returned. A proxy in between must pass this header on unchanged"
        )


async def _closing(http_client: httpx2.AsyncClient) -> AsyncGenerator[None]:
    try:
        yield
    finally:
        await http_client.aclose()


def _is_on_this_machine(url: str) -> bool:
    """Tell whether a server is reached without leaving this machine: the environment's proxies are not for it."""
    host = urlsplit(url).hostname or ""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def _translate(error: openai.OpenAIError, url: str, path: str) -> ServerError:
    cause: Any = error.__cause__
    name = f"{type(cause).__name__}: {cause}".rstrip(": ")
    if isinstance(error, openai.APITimeoutError):
        return ServerTimeoutError(f"no connection to {url} within {_CONNECT_TIMEOUT_S:g} s ({name})")
    if isinstance(error, openai.APIConnectionError):
        return ServerConnectionError(
            f"no server answers at {url} ({name}); start one, for example with "
            "`make serve-retrieval`, or give the address of yours as base_url"
        )
    return ServerError(f"{url}{path}: {error}")
