"""How a server reads HTTP.

uvicorn has two parsers. The one in C loses the body of a request that offers an upgrade (`Upgrade: h2c`, from Java's
HttpClient and `curl --http2`). The one in Python reads it, and takes 0.1 ms more per request. Upgrades are ignored.
"""

import asyncio
import uuid

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from jina_v4_serve.api.door import not_http
from jina_v4_serve.api.forms.errors import error_body


class PlainHttp(H11Protocol):
    """uvicorn's connection, which answers invalid HTTP with an error in our form, and closes one that stays idle.

    uvicorn does so only before the first byte of a later request. The head of a first one, the rest of a head, and the
    body of a request that has been refused could take for ever.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        """Wait for a request as long as after a reply."""
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        """Read on. Only a request that is to be answered ends the waiting."""
        self.conn.receive_data(data)
        self.handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._unset_keepalive_if_required()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection at once, also if it broke."""
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def _should_upgrade(self) -> bool:
        return False

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's own words
        """Answer invalid HTTP, and close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # else a part of a reply has been sent
            request_id = uuid.uuid4().hex
            error = not_http()
            body = error_body(error, request_id)
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("x-request-id", request_id),
                *error.headers().items(),
            ]
            for event in (h11.Response(status_code=error.status, headers=headers), h11.Data(body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
