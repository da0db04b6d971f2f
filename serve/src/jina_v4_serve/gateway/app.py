"""The gateway's routes. The whole body of a request is read, as its task may be at the end; a reply is streamed."""

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
from aiohttp import HttpVersion11, web
from aiohttp.http_exceptions import HttpProcessingError

from jina_v4_serve import __version__
from jina_v4_serve.api.door import EMBEDDING_ROUTES, Door, as_api_error, not_http, request_id
from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.api.forms.errors import error_body
from jina_v4_serve.api.log import log_request
from jina_v4_serve.api.record import CLOSED_REQUEST, Record, current, recording
from jina_v4_serve.gateway.bodies import Bodies
from jina_v4_serve.gateway.forward import end_to_end, for_server, forward, unavailable
from jina_v4_serve.gateway.metrics import GatewayMetrics, merge
from jina_v4_serve.gateway.pages import good, merge_models, ready_page
from jina_v4_serve.gateway.routing import find_task
from jina_v4_serve.gateway.servers import Page, Servers
from jina_v4_serve.settings import LogStyle

logger = logging.getLogger(__name__)

_SMALL_BYTES = 2**18  # smaller replies are sent in one piece

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Gateway:
    """Answers requests. With `draining`, every connection closes after its reply."""

    def __init__(
        self,
        servers: Servers,
        metrics: GatewayMetrics,
        door: Door,
        bodies: Bodies,
        log: LogStyle = "plain",
        default_task: str | None = None,
    ) -> None:
        self.servers = servers
        self._default_task = default_task
        self.metrics = metrics
        metrics.prepare(servers.urls)
        self.in_flight = 0
        self.draining = False
        self._door = door
        self._bodies = bodies
        self._logs_requests = log == "json"
        self._handlers: dict[str, Handler] = {
            **dict.fromkeys(EMBEDDING_ROUTES, self._embeddings),
            "/v1/models": self._models,
            "/health": self._health,
            "/ready": self._ready,
            "/metrics": self._metrics,
            "/version": self._version,
        }

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        # The status stays this if the task is cancelled, as the client has disconnected.
        record = Record(request_id(request.headers), status=CLOSED_REQUEST)
        self.in_flight += 1
        try:
            try:
                with recording(record):
                    response = await self._respond(request)
            except Exception as cause:  # a failure affects this request only
                error = as_api_error(cause, record.request_id)
                record.code, record.param = error.code, error.param
                response = as_response(error, record.request_id, request.path)
            record.answered(response.status)
            record.response_bytes = response.body_length if response.prepared else response.content_length or 0
        finally:
            self.in_flight -= 1
            if request.path in EMBEDDING_ROUTES and request.method != "OPTIONS":
                self.metrics.count(record)
                if self._logs_requests:
                    log_request("gateway", record)
        if not response.prepared:
            response.headers.setdefault("X-Request-ID", record.request_id)
            response.headers.setdefault("Server", "jina-v4-gateway")
            response.headers.update(self._door.cross_origin(request.headers))
            if self.draining:
                response.force_close()
        return response

    async def _respond(self, request: web.BaseRequest) -> web.StreamResponse:
        preflight = self._door.admit(request.method, request.path, request.headers, self._handlers)
        if preflight is not None:
            return web.Response(status=204, headers=preflight)
        return await self._handlers[request.path](request)

    async def _embeddings(self, request: web.BaseRequest) -> web.StreamResponse:
        with self.metrics.in_flight.track_inprogress(), self._bodies.of_request() as counted:
            try:
                body = await self._door.read_body(request.headers, counted(_parts(request)))
            except (aiohttp.ClientPayloadError, HttpProcessingError) as error:
                raise not_http() from error
            current().task = task = find_task(body, self.servers.urls, self._default_task)
            if self.servers.states[task] != "ready":
                raise unavailable(task)
            async with forward(self.servers, task, request.path, for_server(request.headers), body) as answer:
                return await self._pass_on(request, answer)

    async def _pass_on(self, request: web.BaseRequest, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        request_id = current().request_id
        headers = end_to_end(answer.headers)
        headers.setdefault("X-Request-ID", request_id)
        headers.update(self._door.cross_origin(request.headers))
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
            # The status has been sent. Abort the connection, so that a partial reply does not look complete.
            logger.warning("request %s: the server broke off in the middle of its answer", request_id)
            if request.transport is not None:
                request.transport.abort()
        else:
            await response.write_eof()
        return response

    async def _pages(self, request: web.BaseRequest) -> dict[str, Page]:
        """Get the page at this path from each ready server."""
        key = {name: value for name, value in request.headers.items() if name.lower() == "authorization"}
        return await self.servers.get_all(request.path, key)

    async def _models(self, request: web.BaseRequest) -> web.Response:
        content, headers = merge_models(await self._pages(request), self.servers.urls)
        return web.json_response(content, headers=headers)

    async def _metrics(self, request: web.BaseRequest) -> web.Response:
        self.metrics.ready.clear()  # drops tasks that are no longer served
        for task, state in self.servers.states.items():
            self.metrics.ready.labels(task).set(state == "ready")
        # Without any ready server the page has the gateway's own metrics, which matter most then.
        pages = good(await self._pages(request))
        groups = self.servers.by_address(pages)
        text = merge(self.metrics.registry, {",".join(group): pages[group[0]].body.decode() for group in groups})
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _version(self, request: web.BaseRequest) -> web.Response:
        versions = {task: json.loads(page.body) for task, page in good(await self._pages(request)).items()}
        return web.json_response({"version": __version__, "servers": versions})

    async def _health(self, _: web.BaseRequest) -> web.Response:
        return web.json_response({"status": "alive"})

    async def _ready(self, _: web.BaseRequest) -> web.Response:
        await self.servers.check_all()
        content, status, headers = ready_page(self.servers.states)
        return web.json_response(content, status=status, headers=headers)


async def _parts(request: web.BaseRequest) -> AsyncIterator[bytes]:
    if request.headers.get("Expect", "").lower() == "100-continue" and request.version >= HttpVersion11:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # else aiohttp counts this line as the beginning of the reply
    async for part in request.content.iter_any():
        yield part


def as_response(error: ApiError, request_id: str, path: str = "") -> web.Response:
    """Make the reply for an error."""
    headers = {**error.headers(), "Content-Type": "application/json", "X-Request-ID": request_id}
    response = web.Response(status=error.status, body=error_body(error, request_id, path), headers=headers)
    if error.closes:
        response.force_close()
    return response
