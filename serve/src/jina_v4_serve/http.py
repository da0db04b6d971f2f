"""What every answer of a server says of itself, and which routes there are.

A client can tell from the headers that the vectors were pooled in the engine, and for which task; a stock vLLM on the
same address has neither header. vLLM's other routes would answer with vectors that are not this model's
(`/v2/embed` puts a system message into the prompt) or are of no use here, so they do not exist.
"""

import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

TASK_VARIABLE = "JINA_V4_SERVED_TASK"  # set by the launcher: vLLM builds the middleware, in processes of its own
ROUTES = frozenset({"/v1/embeddings", "/v1/models", "/health", "/version", "/metrics"})


class Deployment:
    """ASGI middleware: adds the two headers to every response, answers 404 on any route but `ROUTES`."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.headers = [
            (b"x-jina-v4-task", os.environ[TASK_VARIABLE].encode()),
            (b"x-jina-v4-pooling", b"engine"),
        ]

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http" or scope["path"].rstrip("/") not in ROUTES:
            await self._not_found(scope, send)
        else:

            async def send_with_headers(message: Message) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message.get("headers", []), *self.headers]
                await send(message)

            await self.app(scope, receive, send_with_headers)

    async def _not_found(self, scope: Message, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        body = b'{"error": {"message": "no such route; the embeddings are at /v1/embeddings", "type": "NotFoundError"}}'
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *self.headers]
        await send({"type": "http.response.start", "status": 404, "headers": headers})
        await send({"type": "http.response.body", "body": body})
