"""What stands before every route (request id, key, list of routes) and follows every answer (headers, counts, log).

A client can tell from the headers that the vectors were pooled in the engine, for which task, and by which revision of
the model; a stock vLLM on the same address has none of these headers. vLLM's other routes do not exist here: some would
answer with vectors that are not this model's (`/v2/embed` puts a system message into the prompt).
"""

import hmac
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

from jina_v4_serve.api import metrics
from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.api.log import log_json, log_request
from jina_v4_serve.api.record import NO_TASK, Record, recording
from jina_v4_serve.api.request import TASKS
from jina_v4_serve.api.settings import read_settings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

EMBEDDINGS = "/v1/embeddings"
# Path to methods. /docs shows the schema; its page needs the two files, which vLLM has with it.
ROUTES = {
    EMBEDDINGS: {"POST"},
    "/v1/models": {"GET"},
    "/health": {"GET"},
    "/ready": {"GET"},
    "/metrics": {"GET"},
    "/version": {"GET"},
    "/docs": {"GET", "HEAD"},
    "/openapi.json": {"GET", "HEAD"},
    "/static/swagger-ui-bundle.js": {"GET", "HEAD"},
    "/static/swagger-ui.css": {"GET", "HEAD"},
}
OPEN = {"/health", "/ready"}  # an orchestrator's probes carry no key
_SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


class Guard:
    """ASGI middleware, the outermost."""

    def __init__(self, app: App) -> None:
        self.app = app
        settings = read_settings()
        self.expected = None if settings.api_key is None else f"Bearer {settings.api_key}".encode()
        # Of several tasks an answer names all, until it is known which of them it is for.
        self.headers = {NO_TASK: _headers(settings.tasks, settings.revisions)}
        self.headers |= {task: _headers([task], settings.revisions) for task in settings.tasks}
        self.task = settings.tasks[0] if len(settings.tasks) == 1 and settings.tasks[0] in TASKS else NO_TASK
        self.logs_requests = settings.log == "json"
        if self.logs_requests:
            log_json()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        given = dict(scope["headers"])
        sent_id = given.get(b"x-request-id", b"")
        request_id = sent_id.decode() if _SANE_ID.fullmatch(sent_id) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        record = Record(request_id, self.task)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours = self.headers[record.task]
                own = {name for name, _ in ours} | {b"x-request-id"}
                kept = [(name, value) for name, value in message.get("headers", []) if name.lower() not in own]
                message["headers"] = [*kept, *ours, (b"x-request-id", request_id.encode())]
                record.answered(message["status"])
            record.response_bytes += len(message.get("body", b""))
            await send(message)

        try:
            try:
                self._check(scope["path"], scope["method"], given)
                if scope["path"] == EMBEDDINGS and not hasattr(scope["app"].state, "jina_v4"):
                    # vLLM goes on without a plugin that it could not load, and has such a route too: wrong vectors.
                    raise ApiError(503, "this server was started without its own routes", code="NOT_LOADED")
            except ApiError as error:
                record.code = error.code
                await respond(error, request_id, send_with_headers)
                return
            with recording(record):
                await self.app(scope, receive, send_with_headers)
        finally:
            if scope["path"] == EMBEDDINGS:
                metrics.count(record)
                if self.logs_requests:
                    log_request("server", record)

    def _check(self, path: str, method: str, headers: MutableMapping[bytes, bytes]) -> None:
        given = headers.get(b"authorization", b"")
        # Compared in constant time, so that nobody can find the key letter by letter.
        if self.expected is not None and path not in OPEN and not hmac.compare_digest(given, self.expected):
            raise ApiError(401, "no valid API key: send it as Authorization: Bearer KEY", code="UNAUTHORIZED")
        methods = ROUTES.get(path)
        if methods is None:
            raise ApiError(404, "there is no such route; the embeddings are at /v1/embeddings", code="NOT_FOUND")
        if method not in methods:
            message = f"{path} takes {' and '.join(sorted(methods))}"
            raise ApiError(405, message, code="METHOD_NOT_ALLOWED", allow=", ".join(sorted(methods)))


def _headers(tasks: Sequence[str], revisions: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    headers = [(b"x-jina-v4-task", ", ".join(tasks).encode()), (b"x-jina-v4-pooling", b"engine")]
    if revisions:
        headers.append((b"x-jina-v4-revision", ", ".join(revisions[task] for task in tasks).encode()))
    return headers


async def respond(error: ApiError, request_id: str, send: Send) -> None:
    """Send an error as the whole answer."""
    body = error.body(request_id)
    extra = [(name.encode(), value.encode()) for name, value in error.headers().items()]
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *extra]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
