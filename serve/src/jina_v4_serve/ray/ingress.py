"""The ingress: the gateway under Ray Serve. It finds the task of a request and sends it to a replica of that task.

A request is never sent to a second replica: embedding it again would cost twice, and only the caller knows whether to
repeat it. Ray Serve repeats the choice of a replica until one has accepted the request.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from http import HTTPStatus
from typing import Any, cast

from multidict import CIMultiDict
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from jina_v4_serve import __version__
from jina_v4_serve.api.door import EMBEDDING_ROUTES, Door, as_api_error, request_id
from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.api.forms.errors import error_body
from jina_v4_serve.api.record import Record, current, recording
from jina_v4_serve.gateway.forward import RETRY_AFTER_S, for_server, unavailable
from jina_v4_serve.gateway.pages import merge_models, ready_page
from jina_v4_serve.gateway.routing import find_task
from jina_v4_serve.gateway.servers import Page
from jina_v4_serve.ray.replica import Head
from jina_v4_serve.ray.settings import IngressSettings
from jina_v4_serve.settings import read_settings

logger = logging.getLogger(__name__)

_PAGE_TIMEOUT_S = 6.0  # longer than the 4 s of a server's own probe
# A replica died, or there is none.
_LOST = (RayActorError, DeploymentUnavailableError)

Handler = Callable[[Request], Awaitable[Response]]


class Ingress:
    """Answers requests, with the replicas of each task."""

    def __init__(self, settings: IngressSettings, replicas: Mapping[str, DeploymentHandle[Any]]) -> None:
        self._settings = settings
        self._replicas = replicas
        common = read_settings()
        self._door = Door(
            replace(
                common,
                max_body_bytes=settings.max_body_bytes or common.max_body_bytes,
                body_timeout_s=settings.body_timeout_s or common.body_timeout_s,
            )
        )
        self._handlers: dict[str, Handler] = {
            **dict.fromkeys(EMBEDDING_ROUTES, self._embeddings),
            "/v1/models": self._models,
            "/health": self._health,
            "/ready": self._ready,
            "/version": self._version,
        }

    async def __call__(self, request: Request) -> Response:
        """Answer one request."""
        record = Record(request_id(request.headers))  # if the caller sent no id, Ray's proxy has added one
        try:
            with recording(record):
                response = await self._respond(request)
        except Exception as cause:  # a failure affects this request only
            error = as_api_error(cause, record.request_id)
            content = error_body(error, record.request_id, _path(request))
            response = Response(content, error.status, dict(error.headers()), "application/json")
        response.headers.update(self._door.cross_origin(request.headers))
        return response

    async def _respond(self, request: Request) -> Response:
        path = _path(request)
        preflight = self._door.admit(request.method, path, request.headers, self._handlers)
        if preflight is not None:
            return Response(status_code=204, headers=preflight)
        return await self._handlers[path](request)

    async def _embeddings(self, request: Request) -> Response:
        body = await self._door.read_body(request.headers, request.stream())
        if not body and "upgrade" in request.headers:  # Ray's proxy reads HTTP with uvicorn's parser in C
            message = "Ray's proxy loses the body of a request that offers an upgrade; send it without Upgrade"
            raise ApiError(400, message, code="BODY_LOST", param="upgrade")
        task = find_task(body, self._replicas)
        headers = for_server(CIMultiDict(request.headers.items()))
        request_id = current().request_id
        handle = self._replicas[task].options(stream=True)
        answer = cast(
            DeploymentResponseGenerator[Any],
            handle.embed.remote(list(headers.items()), body, request_id, _path(request)),
        )
        try:
            try:
                async with asyncio.timeout(self._settings.wait_s):
                    await anext(answer)  # a replica has accepted the request
            except TimeoutError:
                answer.cancel()  # type: ignore[no-untyped-call] # Ray's
                raise unavailable(task) from None
            head: Head = await anext(answer)
        except BackPressureError:
            message = f"too many requests are waiting for the {task} replicas; try again later"
            raise ApiError(429, message, code="TOO_MANY_REQUESTS", retry_after_s=RETRY_AFTER_S) from None
        except _LOST:
            raise unavailable(task) from None
        response = StreamingResponse(_pieces(answer, request_id), head.status)
        response.raw_headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in head.headers]
        return response

    async def _models(self, request: Request) -> Response:
        content, headers = merge_models(await self._pages(request), self._replicas)
        return JSONResponse(content, headers=headers)

    async def _ready(self, request: Request) -> Response:
        pages = await self._pages(request)
        return JSONResponse(*ready_page({task: _state(pages.get(task)) for task in self._replicas}))

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def _version(self, _: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def _pages(self, request: Request) -> dict[str, Page]:
        """Get the page at this path from one replica of each task, without tasks that do not answer."""
        headers = {name: value for name, value in request.headers.items() if name == "authorization"}

        async def get(task: str) -> Page | None:
            reply = self._replicas[task].get.remote(_path(request), headers)
            try:
                async with asyncio.timeout(_PAGE_TIMEOUT_S):
                    page: Page | None = await reply
                    return page
            except TimeoutError:
                reply.cancel()  # type: ignore[no-untyped-call] # Ray's
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
        # The status has been sent. Raise, so that a partial reply does not look complete.
        logger.warning("request %s: the replica broke off in the middle of its answer", request_id)
        raise


def _path(request: Request) -> str:
    """Return the path of a request below the application's route_prefix, which Ray's proxy leaves in it."""
    return request.url.path.removeprefix(request.scope.get("root_path", ""))


def _state(page: Page | None) -> str:
    if page is None:
        return "down"
    return "ready" if page.status == HTTPStatus.OK else "not ready"
