"""The gateway's routes. A request's body is read whole, as its task may stand at its end; an answer is streamed."""

import asyncio
import io
import json
import logging
import re
import uuid
from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus

import aiohttp
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from jina_v4_serve import __version__
from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.api.log import log_request
from jina_v4_serve.api.record import CLOSED_REQUEST, Record, current, recording
from jina_v4_serve.api.settings import LogStyle
from jina_v4_serve.gateway.door import EMBEDDINGS, admit
from jina_v4_serve.gateway.metrics import GatewayMetrics, merge
from jina_v4_serve.gateway.models import merge_models
from jina_v4_serve.gateway.routing import find_task
from jina_v4_serve.gateway.servers import Page, Servers

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 5
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
# RFC 9110, 7.6.1, and what HTTP libraries add to it; these are between neighbours, and we are one of them.
_HOP_BY_HOP = (
    "Connection",
    "Keep-Alive",
    "Proxy-Authenticate",
    "Proxy-Authorization",
    "Proxy-Connection",
    "TE",
    "Trailer",
    "Transfer-Encoding",
    "Upgrade",
)
_SMALL_BYTES = 2**18  # an answer up to this size goes out in one piece
_LARGE_BYTES = 2**20  # aiohttp wants a body over this size as a file, to send it piece by piece

Handler = Callable[[web.Request, str], Awaitable[web.StreamResponse]]


class Gateway:
    """Answers requests; `draining` has every connection close after its answer."""

    def __init__(
        self,
        servers: Servers,
        metrics: GatewayMetrics,
        key: str | None,
        max_body_bytes: int,
        body_timeout_s: float,
        log: LogStyle = "plain",
    ) -> None:
        self.servers = servers
        self.metrics = metrics
        metrics.prepare(servers.urls)
        self.in_flight = 0
        self.draining = False
        self._key = key
        self._logs_requests = log == "json"
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s
        self._routes: dict[str, tuple[str, Handler]] = {
            EMBEDDINGS: ("POST", self._embeddings),
            "/v1/models": ("GET", self._models),
            "/health": ("GET", self._health),
            "/ready": ("GET", self._ready),
            "/metrics": ("GET", self._metrics),
            "/version": ("GET", self._version),
        }

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request."""
        sent_id = request.headers.get("X-Request-ID", "")
        request_id = sent_id if _SANE_ID.fullmatch(sent_id) else uuid.uuid4().hex
        record = Record(request_id, status=CLOSED_REQUEST)  # which it stays when this is cancelled: the client has left
        self.in_flight += 1
        try:
            try:
                with recording(record):
                    response = await self._route(request)(request, request_id)
            except ApiError as error:
                record.code, record.param = error.code, error.param
                response = _error(error, request_id)
            except Exception:  # one request's failure ends neither the gateway nor its other requests
                logger.exception("request %s failed", request_id)
                record.code = "INTERNAL_ERROR"
                response = _error(ApiError(500, "the gateway failed", code=record.code), request_id)
            record.answered(response.status)
            record.response_bytes = response.body_length if response.prepared else response.content_length or 0
        finally:
            self.in_flight -= 1
            if request.path == EMBEDDINGS:
                self.metrics.count(record)
                if self._logs_requests:
                    log_request("gateway", record)
        if not response.prepared:
            response.headers.setdefault("X-Request-ID", request_id)
            response.headers.setdefault("Server", "jina-v4-gateway")
            if self.draining:
                response.force_close()
        return response

    def _route(self, request: web.Request) -> Handler:
        methods = {path: method for path, (method, _) in self._routes.items()}
        admit(request.method, request.path, request.headers.get("Authorization", ""), methods, self._key)
        return self._routes[request.path][1]

    async def _embeddings(self, request: web.Request, request_id: str) -> web.StreamResponse:
        with self.metrics.in_flight.track_inprogress():
            body = await self._read(request)
            current().request_bytes = len(body)
            current().task = task = find_task(body, self.servers.urls)
            return await self._forward(request, request_id, task, body)

    async def _read(self, request: web.Request) -> bytes:
        too_large = ApiError(
            413, f"the body is larger than this gateway's limit of {self._max_body_bytes} bytes", code="BODY_TOO_LARGE"
        )
        if (request.content_length or 0) > self._max_body_bytes:
            raise too_large
        if request.headers.get("Content-Encoding", "identity") != "identity":
            raise ApiError(415, "send the body without Content-Encoding", code="UNSUPPORTED_ENCODING")
        try:
            async with asyncio.timeout(self._body_timeout_s):
                return await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise too_large from None
        except TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {self._body_timeout_s:g} s", code="BODY_TIMEOUT"
            ) from None

    async def _forward(self, request: web.Request, request_id: str, task: str, body: bytes) -> web.StreamResponse:
        if self.servers.states[task] != "ready":
            raise unavailable(task)
        headers = end_to_end(request.headers, "Host", "Expect", "Content-Length")
        headers["X-Request-ID"] = request_id
        data = body if len(body) <= _LARGE_BYTES else io.BytesIO(body)
        try:
            async with self.servers.session.post(
                self.servers.urls[task].joinpath("v1", "embeddings"), data=data, headers=headers, allow_redirects=False
            ) as answer:
                return await self._pass_on(request, request_id, answer)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            self.servers.states[task] = "down"
            raise unavailable(task) from None
        except TimeoutError:
            raise ApiError(504, f"the {task} server did not answer in time", code="SERVER_TIMEOUT") from None
        except aiohttp.ClientError:
            raise unavailable(task) from None

    async def _pass_on(
        self, request: web.Request, request_id: str, answer: aiohttp.ClientResponse
    ) -> web.StreamResponse:
        headers = end_to_end(answer.headers)
        headers.setdefault("X-Request-ID", request_id)
        if answer.content_length is not None and answer.content_length <= _SMALL_BYTES:
            return web.Response(status=answer.status, reason=answer.reason, headers=headers, body=await answer.read())
        response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=headers)
        if self.draining:
            response.force_close()
        await response.prepare(request)
        try:
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
        except (aiohttp.ClientError, TimeoutError):
            # The status is out already. Half an answer must not look like a whole one: no orderly end.
            logger.warning("request %s: the server broke off in the middle of its answer", request_id)
            if request.transport is not None:
                request.transport.abort()
        else:
            await response.write_eof()
        return response

    async def _models(self, request: web.Request, _: str) -> web.Response:
        pages = await self._pages(request)
        content, headers = merge_models(pages)
        return web.json_response(content, headers=headers)

    async def _metrics(self, request: web.Request, _: str) -> web.Response:
        for task, state in self.servers.states.items():
            self.metrics.ready.labels(task).set(state == "ready")
        # Also without any server: the gateway's own counts matter most then.
        pages = await self.servers.get_all(request.path, _authorization(request))
        groups = self.servers.by_address(task for task, page in pages.items() if page.status == 200)
        text = merge(self.metrics.registry, {",".join(group): pages[group[0]].body.decode() for group in groups})
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _version(self, request: web.Request, _: str) -> web.Response:
        pages = await self.servers.get_all(request.path, _authorization(request))
        versions = {task: json.loads(page.body) for task, page in pages.items() if page.status == 200}
        return web.json_response({"version": __version__, "servers": versions})

    async def _pages(self, request: web.Request) -> dict[str, Page]:
        """Get a page of each server that gives it."""
        pages = await self.servers.get_all(request.path, _authorization(request))
        good = {task: page for task, page in pages.items() if page.status == HTTPStatus.OK}
        if good:
            return good
        if any(page.status == HTTPStatus.UNAUTHORIZED for page in pages.values()):
            raise ApiError(401, "the servers did not accept the API key", code="UNAUTHORIZED")
        raise unavailable(*self.servers.urls)

    async def _health(self, _: web.Request, __: str) -> web.Response:
        return web.json_response({"status": "alive"})

    async def _ready(self, _: web.Request, __: str) -> web.Response:
        await self.servers.check_all()
        states = self.servers.states
        ready = all(state == "ready" for state in states.values())
        headers = {} if ready else {"Retry-After": str(RETRY_AFTER_S)}
        return web.json_response({"ready": ready, "tasks": states}, status=200 if ready else 503, headers=headers)


def end_to_end(headers: CIMultiDictProxy[str] | CIMultiDict[str], *dropped: str) -> CIMultiDict[str]:
    """Copy the headers that are for the other end."""
    kept = CIMultiDict(headers)
    named: Iterable[str] = (name.strip() for line in headers.getall("Connection", ()) for name in line.split(","))
    for name in (*_HOP_BY_HOP, *named, *dropped):
        kept.popall(name, None)
    return kept


def _authorization(request: web.Request) -> dict[str, str]:
    return {name: request.headers[name] for name in ("Authorization",) if name in request.headers}


def unavailable(*tasks: str) -> ApiError:
    """Make the error for tasks whose servers are not ready."""
    named = " and ".join(tasks)
    return ApiError(
        503,
        f"the {named} server is not ready" if len(tasks) == 1 else f"no server is ready ({named})",
        code="SERVER_NOT_READY",
        retry_after_s=RETRY_AFTER_S,
    )


def _error(error: ApiError, request_id: str) -> web.Response:
    headers = {**error.headers(), "Content-Type": "application/json", "X-Request-ID": request_id}
    return web.Response(status=error.status, body=error.body(request_id), headers=headers)
