"""Sends a request to its server: which headers pass, how the body is sent, and the errors for a lost server."""

import contextlib
from collections.abc import AsyncIterator, Mapping

import aiohttp
from multidict import CIMultiDict, CIMultiDictProxy

from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.api.record import current
from jina_v4_serve.gateway.servers import Servers, may_answer

RETRY_AFTER_S = 5
# Headers for one connection only, which a proxy must not forward: RFC 9110, 7.6.1, and those of HTTP libraries.
_HOP_BY_HOP = (
    "Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "Proxy-Connection", "TE", "Trailer",
    "Transfer-Encoding", "Upgrade",
)  # fmt: skip
_HANDLED = ("Host", "Expect", "Content-Length", "Origin")  # headers of a request that the gateway itself handles
_PIECE_BYTES = 2**18  # of a body; aiohttp or asyncio would copy a larger piece


def end_to_end(headers: CIMultiDictProxy[str] | CIMultiDict[str], *dropped: str) -> CIMultiDict[str]:
    """Copy headers, without those for one connection only and without `dropped`."""
    kept = CIMultiDict(headers)
    by_connection = (name.strip() for line in headers.getall("Connection", ()) for name in line.split(","))
    for name in (*_HOP_BY_HOP, *by_connection, *dropped):
        kept.popall(name, None)
    return kept


def for_server(headers: CIMultiDictProxy[str] | CIMultiDict[str]) -> CIMultiDict[str]:
    """Return the headers of the current request to send to its server."""
    kept = end_to_end(headers, *_HANDLED)
    kept["X-Request-ID"] = current().request_id
    return kept


@contextlib.asynccontextmanager
async def forward(
    servers: Servers, task: str, path: str, headers: Mapping[str, str], body: bytes
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Send a request to the server of a task, and yield its reply.

    Raises:
        ApiError: 503 if the server cannot be reached, disconnects or is the wrong one, 504 if it does not answer.
    """
    url = servers.urls[task]
    is_large = len(body) > _PIECE_BYTES
    sized = CIMultiDict(headers)
    sized["Content-Length"] = str(len(body))  # else the body would have chunked encoding
    try:
        async with servers.session.post(
            url.joinpath(path.lstrip("/")),
            data=_pieces(body) if is_large else body,
            headers=sized,
            allow_redirects=False,
        ) as answer:
            # Since the last probe, another program may have started at this address.
            if not may_answer(task, answer.status, answer.headers):
                servers.note(task, url, "not ready")
                raise unavailable(task)
            yield answer
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
        servers.note(task, url, "down")
        raise unavailable(task) from None
    except TimeoutError:
        raise ApiError(504, f"the {task} server did not answer in time", code="SERVER_TIMEOUT") from None
    except aiohttp.ClientError:
        raise unavailable(task) from None


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    for begin in range(0, len(body), _PIECE_BYTES):
        yield body[begin : begin + _PIECE_BYTES]


def unavailable(*tasks: str) -> ApiError:
    """Make the error for tasks whose servers are not ready."""
    names = " and ".join(tasks)
    message = f"the {names} server is not ready" if len(tasks) == 1 else f"no server is ready ({names})"
    return ApiError(503, message, code="SERVER_NOT_READY", retry_after_s=RETRY_AFTER_S)
