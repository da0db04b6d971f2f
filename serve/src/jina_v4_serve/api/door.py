"""The front door of server, gateway and Ray ingress: checks keys, web pages and routes, and reads bodies.

Headers are always a mapping that ignores case.
"""

import asyncio
import io
import logging
import re
import uuid
from collections.abc import AsyncIterable, Container, Mapping

from jina_v4_serve.api.errors import ApiError, shorten
from jina_v4_serve.api.keys import Keys
from jina_v4_serve.api.record import current
from jina_v4_serve.settings import Settings, variable_of

logger = logging.getLogger(__name__)

EMBEDDINGS = "/v1/embeddings"
COHERE = "/v2/embed"
RERANK = "/v1/rerank"
COHERE_RERANK = "/v2/rerank"
SCORE = "/v1/score"
EMBEDDING_ROUTES = (EMBEDDINGS, COHERE, RERANK, COHERE_RERANK, SCORE)  # rankings embed what they score
_PAGES = ("/v1/models", "/health", "/ready", "/metrics", "/version")
_DOCS = ("/docs", "/openapi.json", "/static/swagger-ui-bundle.js", "/static/swagger-ui.css")  # the last two are vLLM's
ROUTES = {**dict.fromkeys(EMBEDDING_ROUTES, "POST"), **dict.fromkeys((*_PAGES, *_DOCS), "GET")}  # the method by path
OPEN = ("/health", "/ready")  # without a key, for the probes of orchestrators
KEEP_ALIVE_S = 75  # idle connections are closed later than those of common load balancers, which wait 60 s
MAX_HEAD_BYTES = 2**16  # of a request
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_OURS = ("task", "pooling", "revision", "prompt", "warning")
_FOR_PAGES = ", ".join(["x-request-id", *(f"x-jina-v4-{name}" for name in _OURS), "retry-after"])
_PREFLIGHT_AGE_S = 600  # a browser repeats its preflight after this time


def request_id(headers: Mapping[str, str]) -> str:
    """Return the id in a request's headers, or a new one if there is none or it is not fit for a log."""
    sent = headers.get("x-request-id", "")
    return sent if _SANE_ID.fullmatch(sent) else uuid.uuid4().hex


def revisions_in(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the tasks that the headers of a server's reply name, and their revisions, which have the same order."""
    tasks, revisions = (headers.get(f"X-Jina-V4-{name}", "").split(", ") for name in ("Task", "Revision"))
    return {task: revision for task, revision in zip(tasks, revisions, strict=False) if task}


class Door:
    """Checks every request before any other work."""

    def __init__(self, settings: Settings) -> None:
        """Read the keys.

        Raises:
            OptionError: a key is set but cannot be read or used.
        """
        self._settings = settings
        self._keys = Keys(settings)

    def cross_origin(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Return the headers that let a web page read the reply; none if its origin is not allowed."""
        origin = headers.get("origin")
        if origin is None or not {origin, "*"} & self._settings.allowed_origins:
            return {}
        return {"access-control-allow-origin": origin, "access-control-expose-headers": _FOR_PAGES, "vary": "Origin"}

    def _preflight(self, headers: Mapping[str, str]) -> dict[str, str]:
        if not self.cross_origin(headers):
            page, variable = shorten(headers["origin"]), variable_of("allowed_origins")
            message = f"web pages of {page} may not call this server; the allowed ones are in {variable}"
            raise ApiError(403, message, code="ORIGIN_NOT_ALLOWED", param="origin")
        return {
            "access-control-allow-methods": "GET, HEAD, POST",
            "access-control-allow-headers": headers.get(
                "access-control-request-headers", "authorization, content-type"
            ),
            "access-control-max-age": str(_PREFLIGHT_AGE_S),
        }

    def admit(
        self, method: str, path: str, headers: Mapping[str, str], served: Container[str]
    ) -> dict[str, str] | None:
        """Accept a request and record the name of its key, or refuse it. A route for GET accepts HEAD too.

        `served` are those paths of `ROUTES` that this program serves.

        Returns:
            None for a request to serve. For a browser's preflight, which never has a key: the headers of the 204 reply,
            in addition to those of `cross_origin`.

        Raises:
            ApiError: 401 without a valid key, 403 for a web page that may not call, 404 or 405 for an unknown route.
        """
        if method == "OPTIONS" and "origin" in headers and "access-control-request-method" in headers:
            return self._preflight(headers)
        if not self._keys.open and path not in OPEN:
            current().key = self._keys.name_of(headers.get("authorization", ""))
            if current().key is None:
                raise ApiError(401, "no valid API key: send it as Authorization: Bearer KEY", code="UNAUTHORIZED")
        if path not in served:
            raise ApiError(404, f"there is no such route; the embeddings are at {EMBEDDINGS}", code="NOT_FOUND")
        methods = ["GET", "HEAD"] if ROUTES[path] == "GET" else [ROUTES[path]]
        if method not in methods:
            message = f"{path} accepts {' and '.join(methods)}"
            raise ApiError(405, message, code="METHOD_NOT_ALLOWED", allow=", ".join(methods))
        return None

    async def read_body(self, headers: Mapping[str, str], parts: AsyncIterable[bytes]) -> bytes:
        """Read a request's JSON body, within the limits of size and time.

        Raises:
            ApiError: 408, 413 or 415.
        """
        kind = headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json":
            message = f"the content type is {shorten(kind)}; send application/json"
            raise ApiError(415, message, code="UNSUPPORTED_MEDIA_TYPE", param="content-type")
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding != "identity":
            message = f"the body is encoded as {shorten(encoding)}; send it without Content-Encoding"
            raise ApiError(415, message, code="UNSUPPORTED_ENCODING", param="content-encoding")
        largest, longest_s = self._settings.max_body_bytes, self._settings.body_timeout_s
        too_large = ApiError(413, f"the body is over the limit of {largest} bytes", code="BODY_TOO_LARGE")
        announced = headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > largest:
            raise too_large
        body = io.BytesIO()  # getvalue() does not copy
        try:
            async with asyncio.timeout(longest_s):
                async for part in parts:
                    body.write(part)
                    current().request_bytes = body.tell()
                    if body.tell() > largest:
                        raise too_large
        except TimeoutError as error:
            message = f"the body did not arrive within {longest_s:g} s"
            raise ApiError(408, message, code="BODY_TOO_SLOW", closes=True) from error
        return body.getvalue()


def not_http() -> ApiError:
    """Make the error for invalid HTTP."""
    return ApiError(400, "what was sent is not valid HTTP/1.1", code="INVALID_HTTP", closes=True)


def as_api_error(error: BaseException, request_id: str) -> ApiError:
    """Return the error that the caller sees. The details of an internal error are only in the log."""
    if isinstance(error, ApiError):
        return error
    logger.error("request %s failed", request_id, exc_info=error)
    return ApiError(500, f"internal error; see request {request_id} in the server's log", code="INTERNAL")
