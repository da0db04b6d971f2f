"""The images of a call that are URLs: fetched here, and checked, before the first item is sent."""

import asyncio
import functools
import ssl
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, TypeVar

import httpx2  # the HTTP library that openai 3 is built on and depends on

from jina_v4_client._calls import Call
from jina_v4_client._images import prepare
from jina_v4_client._loop import in_thread
from jina_v4_client.errors import ArgumentError, ImageError, JinaV4Error

Client = TypeVar("Client", bound=httpx2.AsyncClient)

MAX_FETCHED_BYTES = 64 * 2**20
USER_AGENT = f"jina-v4-client/{version('jina-v4-client')}"
_FETCH_TIMEOUT_S = 60.0
# What is on this machine is reached without the environment's proxies.
_DIRECT = dict.fromkeys(("all://localhost", "all://127.0.0.1", "all://[::1]"))
_HEADERS = {"User-Agent": USER_AGENT, "Accept": "image/*", "Accept-Encoding": "identity"}


async def fetch_images(
    call: Call, urls: Sequence[int], max_concurrency: int, deadline: float
) -> dict[int, JinaV4Error]:
    """Fetch and check the images of a call that are URLs, by their places; return errors by place.

    At most `max_concurrency` files are fetched or wait for their check at a time. Without skip, nothing is begun after
    a failure. Images before it are finished, because the error to report is that of the first.
    """
    errors: dict[int, JinaV4Error] = {}
    at_once = asyncio.Semaphore(max_concurrency)

    async def fetch(place: int, http: httpx2.AsyncClient) -> None:
        async with at_once:
            if errors and not call.skip:
                return
            try:
                content = await fetch_image(http, call.items[place], deadline - asyncio.get_running_loop().time())
                call.items[place] = await in_thread(prepare, content)
            except ImageError as error:
                errors[place] = call.locate(place, error)

    options: dict[str, Any] = {"headers": _HEADERS, "follow_redirects": True, "timeout": None, "mounts": _DIRECT}
    async with open_http(httpx2.AsyncClient, **options) as http:
        tasks = {place: asyncio.create_task(fetch(place, http)) for place in urls}
        try:
            for place, task in tasks.items():
                await asyncio.wait([task])  # and not the task itself, which would be cancelled before the others
                task.result()
                if place in errors and not call.skip:
                    break
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
    return errors


async def fetch_image(http: httpx2.AsyncClient, url: str, time_left_s: float) -> bytes:
    """Fetch the file behind a URL, following redirects, in this process as the published model does.

    Neither the server's key nor the caller's http_client goes along: the URL belongs to somebody else.
    """
    timeout_s = min(_FETCH_TIMEOUT_S, time_left_s)
    late = f"not fetched within {timeout_s:.3g} s"
    if time_left_s < _FETCH_TIMEOUT_S:
        late = "not fetched, because the time limit of the call was reached"
    content = bytearray()
    try:
        async with asyncio.timeout(timeout_s), http.stream("GET", url) as response:
            if response.status_code != httpx2.codes.OK:
                raise ImageError(f"the URL answered with status {response.status_code}")
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > MAX_FETCHED_BYTES:
                    raise ImageError(f"more than {MAX_FETCHED_BYTES} bytes; fetch it yourself and give its path")
    except TimeoutError as error:
        raise ImageError(late) from error
    except (httpx2.HTTPError, httpx2.InvalidURL, UnicodeError, ExceptionGroup) as error:
        reason = error.exceptions[0] if isinstance(error, ExceptionGroup) else error  # such as of a port over 65535
        raise ImageError(f"cannot be fetched ({type(reason).__name__}: {reason})".replace(": )", ")")) from error
    return bytes(content)


def open_http(kind: type[Client], **options: Any) -> Client:
    """Make an HTTP client, which reads the proxies of the environment.

    Raises:
        ArgumentError: one of them is no address, has an unknown scheme, or is SOCKS, for which a package is missing.
    """
    try:
        return kind(verify=trusted(), **options)
    except (ImportError, ValueError, httpx2.InvalidURL) as error:
        raise ArgumentError(f"a proxy in HTTP_PROXY, HTTPS_PROXY or ALL_PROXY cannot be used: {error}") from error


@functools.cache
def trusted() -> ssl.SSLContext:
    """Return the certificates that are trusted, read once: that takes 30 ms of CPU, also for plain http."""
    return httpx2.create_ssl_context()
