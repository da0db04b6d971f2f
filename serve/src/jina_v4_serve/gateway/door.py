"""Who may in, and where to: what a gateway asks of a request before it reads the body."""

import hmac
from collections.abc import Mapping

from jina_v4_serve.api.errors import ApiError

EMBEDDINGS = "/v1/embeddings"
_OPEN = ("/health", "/ready")  # an orchestrator's probes carry no key


def admit(method: str, path: str, authorization: str, routes: Mapping[str, str], key: str | None) -> None:
    """Let a request in, or refuse it.

    Args:
        method: of the request.
        path: of the request.
        authorization: the header; empty where there is none.
        routes: the methods by path.
        key: that callers must send; None lets everybody in.

    Raises:
        ApiError: 401 without the key, 404 and 405 where there is no such route.
    """
    if key is not None and path not in _OPEN:
        given = authorization.encode("utf-8", "surrogateescape")
        # Compared in constant time, so that nobody can find the key letter by letter.
        if not hmac.compare_digest(given, f"Bearer {key}".encode()):
            raise ApiError(401, "no valid API key: send it as Authorization: Bearer KEY", code="UNAUTHORIZED")
    if path not in routes:
        raise ApiError(404, f"there is no such route; the embeddings are at {EMBEDDINGS}", code="NOT_FOUND")
    if method != routes[path] and (method, routes[path]) != ("HEAD", "GET"):
        raise ApiError(405, f"{path} takes {routes[path]}", code="METHOD_NOT_ALLOWED")
