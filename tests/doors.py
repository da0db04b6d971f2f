"""One table for every front door: what is sent, byte by byte, and what each of them must say to it."""

import json
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

ORIGIN = "https://app.example"  # of the pages that may call; JINA_V4_ALLOWED_ORIGINS of the doors that are tested
KEY = "a-key-for-tests"
ID = "0123456789abcdef0123456789abcdef"
BODY = json.dumps({"input": "x", "task": "retrieval"}).encode()
JAVA = {
    "Connection": "Upgrade, HTTP2-Settings",
    "Upgrade": "h2c",
    "HTTP2-Settings": "AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
}
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
ALLOWED = {"access-control-allow-origin": ORIGIN, "vary": "Origin"}


@dataclass(frozen=True)
class Case:
    """A request, and the reply.

    Attributes:
        sent: all of it.
        status: of the reply.
        code: of its error; None where it is none.
        headers: that the reply has, or with None has not.
        begins: what the reply begins with, before the head that has this status.
        keeps: whether the connection stays open for another request; None where the doors may differ.
    """

    sent: bytes
    status: int
    code: str | None = None
    headers: Mapping[str, str | None] = field(default_factory=dict)
    begins: bytes = b""
    keeps: bool | None = True


@dataclass(frozen=True)
class Reply:
    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def get(self, name: str) -> str | None:
        values = [value for other, value in self.headers if other == name]
        assert len(values) < 2, f"{name} comes twice: {values}"
        return values[0] if values else None


def head(method: str, path: str, headers: Mapping[str, str], version: str = "1.1") -> bytes:
    lines = [f"{method} {path} HTTP/{version}", "Host: door", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode("utf-8") + b"\r\n\r\n"


def get(path: str, method: str = "GET", **headers: str) -> bytes:
    return head(method, path, {"X-Request-ID": ID, **_named(headers)})


def post(body: bytes = BODY, version: str = "1.1", more: Mapping[str, str] | None = None, **headers: str) -> bytes:
    sent = {"X-Request-ID": ID, "Content-Type": "application/json", "Content-Length": str(len(body))}
    return head("POST", "/v1/embeddings", {**sent, **_named(headers), **(more or {})}, version) + body


def chunked(*chunks: bytes, **headers: str) -> bytes:
    parts = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    sent = {"X-Request-ID": ID, "Content-Type": "application/json", "Transfer-Encoding": "chunked", **_named(headers)}
    return head("POST", "/v1/embeddings", sent) + parts + b"0\r\n\r\n"


def _named(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


UPGRADES = {
    "Java's HttpClient": Case(post(more=JAVA), 200),
    "curl --http2": Case(
        post(
            more={
                "Connection": "Upgrade, HTTP2-Settings",
                "Upgrade": "h2c",
                "HTTP2-Settings": "AAMAAABkAAQAoAAAAAIAAAAA",
            }
        ),
        200,
    ),
    "Java's HttpClient in chunks": Case(chunked(BODY[:9], BODY[9:], **JAVA), 200),
    "h2c of a GET": Case(get("/v1/models", **JAVA), 200),
    "h2c with a bad body": Case(post(b"{", more=JAVA), 400, "INVALID_JSON"),
    "a websocket of a GET": Case(
        get(
            "/v1/embeddings",
            Upgrade="websocket",
            Connection="Upgrade",
            Sec_WebSocket_Key="dGhlIHNhbXBsZSBub25jZQ==",
            Sec_WebSocket_Version="13",
        ),
        405,
        "METHOD_NOT_ALLOWED",
        keeps=None,
    ),
    "an upgrade that nobody knows": Case(post(Upgrade="TLS/1.0", Connection="upgrade"), 200),
    "an upgrade for no neighbour": Case(post(Upgrade="h2c"), 200),
}

BODIES = {
    "a length": Case(post(), 200),
    "chunks": Case(chunked(BODY[:1], BODY[1:20], BODY[20:]), 200),
    "one chunk with an extension": Case(
        chunked().replace(b"0\r\n\r\n", b"%x;name=value\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)), 200
    ),
    "Expect: 100-continue": Case(post(Expect="100-continue"), 200, begins=b"HTTP/1.1 100 Continue\r\n\r\n"),
    "Expect: 100-continue of what is refused": Case(
        post(Expect="100-continue", Content_Type="text/plain"), 415, "UNSUPPORTED_MEDIA_TYPE"
    ),
    "HTTP/1.0": Case(post(version="1.0"), 200, keeps=False),
    "HTTP/1.0 GET": Case(head("GET", "/health", {"X-Request-ID": ID}, "1.0"), 200, keeps=False),
    "Connection: close": Case(post(Connection="close"), 200, keeps=False),
    "no type": Case(post().replace(b"Content-Type: application/json\r\n", b""), 200),
    "a charset": Case(post(Content_Type="Application/JSON; charset=utf-8"), 200),
    "another type": Case(post(Content_Type="text/plain"), 415, "UNSUPPORTED_MEDIA_TYPE"),
    "gzip": Case(post(Content_Encoding="gzip"), 415, "UNSUPPORTED_ENCODING"),
    "gzip in chunks": Case(chunked(b"\x1f\x8b\x08", Content_Encoding="GZIP"), 415, "UNSUPPORTED_ENCODING"),
    "deflate": Case(post(Content_Encoding="deflate"), 415, "UNSUPPORTED_ENCODING"),
    "identity": Case(post(Content_Encoding="Identity"), 200),
    "no body": Case(post(b""), 400, "INVALID_JSON"),
    "too large": Case(post(Content_Length=str(10**12)), 413, "BODY_TOO_LARGE", keeps=None),
    "too slow": Case(post(Content_Length="1000"), 408, "BODY_TOO_SLOW", {"connection": "close"}, keeps=None),
    "a long header": Case(post(X_Long="x" * 30_000), 200),
}

ROUTES = {
    **{f"GET {path}": Case(get(path), 200) for path in ("/health", "/ready", "/v1/models", "/version")},
    **{f"HEAD {path}": Case(get(path, "HEAD"), 200) for path in ("/health", "/ready", "/v1/models", "/version")},
    "HEAD of what is posted": Case(get("/v1/embeddings", "HEAD"), 405, headers={"allow": "POST"}),
    "GET of what is posted": Case(get("/v1/embeddings"), 405, "METHOD_NOT_ALLOWED", {"allow": "POST"}),
    "POST of what is got": Case(
        get("/health", "POST", Content_Length="0"), 405, "METHOD_NOT_ALLOWED", {"allow": "GET, HEAD"}
    ),
    "OPTIONS": Case(get("/v1/embeddings", "OPTIONS"), 405, "METHOD_NOT_ALLOWED", {"allow": "POST"}),
    "no route": Case(get("/v1/nothing"), 404, "NOT_FOUND"),
    "HEAD of no route": Case(get("/v1/nothing", "HEAD"), 404),
    "a route of vLLM's": Case(get("/pooling", "POST", Content_Length="0"), 404, "NOT_FOUND"),
    "a slash at the end": Case(get("/v1/embeddings/"), 404, "NOT_FOUND"),
    "a query": Case(get("/health?deep=1"), 200),
    "a field that is refused": Case(
        post(b'{"input": "x", "task": "retrieval", "dimensions": 0}'), 422, "VALIDATION_ERROR"
    ),
    "another task": Case(post(b'{"input": "x", "task": "nonsense"}'), 422, "VALIDATION_ERROR"),
    "another model": Case(post(b'{"input": "x", "model": "gpt-4"}'), 404, "MODEL_NOT_FOUND"),
}

PAGES = {
    "a preflight": Case(
        get("/v1/embeddings", "OPTIONS", Origin=ORIGIN, **PREFLIGHT),
        204,
        headers={
            **ALLOWED,
            "access-control-allow-methods": "GET, HEAD, POST",
            "access-control-allow-headers": "authorization,content-type",
            "access-control-max-age": "600",
        },
    ),
    "a preflight of a stranger": Case(
        get("/v1/embeddings", "OPTIONS", Origin="https://evil.example", **PREFLIGHT),
        403,
        "ORIGIN_NOT_ALLOWED",
        {"access-control-allow-origin": None},
    ),
    "a preflight of a file": Case(
        get("/v1/embeddings", "OPTIONS", Origin="null", **PREFLIGHT), 403, "ORIGIN_NOT_ALLOWED"
    ),
    "the allowed page's request": Case(post(Origin=ORIGIN), 200, headers=ALLOWED),
    "the allowed page's error": Case(post(b"{", Origin=ORIGIN), 400, "INVALID_JSON", ALLOWED),
    "the allowed page's GET": Case(get("/v1/models", Origin=ORIGIN), 200, headers=ALLOWED),
    "a stranger's request": Case(
        post(Origin="https://evil.example"), 200, headers={"access-control-allow-origin": None}
    ),
    "the same name with another scheme": Case(
        get("/v1/models", Origin="http://app.example"), 200, headers={"access-control-allow-origin": None}
    ),
}

BROKEN = {
    name: Case(sent, 400, "INVALID_HTTP", keeps=False)
    for name, sent in {
        "no HTTP": b"GARBAGE\r\n\r\n",
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64) + b"\r\n\r\n",
        "a length in words": post(Content_Length="many"),
        "a length below 0": post(Content_Length="-1"),
        "a line without a colon": get("/health").replace(b"Host: door", b"Host: door\r\nnonsense"),
        "a chunk of nonsense": chunked().replace(b"0\r\n\r\n", b"zz\r\nxx\r\n0\r\n\r\n"),
        "nonsense behind a chunk": chunked(b'{"input"').replace(b"0\r\n\r\n", b"zz\r\n\r\n"),
    }.items()
}

CASES = {**UPGRADES, **BODIES, **ROUTES, **PAGES, **BROKEN}

# Of doors that ask for KEY.
KEYS = {
    **{
        f"{said!r} opens": Case(get("/v1/models", Authorization=said), 200)
        for said in (f"Bearer {KEY}", f"bearer {KEY}", f"BEARER {KEY}", f"Bearer  {KEY} ")
    },
    **{
        f"{said!r} does not open": Case(get("/v1/models", Authorization=said), 401, "UNAUTHORIZED")
        for said in ("", "Bearer", "Bearer wrong", KEY, f"Basic {KEY}", f"Bearer{KEY}", f"Bearer {KEY}x", "Bearer ключ")
    },
    "the key of a body": Case(post(Authorization=f"bearer {KEY}"), 200),
    "a body without the key": Case(post(), 401, "UNAUTHORIZED"),
    "HEAD without the key": Case(get("/v1/models", "HEAD"), 401),
    "no route without the key": Case(get("/nothing"), 401, "UNAUTHORIZED"),
    "a page's request without the key": Case(post(Origin=ORIGIN), 401, "UNAUTHORIZED", ALLOWED),
    **{name: PAGES[name] for name in ("a preflight", "a preflight of a stranger")},
    **{name: ROUTES[name] for name in ("GET /health", "HEAD /health", "GET /ready", "HEAD /ready")},
    "Java's HttpClient": Case(post(more=JAVA, Authorization=f"Bearer {KEY}"), 200),
}


class Connection:
    """A connection to a door, and the replies that come back over it."""

    def __init__(self, base_url: str, timeout_s: float = 100) -> None:
        host, port = base_url.removeprefix("http://").split(":")
        self._socket = socket.create_connection((host, int(port)), timeout_s)
        self._file = self._socket.makefile("rb")

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._socket.close()

    def send(self, content: bytes) -> None:
        self._socket.sendall(content)

    def read(self, size: int) -> bytes:
        return self._file.read(size)

    def ended(self) -> bool:
        """Whether the door closes the connection, and sends nothing more before."""
        try:
            return self._file.read(1) == b""
        except ConnectionError:
            return True

    def _line(self) -> str:
        return self._file.readline().decode("latin-1").rstrip("\r\n")

    def reply(self, has_body: bool = True) -> Reply:
        status = re.fullmatch(r"HTTP/1\.[01] (\d{3}) ?.*", self._line())
        assert status is not None
        headers = []
        while line := self._line():
            name, _, value = line.partition(":")
            headers.append((name.lower(), value.strip()))
        of_length = dict(headers).get("content-length")
        if not has_body or status[1] == "204":
            body = b""
        elif of_length is not None:
            body = self.read(int(of_length))
        elif dict(headers).get("transfer-encoding") == "chunked":
            body = b""
            while size := int(self._line(), 16):
                body += self.read(size + 2)[:-2]
            self._line()
        else:  # until the end, as for HTTP/1.0
            body = self._file.read()
        return Reply(int(status[1]), headers, body)


def check(case: Case, base_url: str) -> None:
    """Send a case to a door and look at all of its reply, and whether the connection serves another request."""
    has_body = not case.sent.startswith(b"HEAD")
    with Connection(base_url) as connection:
        connection.send(case.sent)
        assert connection.read(len(case.begins)) == case.begins
        reply = connection.reply(has_body)
        print(reply.status, reply.headers, reply.body[:300])
        assert reply.status == case.status
        for name, value in case.headers.items():
            assert reply.get(name) == value, name
        request_id = reply.get("x-request-id")
        assert request_id == ID or (case.code == "INVALID_HTTP" and re.fullmatch("[0-9a-f]{32}", request_id or ""))
        if case.code is not None:
            content = json.loads(reply.body)
            assert content["error"]["code"] == case.code
            assert reply.get("content-type") == "application/json"
        if has_body and case.status == 200 and b"/v1/embeddings" in case.sent.partition(b"\r\n")[0]:
            assert json.loads(reply.body)["data"][0]["embedding"]
        if case.keeps:
            connection.send(get("/health"))
            assert connection.reply().status == 200
        elif case.keeps is False:
            assert connection.ended()
