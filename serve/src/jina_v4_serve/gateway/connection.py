"""How the gateway reads HTTP: as aiohttp does, within our limits."""

import asyncio
import uuid

from aiohttp import web

from jina_v4_serve.api.door import KEEP_ALIVE_S, MAX_HEAD_BYTES, not_http
from jina_v4_serve.gateway.app import as_response


class Connection(web.RequestHandler):
    """aiohttp's connection; it answers invalid HTTP with an error of the usual shape."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Make the reply to what could not be parsed; it is the sender's fault and is not logged."""
        if status != 400:
            return super().handle_error(request, status, exc, message)
        return as_response(not_http(), uuid.uuid4().hex)


class Listener(web.Server):
    """aiohttp's server, with our kind of connection."""

    def __call__(self) -> Connection:
        """Make a connection."""
        return Connection(
            self,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=KEEP_ALIVE_S,
            max_line_size=MAX_HEAD_BYTES,
            max_field_size=MAX_HEAD_BYTES,
            auto_decompress=False,
        )
