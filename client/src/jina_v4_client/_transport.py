"""The only module with sockets: the openai package carries requests, retries and timeouts.

Imported when a client is made, because openai alone takes about a second of CPU.
"""

import time
from importlib.metadata import version

import httpx2  # the HTTP library that openai 3 is built on and depends on
import openai

from jina_v4_client._wire import Reply, Request, refusal
from jina_v4_client.errors import ArgumentError, ImageError, ServerConnectionError, ServerError, ServerTimeoutError

MAX_FETCHED_BYTES = 64 * 2**20
_CONNECT_TIMEOUT_S = 5.0
_FETCH_TIMEOUT_S = 60.0
_USER_AGENT = f"jina-v4-client/{version('jina-v4-client')}"


class _Api(openai.OpenAI):
    """openai's client, with headers that owe nothing to the OPENAI_* variables of the environment.

    They name an organisation, a project and, in OPENAI_CUSTOM_HEADERS, perhaps a key; all are for OpenAI and for nobody
    else. The description of this machine, which openai adds as well, concerns nobody either.
    """

    @property
    def default_headers(self) -> dict[str, str | openai.Omit]:
        """What every request carries beside its key."""
        return {"Accept": "application/json", "Content-Type": "application/json", "User-Agent": _USER_AGENT}


class Transport:
    """Sends requests to one server."""

    def __init__(
        self, url: str, *, api_key: str, timeout_s: float, max_retries: int, http_client: httpx2.Client | None
    ) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._owns_http_client = http_client is None
        try:
            self._api = _Api(
                base_url=url,
                api_key=api_key,
                timeout=openai.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S)),
                max_retries=max_retries,
                http_client=http_client,
            )
        except TypeError as error:
            raise ArgumentError(f"http_client is not allowed: {error}") from error
        except httpx2.InvalidURL as error:
            raise ArgumentError(f"base_url={url!r} is no address of a server: {error}") from error

    def send(self, request: Request) -> Reply:
        """Send one request and give its reply.

        Raises:
            ServerError: no reply, or one with another status than 2xx.
        """
        if self._api.is_closed():
            raise ArgumentError("this client is closed; make a new one")
        # A redirected POST would come back as a GET, or hand texts and key to a server that nobody named.
        options: openai.RequestOptions = {"follow_redirects": False, "headers": {"Accept": request.accept}}
        try:
            if request.body is None:
                response = self._api.get(request.path, cast_to=httpx2.Response, options=options)
            else:
                response = self._api.post(request.path, cast_to=httpx2.Response, body=request.body, options=options)
        except openai.OpenAIError as error:
            raise _translate(error, self._url, request.path, self._timeout_s) from error
        return Reply({name.lower(): value for name, value in response.headers.items()}, response.content)

    def close(self) -> None:
        """Close the connections, unless they belong to an http_client of the caller's."""
        if self._owns_http_client:
            self._api.close()


def fetch_image(url: str) -> bytes:
    """Fetch the file behind a URL, following redirects, in this process as the published model does.

    Neither the server's key nor the caller's http_client goes along: the URL belongs to somebody else.

    Raises:
        ImageError: no such file, too large, or too slow.
    """
    deadline = time.monotonic() + _FETCH_TIMEOUT_S
    content = bytearray()
    try:
        with httpx2.stream(
            "GET",
            url,
            follow_redirects=True,
            timeout=_FETCH_TIMEOUT_S,
            headers={"User-Agent": _USER_AGENT, "Accept": "image/*", "Accept-Encoding": "identity"},
        ) as response:
            if response.status_code != httpx2.codes.OK:
                raise ImageError(f"the URL answered with status {response.status_code}")
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > MAX_FETCHED_BYTES:
                    raise ImageError(f"more than {MAX_FETCHED_BYTES} bytes; fetch it yourself and give its path")
                if time.monotonic() > deadline:
                    raise ImageError(f"not fetched within {_FETCH_TIMEOUT_S:.0f} s")
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise ImageError(f"cannot be fetched ({_name(error)})") from error
    return bytes(content)


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
