"""The middleware before every route (request id, key, list of routes) and after every reply (headers, metrics, log).

The headers show a client that the vectors were pooled in the engine, for which task, and by which revision; a stock
vLLM on the same address has none of them. vLLM's other routes are not served: some would return vectors that are not
this model's (its `/v2/embed` puts a system message into the prompt; ours does not).
"""

from collections.abc import Mapping, Sequence

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jina_v4_serve.api import metrics
from jina_v4_serve.api.door import EMBEDDING_ROUTES, ROUTES, Door, as_api_error, request_id
from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.api.forms.errors import error_body
from jina_v4_serve.api.log import log_lines, log_request
from jina_v4_serve.api.protocol import PlainHttp
from jina_v4_serve.api.record import NO_TASK, Record, recording
from jina_v4_serve.facts import TASKS
from jina_v4_serve.settings import read_served, read_settings


class Guard:
    """The outermost ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        settings, served = read_settings(), read_served()
        self.door = Door(settings)
        # With several tasks a reply names all of them until the task of the request is known.
        self.headers = {NO_TASK: _headers(served.tasks, served.revisions)}
        self.headers |= {task: _headers([task], served.revisions) for task in served.tasks}
        self.task = served.tasks[0] if len(served.tasks) == 1 and served.tasks[0] in TASKS else NO_TASK
        self.logs_requests = settings.log == "json"
        if self.logs_requests:
            log_lines("json")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "lifespan":
            scope["app"].state.server.config.http_protocol_class = PlainHttp  # uvicorn's; vLLM puts it there
            await self.app(scope, receive, send)
            return
        headers = Headers(raw=scope["headers"])
        path, method = scope["path"], scope["method"]
        record = Record(request_id(headers), self.task)
        scope.setdefault("state", {})["request_id"] = record.request_id
        request_headers = _raw({"x-request-id": record.request_id, **self.door.cross_origin(headers)})
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                ours = self.headers[record.task] | request_headers
                kept = [(name, value) for name, value in message.get("headers", ()) if name.lower() not in ours]
                message["headers"] = [*kept, *ours.items()]
                record.answered(message["status"])
            record.response_bytes += len(message.get("body", b""))
            await send(message)

        try:
            with recording(record):
                preflight = self.door.admit(method, path, headers, ROUTES)
            if preflight is not None:
                await Response(status_code=204, headers=preflight)(scope, receive, send_with_headers)
                return
            if path in EMBEDDING_ROUTES and not hasattr(scope["app"].state, "jina_v4"):
                # vLLM ignores a plugin that it cannot load, and its own route would return other vectors.
                raise ApiError(503, "the routes of jina-v4-serve are not loaded; see the log", code="NOT_LOADED")
            if method == "HEAD":  # uvicorn leaves the body out
                scope = {**scope, "method": "GET"}
            with recording(record):
                await self.app(scope, receive, send_with_headers)
        except Exception as cause:
            error = as_api_error(cause, record.request_id)
            if started:
                raise
            record.code = error.code
            await error_response(error, record.request_id, path)(scope, receive, send_with_headers)
        finally:
            if path in EMBEDDING_ROUTES and method != "OPTIONS":
                metrics.count(record)
                if self.logs_requests:
                    log_request("server", record)


def _raw(headers: Mapping[str, str]) -> dict[bytes, bytes]:
    return {name.encode(): value.encode("latin-1") for name, value in headers.items()}


def _headers(tasks: Sequence[str], revisions: Mapping[str, str]) -> dict[bytes, bytes]:
    headers = {"x-jina-v4-task": ", ".join(tasks), "x-jina-v4-pooling": "engine"}
    if revisions:
        headers["x-jina-v4-revision"] = ", ".join(revisions[task] for task in tasks)
    return _raw(headers)


def error_response(error: ApiError, request_id: str, path: str) -> Response:
    """Make the reply for an error, in the form of the route."""
    return Response(error_body(error, request_id, path), error.status, error.headers(), "application/json")
