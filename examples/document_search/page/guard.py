"""Who may use the page: only itself. It shows one's own files, and any web page can send requests to 127.0.0.1.

A browser says which page a request comes from (`Origin`), and cannot be made to leave that out of a POST. A site whose
name is made to lead to 127.0.0.1 is seen by the `Host` header, which Starlette's TrustedHostMiddleware checks.
"""

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from document_search.page.errors import error_reply

HOSTS = ("127.0.0.1", "localhost")
_HEADERS = {
    # Nothing but our own files, whatever text a file's name holds, and in no frame of another page.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class SameOrigin:
    """Refuses what another web page sends, and forbids the browser to load anything from elsewhere."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        foreign = origin is not None and origin != f"http://{headers.get('host')}"
        # A link may lead here; what another page loads into itself may not.
        loaded = headers.get("sec-fetch-mode") != "navigate"
        if foreign or (loaded and headers.get("sec-fetch-site") in ("cross-site", "same-site")):
            refusal = error_reply(403, "OTHER_ORIGIN", "this page takes requests from itself only")
            await refusal(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)
