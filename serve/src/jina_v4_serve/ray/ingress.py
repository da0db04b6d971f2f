"""The ingress: what the gateway is elsewhere. It finds a request's task and hands it to a replica of that task.

A request is given to one replica and never to a second: embedding it again would cost twice, and only the caller knows
whether he still wants it. What Ray Serve does repeat is the choice of a replica, as long as none has taken the request.
"""

import asyncio
import logging
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any, cast

from multidict import CIMultiDict
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from jina_v4_serve import __version__
from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.api.settings import read_key
from jina_v4_serve.gateway.app import RETRY_AFTER_S, end_to_end, unavailable
from jina_v4_serve.gateway.door import EMBEDDINGS, admit
from jina_v4_serve.gateway.models import merge_models
from jina_v4_serve.gateway.routing import find_task
from jina_v4_serve.gateway.servers import Page
from jina_v4_serve.ray.replica import Head
from jina_v4_serve.ray.settings import IngressSettings

logger = logging.getLogger(__name__)

_PAGE_TIMEOUT_S = 6.0  # a server's own probe takes 4 s until it gives up
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# A replica was lost, or there is none.
_LOST = (RayActorError, DeploymentUnavailableError)

Handler = Callable[[Request, str], Awaitable[Response]]


class Ingress:
    """Answers requests.

    Args:
        settings: of the deployments.
        replicas: of each task.
    """

    def __init__(self, settings: IngressSettings, replicas: Mapping[str, DeploymentHandle[Any]]) -> None:
        self._settings = settings
        self._replicas = replicas
        self._key = read_key()
        self._routes: dict[str, tuple[str, Handler]] = {
            EMBEDDINGS: ("POST", self._embeddings),
            "/v1/models": ("GET", self._models),
            "/health": ("GET", self._health),
            "/ready": ("GET", self._ready),
            "/version": ("GET", self._version),
        }

    async def __call__(self, request: Request) -> Response:
        """Answer one request."""
        sent_id = request.headers.get("X-Request-ID", "")  # where the caller sent none, Ray's proxy has put one
        request_id = sent_id if _SANE_ID.fullmatch(sent_id) else uuid.uuid4().hex
        methods = {path: method for path, (method, _) in self._routes.items()}
        path = request.url.path
        try:
            admit(request.method, path, request.headers.get("Authorization", ""), methods, self._key)
            return await self._routes[path][1](request, request_id)
        except ApiError as error:
            return _error(error, request_id)
        except Exception:  # one request's failure ends no others
            logger.exception("request %s failed", request_id)
            return _error(ApiError(500, "the ingress failed", code="INTERNAL_ERROR"), request_id)

    async def _embeddings(self, request: Request, request_id: str) -> Response:
        body = await self._read(request)
        task = find_task(body, self._replicas)
        headers = end_to_end(CIMultiDict(request.headers.items()), "Host", "Expect", "Content-Length")
        headers["X-Request-ID"] = request_id
        handle = self._replicas[task].options(stream=True)
        answer = cast(DeploymentResponseGenerator[Any], handle.embed.remote(list(headers.items()), body, request_id))
        try:
            try:
                async with asyncio.timeout(self._settings.wait_s):
                    await anext(answer)  # the sign that a replica has taken it
            except TimeoutError:
                answer.cancel()  # type: ignore[no-untyped-call] # Ray's
                raise unavailable(task) from None
            head: Head = await anext(answer)
        except BackPressureError:
            raise _too_much(task) from None
        except _LOST:
            raise unavailable(task) from None
        response = StreamingResponse(_pieces(answer, request_id), head.status)
        response.raw_headers = [
            (name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in head.headers
        ]
        return response

    async def _read(self, request: Request) -> bytes:
        limit, patience_s = self._settings.max_body_bytes, self._settings.body_timeout_s
        if request.headers.get("Content-Encoding", "identity") != "identity":
            raise ApiError(415, "send the body without Content-Encoding", code="UNSUPPORTED_ENCODING")
        pieces: list[bytes] = []
        n_bytes = 0
        try:
            async with asyncio.timeout(patience_s):
                async for piece in request.stream():
                    pieces.append(piece)
                    n_bytes += len(piece)
                    if n_bytes > limit:
                        raise ApiError(
                            413, f"the body is larger than the limit of {limit} bytes", code="BODY_TOO_LARGE"
                        )
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {patience_s:g} s", code="BODY_TIMEOUT") from None
        return b"".join(pieces)

    async def _models(self, request: Request, _: str) -> Response:
        pages = await self._pages("/v1/models", request)
        good = {task: page for task, page in pages.items() if page.status == HTTPStatus.OK}
        if not good and any(page.status == HTTPStatus.UNAUTHORIZED for page in pages.values()):
            raise ApiError(401, "the servers did not accept the API key", code="UNAUTHORIZED")
        if not good:
            raise unavailable(*self._replicas)
        content, headers = merge_models(good)
        return JSONResponse(content, headers=headers)

    async def _ready(self, request: Request, _: str) -> Response:
        pages = await self._pages("/ready", request)
        states = {task: _state(pages.get(task)) for task in self._replicas}
        ready = all(state == "ready" for state in states.values())
        headers = {} if ready else {"Retry-After": str(RETRY_AFTER_S)}
        return JSONResponse({"ready": ready, "tasks": states}, 200 if ready else 503, headers)

    async def _health(self, _: Request, __: str) -> Response:
        return JSONResponse({"status": "alive"})

    async def _version(self, _: Request, __: str) -> Response:
        return JSONResponse({"version": __version__})

    async def _pages(self, path: str, request: Request) -> dict[str, Page]:
        """Get a page of one replica of each task; of a task that has none that answers, none."""
        headers = {name: value for name, value in request.headers.items() if name == "authorization"}

        async def get(task: str) -> Page | None:
            asked = self._replicas[task].get.remote(path, headers)
            try:
                async with asyncio.timeout(_PAGE_TIMEOUT_S):
                    page: Page | None = await asked
                    return page
            except TimeoutError:
                asked.cancel()  # type: ignore[no-untyped-call] # Ray's
            except (*_LOST, BackPressureError):
                pass
            return None

        pages = await asyncio.gather(*map(get, self._replicas))
        return {task: page for task, page in zip(self._replicas, pages, strict=True) if page is not None}


async def _pieces(answer: AsyncIterator[bytes], request_id: str) -> AsyncIterator[bytes]:
    try:
        async for piece in answer:
            yield piece
    except Exception:
        # The status is out already. Half an answer must not look like a whole one: no orderly end.
        logger.warning("request %s: the replica broke off in the middle of its answer", request_id)
        raise


def _state(page: Page | None) -> str:
    if page is None:
        return "down"
    return "ready" if page.status == HTTPStatus.OK else "not ready"


def _too_much(task: str) -> ApiError:
    message = f"too many requests wait for the {task} replicas"
    return ApiError(429, message, code="TOO_MANY_REQUESTS", retry_after_s=RETRY_AFTER_S)


def _error(error: ApiError, request_id: str) -> Response:
    return Response(error.body(request_id), error.status, dict(error.headers()), "application/json")
