"""The only module with sockets: the openai package carries requests, retries and timeouts.

Imported when a client is made, because openai alone takes about a second of CPU.
"""

import asyncio
import contextlib
import functools
import ipaddress
import math
import ssl
import time
import weakref
from collections.abc import Iterator
from importlib.metadata import version
from urllib.parse import urlsplit

import httpx2  # the HTTP library that openai 3 is built on and depends on
import openai

from jina_v4_client._wire import Reply, Request, refusal
from jina_v4_client.errors import ArgumentError, ImageError, ServerConnectionError, ServerError, ServerTimeoutError

MAX_FETCHED_BYTES = 64 * 2**20
_CONNECT_TIMEOUT_S = 5.0
_FETCH_TIMEOUT_S = 60.0
_USER_AGENT = f"jina-v4-client/{version('jina-v4-client')}"


# Every request brings its own; given here because openai would ask an http_client for it before it knows what that is.
_TIMEOUT = openai.Timeout(600)
_HEADERS: dict[str, str | openai.Omit] = {
    "Accept": "application/json",
    "Content-Type": "application/json",
    "User-Agent": _USER_AGENT,
}

_CLOSING: set[asyncio.Task[None]] = set()  # a task that nobody holds may be collected before its end


class _Api(openai.OpenAI):
    """openai's client, with headers that owe nothing to the OPENAI_* variables of the environment.

    They name an organisation, a project and, in OPENAI_CUSTOM_HEADERS, perhaps a key; all are for OpenAI and for nobody
    else. The description of this machine, which openai adds as well, concerns nobody either.
    """

    @property
    def default_headers(self) -> dict[str, str | openai.Omit]:
        """What every request carries beside its key."""
        return _HEADERS


class _AsyncApi(openai.AsyncOpenAI):
    """The same for coroutines."""

    @property
    def default_headers(self) -> dict[str, str | openai.Omit]:
        """What every request carries beside its key."""
        return _HEADERS


class Transport:
    """Sends requests to one server, each once: the dispatcher decides whether one is repeated."""

    def __init__(self, url: str, *, api_key: str, http_client: httpx2.Client | None) -> None:
        self._url = url
        self._owns_http_client = http_client is None
        with _settings_checked(url):
            if http_client is None:
                http_client = openai.DefaultHttpxClient(trust_env=not _is_on_this_machine(url))
                weakref.finalize(self, http_client.close)
            self._api = _Api(base_url=url, api_key=api_key, timeout=_TIMEOUT, max_retries=0, http_client=http_client)

    @property
    def closed(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._api.is_closed()

    def send(self, request: Request, timeout_s: float) -> Reply:
        """Send one request and give its reply.

        Raises:
            ServerError: no reply, or one with another status than 2xx.
        """
        path, options = request.path, _options(request, timeout_s)
        try:
            if request.body is None:
                response = self._api.get(path, cast_to=httpx2.Response, options=options)
            else:
                response = self._api.post(path, cast_to=httpx2.Response, body=request.body, options=options)
        except openai.OpenAIError as error:
            raise _translate(error, self._url, path, timeout_s) from error
        return _reply(response)

    def close(self) -> None:
        """Close the connections, unless they belong to an http_client of the caller's."""
        if self._owns_http_client:
            self._api.close()


class AsyncTransport:
    """The same for coroutines."""

    def __init__(self, url: str, *, api_key: str, http_client: httpx2.AsyncClient | None) -> None:
        self._url = url
        self._owns_http_client = http_client is None
        with _settings_checked(url):
            if http_client is None:
                http_client = openai.DefaultAsyncHttpxClient(trust_env=not _is_on_this_machine(url))
                weakref.finalize(self, _close_in_loop, http_client)
            self._api = _AsyncApi(
                base_url=url, api_key=api_key, timeout=_TIMEOUT, max_retries=0, http_client=http_client
            )

    @property
    def closed(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._api.is_closed()

    async def send(self, request: Request, timeout_s: float) -> Reply:
        """Send one request and give its reply.

        Raises:
            ServerError: no reply, or one with another status than 2xx.
        """
        path, options = request.path, _options(request, timeout_s)
        try:
            if request.body is None:
                response = await self._api.get(path, cast_to=httpx2.Response, options=options)
            else:
                response = await self._api.post(path, cast_to=httpx2.Response, body=request.body, options=options)
        except openai.OpenAIError as error:
            raise _translate(error, self._url, path, timeout_s) from error
        return _reply(response)

    async def close(self) -> None:
        """Close the connections, unless they belong to an http_client of the caller's."""
        if self._owns_http_client:
            await self._api.close()


def _close_in_loop(http_client: httpx2.AsyncClient) -> None:
    """Close the connections of a client that nobody closed, if the loop that they belong to may still run."""

    async def close() -> None:
        with contextlib.suppress(Exception):  # they belonged to another loop, which has ended
            await http_client.aclose()

    with contextlib.suppress(RuntimeError):  # no loop runs
        task = asyncio.get_running_loop().create_task(close())
        _CLOSING.add(task)
        task.add_done_callback(_CLOSING.discard)


def _options(request: Request, timeout_s: float) -> openai.RequestOptions:
    # A redirected POST would come back as a GET, or hand texts and key to a server that nobody named.
    return {
        "follow_redirects": False,
        "headers": {"Accept": request.accept},
        "timeout": openai.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S)),
    }


def _reply(response: httpx2.Response) -> Reply:
    return Reply({name.lower(): value for name, value in response.headers.items()}, response.content)


def _is_on_this_machine(url: str) -> bool:
    """Tell whether a server is reached without leaving this machine: the environment's proxies are not for it."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name
        return False


@contextlib.contextmanager
def _settings_checked(url: str) -> Iterator[None]:
    try:
        yield
    except TypeError as error:
        raise ArgumentError(f"http_client is not allowed: {error}") from error
    except httpx2.InvalidURL as error:
        raise ArgumentError(f"base_url={url!r} is no address of a server: {error}") from error


def fetch_image(url: str, time_left_s: float = math.inf) -> bytes:
    """Fetch the file behind a URL, following redirects, in this process as the published model does.

    Neither the server's key nor the caller's http_client goes along: the URL belongs to somebody else.

    Args:
        url: of an image.
        time_left_s: of the call that wants it, above 0.

    Raises:
        ImageError: no such file, too large, or too slow.
    """
    timeout_s = min(_FETCH_TIMEOUT_S, time_left_s)
    deadline = time.monotonic() + timeout_s
    content = bytearray()
    try:
        with httpx2.stream(
            "GET",
            url,
            follow_redirects=True,
            timeout=timeout_s,
            verify=_trusted(),
            headers={"User-Agent": _USER_AGENT, "Accept": "image/*", "Accept-Encoding": "identity"},
        ) as response:
            if response.status_code != httpx2.codes.OK:
                raise ImageError(f"the URL answered with status {response.status_code}")
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > MAX_FETCHED_BYTES:
                    raise ImageError(f"more than {MAX_FETCHED_BYTES} bytes; fetch it yourself and give its path")
                if time.monotonic() > deadline:
                    raise ImageError(f"not fetched within {timeout_s:.3g} s")
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise ImageError(f"cannot be fetched ({_name(error)})") from error
    return bytes(content)


@functools.cache
def _trusted() -> ssl.SSLContext:
    """Give the certificates that fetches trust, read once: that takes 30 ms of CPU, also for plain http."""
    return httpx2.create_ssl_context()


def _translate(error: openai.OpenAIError, url: str, path: str, timeout_s: float) -> ServerError:
    if isinstance(error, openai.APITimeoutError):
        return ServerTimeoutError(
            f"{url}{path} did not answer within timeout_s={timeout_s:g} ({_name(error.__cause__)})"
        )
    if isinstance(error, openai.APIConnectionError):
        return ServerConnectionError(
            f"no server answers at {url} ({_name(error.__cause__)}); start one, for example with "
            "`make serve-retrieval`, or give the address of yours as base_url"
        )
    if isinstance(error, openai.APIStatusError):
        response = error.response
        return refusal(url, path, response.status_code, response.headers, response.content)
    return ServerError(f"{url}{path}: {error}")


def _name(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")
