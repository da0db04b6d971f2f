"""How the gateway reads HTTP: with aiohttp, our limits and our error for invalid HTTP."""

import asyncio
import uuid

from aiohttp import web

from jina_v4_serve.api.door import KEEP_ALIVE_S, MAX_HEAD_BYTES, not_http
from jina_v4_serve.gateway.app import as_response


class Connection(web.RequestHandler):
    """aiohttp's connection, which answers invalid HTTP with an error in our form."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Make the reply to a request that could not be parsed. Invalid HTTP is not logged: the sender caused it."""
        if status != 400:
            return super().handle_error(request, status, exc, message)
        return as_response(not_http(), uuid.uuid4().hex)


class Listener(web.Server):
    """aiohttp's server, with our connections."""

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
