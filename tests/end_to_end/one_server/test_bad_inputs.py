"""What a server says to bad input: the status and the message of each, and that nothing else is harmed by it."""

import base64
import json
import re
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from typing import Any

import pdf_files
import pytest
from bad_bodies import COHERE, EMBEDDINGS, PAIRS, PICTURE, RANK, RANKINGS, SEARCH, SITE, Bad, chat, user
from conftest import Golden
from image_files import written
from PIL import Image
from servers import PATIENCE_S
from wire import (
    BODY_TIMEOUT_S,
    BOUND,
    FETCH_TIMEOUT_S,
    IMAGES,
    IMAGES_BASE64,
    LEAKS,
    MAX_BODY_BYTES,
    MAX_IMAGE_BYTES,
    MAX_LENGTH,
    MAX_PDF_PAGES,
    PDF_MEMORY_BYTES,
    PDF_TIMEOUT_S,
    Site,
    Wire,
    assert_refused,
    opened_site,
)

LONG = "a b " * 8_250  # 33,000 tokens and the prefix's


def png(width: int, height: int, color: str = "red") -> bytes:
    return written(Image.new("RGB", (width, height), color), "PNG")


def declared_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is so large."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def image(content: bytes) -> dict[str, Any]:
    return {"input": ["fine", {"image": base64.b64encode(content).decode()}]}


GOOD_PNG = png(40, 40)
GOOD_JPEG = written(Image.new("RGB", (64, 64), "blue"), "JPEG")
BOMB = declared_png(30_000, 30_000)
FILES = {
    **{path.name: path.read_bytes() for path in IMAGES},
    "empty": b"",
    "page.html": b"<html><body>Welcome</body></html>",
    "large": bytes(MAX_IMAGE_BYTES + 1),
    "bomb.png": BOMB,
}


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with opened_site(FILES) as site:
        yield site


LONG_TEXTS = {
    "a text of 33k tokens": Bad(
        400,
        f"input has 33003 tokens with its prefix; the limit is {MAX_LENGTH}, {33003 - MAX_LENGTH} over",
        {"input": LONG},
        "input",
    ),
    "a text of 33k tokens among others": Bad(400, "input[2] has 33003 tokens", {"input": ["x", "y", LONG]}, "input[2]"),
    "33k tokens, truncate false": Bad(400, "truncate: true", {"input": LONG, "truncate": False}, "input"),
    "a text of millions of characters": Bad(
        400, f"has over {MAX_LENGTH} tokens", {"input": ["x", "y " * 3_000_000]}, "input[1]"
    ),
    "late chunks of 33k tokens": Bad(
        400,
        "input, late-chunked into one text, has 330",
        {"input": ["a b " * 825] * 10, "late_chunking": True},
        "input",
    ),
    "33k tokens in a chat": Bad(400, "messages[0].content has 33003 tokens", chat(user(LONG)), "messages[0].content"),
}

OF_PARTS = {
    "a broken image in a part": Bad(
        422, "nor base64", {"input": [{"type": "input_image", "image_url": "what?"}]}, "input[0].image_url"
    ),
    "a broken image in a chat": Bad(
        422, "nor base64", chat(user([PICTURE | {"image_url": "what?"}])), "messages[0].content[0].image_url"
    ),
}

UNKNOWN = "is not an image of a known format"
PDF_HINT = '; send a PDF file as {"pdf": ...}'
IMAGE = "input[1].image"
BAD_IMAGES = {
    "an EPS": Bad(422, UNKNOWN, image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"), IMAGE),
    "an SVG": Bad(422, UNKNOWN, image(b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'), IMAGE),
    "a PDF file": Bad(422, UNKNOWN + PDF_HINT, image(b"%PDF-1.4\n%%EOF"), IMAGE),
    "a TGA, which is not on the list": Bad(422, UNKNOWN, image(written(Image.new("RGB", (9, 9)), "TGA")), IMAGE),
    "a text": Bad(422, UNKNOWN, image(b"just a text"), IMAGE),
    "HTML": Bad(422, UNKNOWN, image(FILES["page.html"]), IMAGE),
    "a pickle": Bad(422, UNKNOWN, image(b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00\x8c\x01x\x94."), IMAGE),
    "nothing": Bad(422, UNKNOWN, image(b""), IMAGE),
    "a signature alone": Bad(422, UNKNOWN, image(GOOD_PNG[:8]), IMAGE),
    "a PNG of no pixels": Bad(422, UNKNOWN, image(declared_png(0, 0)), IMAGE),
    "a PNG that is cut off": Bad(422, "broken image", image(GOOD_PNG[:-30]), IMAGE),
    "a JPEG that is cut off": Bad(422, "broken image", image(GOOD_JPEG[:-200]), IMAGE),
    "a PNG without its pixels": Bad(422, "broken image", image(declared_png(4000, 4000)), IMAGE),
    "a decompression bomb": Bad(422, "over the limit of 64000000", image(BOMB), IMAGE),
    "a PNG that says it is a little too large": Bad(
        422, "the picture is over the limit of 64000000 pixels", image(declared_png(8100, 8000)), IMAGE
    ),
    "a file that is too large": Bad(422, f"over the limit of {MAX_IMAGE_BYTES} bytes", image(bytes(2**21 + 99)), IMAGE),
    "an image that is too thin": Bad(422, "aspect ratios up to 200", image(png(1, 201)), IMAGE),
    "an image that is too wide": Bad(422, "4100 x 20 pixels; the model takes", image(png(4100, 20)), IMAGE),
    "no base64": Bad(422, "neither an http(s) URL nor base64", {"input": ["x", {"image": "what is this?"}]}, IMAGE),
    "a signature in the URL-safe alphabet": Bad(422, UNKNOWN, {"input": ["x", {"image": "iVBORw0KGgo_-_8="}]}, IMAGE),
    "base64 with a wrong character": Bad(
        422, "character 5 (white space not counted) is '!'", {"input": ["x", {"image": "iV BO!w0K"}]}, IMAGE
    ),
    "base64 that is cut off": Bad(422, "its end is missing", {"input": ["x", {"image": "iVBOR"}]}, IMAGE),
    "base64 beyond ASCII": Bad(422, "nor base64", {"input": ["x", {"image": "ïVBÖRw=="}]}, IMAGE),
    "a path": Bad(422, "nor base64", {"input": ["x", {"image": "/etc/passwd.png"}]}, IMAGE),
    "a data URI without base64": Bad(422, "must be base64", {"input": ["x", {"image": "data:image/png,abc"}]}, IMAGE),
    "a data URI without an end": Bad(
        422, "must be base64", {"input": ["x", {"image": "data:image/png;base64"}]}, IMAGE
    ),
    "an empty data URI": Bad(422, UNKNOWN, {"input": ["x", {"image": "data:image/png;base64,"}]}, IMAGE),
    "a bare data URI without base64": Bad(422, '{"text": ...}', {"input": ["x", "data:image/png,abc"]}, IMAGE),
    "a bare data URI of a text": Bad(422, UNKNOWN, {"input": ["x", " DATA:text/plain;base64,aGFsbG8="]}, IMAGE),
    "a bare data URI of nothing": Bad(422, "must be base64", {"input": ["x", "data:,"]}, IMAGE),
    "a text as image": Bad(422, "nor base64", {"input": ["x", "what is this?"], "modality": "image"}, "input[0].image"),
    "a data URI with a URL": Bad(
        422, "nor base64", {"input": ["x", {"image": "data:;base64,http://10.0.0.1/"}]}, IMAGE
    ),
}


def pdf(content: bytes, **fields: object) -> dict[str, Any]:
    return {"input": ["fine", {"pdf": base64.b64encode(content).decode(), **fields}]}


PDF = "input[1].pdf"
BOOK = pdf_files.book(3)
PDFS = {
    "a PDF that is a number": Bad(422, "input[1].pdf must be a string", {"input": ["x", {"pdf": 5}]}, PDF),
    "a PDF that is a text": Bad(422, "nor base64 of a PDF file", {"input": ["x", {"pdf": "what is this?"}]}, PDF),
    "a PDF that is a path": Bad(422, "nor base64", {"input": ["x", {"pdf": "/etc/passwd.pdf"}]}, PDF),
    "a data URI without base64 as PDF": Bad(
        422, "data:application/pdf;base64,...", {"input": ["x", {"pdf": "data:application/pdf,abc"}]}, PDF
    ),
    "a PDF and a text": Bad(422, "has text and pdf", {"input": ["x", {"text": "y", "pdf": "z"}]}, "input[1]"),
    "a PDF and an image": Bad(422, "has image and pdf", {"input": ["x", {"image": "y", "pdf": "z"}]}, "input[1]"),
    "a PDF with a password": Bad(422, "has only pdf and pages", pdf(BOOK, key="x"), "input[1]"),
    "pages of an image": Bad(422, "has pages", {"input": ["x", {"image": "y", "pages": "1"}]}, "input[1]"),
    "an image as PDF": Bad(422, "input[1].pdf is not a PDF file", pdf(GOOD_PNG), PDF),
    "a PDF whose references lead nowhere": Bad(422, "is a broken PDF file", pdf(BOOK.replace(b" obj", b" job")), PDF),
    "an encrypted PDF": Bad(422, "is encrypted and needs a password", pdf(pdf_files.encrypted(b"secret")), PDF),
    "two PDFs of too many pages": Bad(
        422,
        f"{MAX_PDF_PAGES - 1} pages are requested, and 3 of earlier files",
        {"input": [*pdf(BOOK)["input"], *pdf(pdf_files.book(MAX_PDF_PAGES - 1))["input"]]},
        "input[3].pdf",
    ),
    "a PDF that spins": Bad(422, f"over {PDF_TIMEOUT_S} s of processor time", pdf(pdf_files.spinning()), PDF),
    "a PDF that crashes the renderer": Bad(422, f"over {PDF_MEMORY_BYTES} bytes", pdf(pdf_files.crashing()), PDF),
    "a PDF that is too large": Bad(
        422, f"over the limit of {MAX_IMAGE_BYTES} bytes", pdf(bytes(MAX_IMAGE_BYTES + 1)), PDF
    ),
    "PDFs that are too large together": Bad(
        422,
        f"the PDF files of the request have over {MAX_IMAGE_BYTES} bytes together",
        {"input": pdf(BOOK + bytes(MAX_IMAGE_BYTES // 2))["input"] * 2},
        "input[3].pdf",
    ),
    "a range behind the last": Bad(422, "at page 9; the last page is 3", pdf(BOOK, pages="1-2,9-"), "input[1].pages"),
    "pages of 40,000 characters": Bad(
        422, "at most 20000 are read", pdf(BOOK, pages="1" + " " * 40_000 + "1"), "input[1].pages"
    ),
    "a PDF among late chunks": Bad(422, "an image or PDF", pdf(BOOK) | {"late_chunking": True}, "late_chunking"),
    "a private URL of a PDF": Bad(
        422, "leads to an address that is not public", {"input": ["x", {"pdf": "http://10.0.0.1/x.pdf"}]}, PDF
    ),
    "a URL of a PDF that is not there": Bad(422, "status 404", {"input": ["x", {"pdf": f"{SITE}/nothing"}]}, PDF),
    "a URL of a page as PDF": Bad(422, "is not a PDF file", {"input": ["x", {"pdf": f"{SITE}/page.html"}]}, PDF),
    "a URL of a large PDF": Bad(422, f"limit of {MAX_IMAGE_BYTES}", {"input": ["x", {"pdf": f"{SITE}/large"}]}, PDF),
}

PRIVATE = "leads to an address that is not public"
UNREACHED = "the URL cannot be fetched"


def url(address: str) -> dict[str, Any]:
    return {"input": ["fine", {"image": address}]}


URLS = {
    **{
        address: Bad(422, PRIVATE, url(address), IMAGE)
        for address in (
            "http://127.0.0.2/x.png", "http://127.1.2.3:8001/health", "http://10.0.0.1/x.png", "http://0.0.0.0/",
            "http://169.254.169.254/latest/meta-data/", "http://[::1]/", "https://[::1]/", "http://[fd00::1]/",
            "http://[::ffff:a9fe:a9fe]/", "http://localhost/x.png", "HTTP://LOCALHOST:8001/x.png",
            "http://127.0.0.1@127.0.0.2/", "http://user:word@10.0.0.1/", "http://169。254。169。254/",
            "http://\uff11\uff16\uff19.254.169.254/latest/meta-data/",
        )
    },
    **{
        # Either answer is right: how a resolver reads these is its own affair.
        f"{address} in another spelling": Bad(422, "the URL", url(address), IMAGE)
        for address in (
            "http://2130706434/", "http://0x7f.0.0.2/", "http://0177.0.0.2/", "http://127.2/", "http://localhost./"
        )
    },
    **{
        address: Bad(422, "only http and https", url(address), IMAGE)
        for address in (
            "file:///etc/passwd", "FILE:///etc/passwd", "ftp://127.0.0.1/x.png", "gopher://127.0.0.1/", "s3://bucket/x"
        )
    },
    **{
        address: Bad(422, UNREACHED, url(address), IMAGE)
        for address in (
            "http://", "http:///x.png", "http://[nonsense/", "http://127.0.0.1:1/", "http://127.0.0.1:99999/",
            "http://127.0.0.1:port/", "http://a..b/", f"http://{'a' * 300}/", "http://nothing.invalid/x.png",
            "http://127.0.0.1\r\nhost: x/",
        )
    },
    "https where there is none": Bad(422, UNREACHED, url(SITE.replace("http:", "https:") + "/x"), IMAGE),
    "a redirect to 127.0.0.2": Bad(422, PRIVATE, url(f"{SITE}/to/http://127.0.0.2/x.png"), IMAGE),
    "a redirect to metadata": Bad(422, PRIVATE, url(f"{SITE}/to/http://169.254.169.254/latest/"), IMAGE),
    "a redirect to localhost": Bad(422, PRIVATE, url(f"{SITE}/to/http://localhost/"), IMAGE),
    "a redirect without a scheme": Bad(422, PRIVATE, url(f"{SITE}/to///10.0.0.1/"), IMAGE),
    "a redirect to a mapped address": Bad(422, PRIVATE, url(f"{SITE}/to/http://[::ffff:127.0.0.1]/"), IMAGE),
    "a redirect to an address in wide digits": Bad(
        422, PRIVATE, url(f"{SITE}/to/http://\uff11\uff12\uff17.0.0.2/"), IMAGE
    ),
    "a long URL": Bad(422, "at most 16384 are fetched", url("http://site.example/" + "x" * 20_000), IMAGE),
    "a redirect to a file": Bad(422, UNREACHED, url(f"{SITE}/to/file:///etc/passwd"), IMAGE),
    "a redirect by two steps": Bad(422, PRIVATE, url(f"{SITE}/to/{SITE}/to/http://10.0.0.1/"), IMAGE),
    "a redirect to itself": Bad(422, "more than 5 redirects", url(f"{SITE}/loop"), IMAGE),
    "six redirects": Bad(422, "more than 5 redirects", url(f"{SITE}/hops/6/{IMAGES[0].name}"), IMAGE),
    "status 404": Bad(422, "the URL answered with status 404", url(f"{SITE}/nothing"), IMAGE),
    "status 500": Bad(422, "the URL answered with status 500", url(f"{SITE}/status/500"), IMAGE),
    "status 204": Bad(422, "the URL answered with status 204", url(f"{SITE}/status/204"), IMAGE),
    "status 302 to nowhere": Bad(422, "the URL answered with status 302", url(f"{SITE}/status/302"), IMAGE),
    "a page": Bad(422, UNKNOWN, url(f"{SITE}/page.html"), IMAGE),
    "an empty file": Bad(422, UNKNOWN, url(f"{SITE}/empty"), IMAGE),
    "a bomb": Bad(422, "over the limit of 64000000", url(f"{SITE}/bomb.png"), IMAGE),
    "a large file": Bad(422, f"over the limit of {MAX_IMAGE_BYTES} bytes", url(f"{SITE}/large"), IMAGE),
    "a file without end": Bad(422, f"over the limit of {MAX_IMAGE_BYTES} bytes", url(f"{SITE}/endless"), IMAGE),
    "a file that breaks off": Bad(422, UNREACHED, url(f"{SITE}/broken"), IMAGE),
    "no answer": Bad(422, f"not fetched within {FETCH_TIMEOUT_S} s", url(f"{SITE}/slow"), IMAGE),
    "an answer by drops": Bad(422, f"not fetched within {FETCH_TIMEOUT_S} s", url(f"{SITE}/drip"), IMAGE),
}  # fmt: skip

HEADERS = {
    "a compressed body": Bad(
        415, "the body is encoded as deflate", zlib.compress(b'{"input": "x"}'), headers={"content-encoding": "deflate"}
    ),
    "two encodings of tensors": Bad(
        422,
        "a safetensors body has one embedding_type",
        {"input": "x", "embedding_type": ["float", "int8"]},
        "embedding_type",
        {"accept": "application/x-safetensors"},
    ),
    "a dtype of tensors that is not offered": Bad(
        406,
        "dtype=bfloat16 is not offered; choose float32 or float16",
        {"input": "x"},
        None,
        {"accept": "application/x-safetensors; dtype=bfloat16"},
    ),
    **{
        f"a body of {kind}": Bad(
            415, "send application/json", b'{"input": "x"}', "content-type", {"content-type": kind}
        )
        for kind in (
            "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "",
            "application/octet-stream", "application/vnd.api+json", "application/jsonp", "/",
        )
    },
}  # fmt: skip

# Of the other routes: what is found when an item is read.
OTHERS = {
    "/v2/embed": {
        "NONE and 33k tokens": Bad(400, "texts[1] has 33003", SEARCH | {"texts": ["x", LONG], "truncate": "NONE"}),
        "an image that is none": Bad(422, "images[1] is neither", {"images": [IMAGES_BASE64[0], "what?"]}),
        "a private URL": Bad(422, PRIVATE, {"images": ["http://10.0.0.1/x.png"]}),
    },
    "/v1/rerank": {
        "a broken image as query": Bad(422, "neither an http", RANK | {"query": {"image": "what?"}}, "query.image"),
        "a query of 33k tokens": Bad(400, "query has 33003 tokens", RANK | {"query": LONG}, "query"),
        "a broken image among documents": Bad(
            422, "is not an image", RANK | {"documents": ["a", {"image": "AAAA"}]}, "documents[1].image"
        ),
        "a private URL": Bad(422, PRIVATE, RANK | {"documents": [{"image": "http://10.0.0.1/x.png"}]}),
        "a document of 33k tokens": Bad(
            400, "documents[1] has 33003", RANK | {"documents": ["a", LONG]}, "documents[1]"
        ),
    },
    "/v1/score": {
        "a broken image": Bad(422, "is not an image", {"text_1": {"image": "AAAA"}, "text_2": "a"}, "text_1.image"),
        "a long document": Bad(400, "data_2[1] has 33003", {"data_1": "q", "data_2": ["a", LONG]}, "data_2[1]"),
    },
}
COHERE_SHAPED = {"/v2/embed": COHERE | OTHERS["/v2/embed"], "/v2/rerank": RANKINGS | OTHERS["/v1/rerank"]}
OURS = {"/v1/rerank": RANKINGS | OTHERS["/v1/rerank"], "/v1/score": PAIRS | OTHERS["/v1/score"]}
TABLES = (EMBEDDINGS, LONG_TEXTS, OF_PARTS, BAD_IMAGES, PDFS, URLS, HEADERS)
TABLE = {name: bad for table in TABLES for name, bad in table.items()}


def rows_of(tables: dict[str, dict[str, Bad]]) -> list[Any]:
    return [pytest.param(path, bad, id=f"{path} {name}") for path, rows in tables.items() for name, bad in rows.items()]


@pytest.mark.parametrize("bad", TABLE.values(), ids=TABLE.keys())
def test_bad_input_is_named(bad: Bad, wire: Wire, site: Site) -> None:
    content = bad.content.replace(SITE.encode(), site.url.encode()).replace(
        b"https://site", site.url.replace("http", "https").encode()
    )
    answer = wire.post(content=content, **bad.headers)
    assert_refused(answer, bad.status, bad.message, bad.param)


@pytest.mark.parametrize(("path", "bad"), rows_of(OURS))
def test_bad_input_of_a_ranking_is_named(path: str, bad: Bad, wire: Wire) -> None:
    answer = wire.http.post(path, content=bad.content, headers={"content-type": "application/json"})
    assert_refused(answer, bad.status, bad.message, bad.param)


@pytest.mark.parametrize(("path", "bad"), rows_of(COHERE_SHAPED))
def test_bad_input_of_coheres_form_is_named_in_coheres_shape(path: str, bad: Bad, wire: Wire) -> None:
    answer = wire.http.post(path, content=bad.content, headers={"content-type": "application/json"})
    assert answer.status_code == bad.status, answer.text
    body = answer.json()
    assert body.keys() == {"id", "message"}
    assert body["id"] == answer.headers["x-request-id"]
    assert bad.message in body["message"]
    assert not LEAKS.search(body["message"])


def test_no_row_of_the_tables_takes_the_place_of_another() -> None:
    assert len(TABLE) == sum(map(len, TABLES))


ROUTES = (
    "/", "/pooling", "/v1/pooling", "/v1/embed", "/v2/embed/", "/score", "/v1/score/", "/rerank", "/v1/rerank/",
    "/v2/rerank/", "/classify", "/tokenize", "/detokenize", "/tokenizer_info", "/invocations",
    "/inference/v1/generate", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages",
    "/v1/audio/transcriptions", "/v1/load_lora_adapter", "/v1/models/jina-embeddings-v4-retrieval", "/ping", "/load",
    "/server_info", "/sleep", "/wake_up", "/reset_mm_cache", "/reset_prefix_cache", "/collective_rpc",
    "/start_profile", "/redoc", "/docs/oauth2-redirect", "/static", "/static/", "/static/swagger-ui-bundle.js.map",
    "/static/../docs", "/v1/embeddings/", "/v1//embeddings", "//v1/embeddings", "/V1/EMBEDDINGS", "/v1/embeddings%2f",
    "/v1/embeddings;x", "/embeddings", "/%2e%2e/etc/passwd", "/.env", "/metrics/", "/health/x",
)  # fmt: skip


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("path", ROUTES)
def test_a_route_that_nobody_asked_for_is_not_there(path: str, method: str, wire: Wire) -> None:
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 14\r\n"
    status, content = raw(wire, head.encode() + b'Connection: close\r\n\r\n{"input": "x"}')
    assert (status, json.loads(content)["error"]["code"]) == (404, "NOT_FOUND")


METHODS = [
    *(("/v1/embeddings", method) for method in ("GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW")),
    *((path, "POST") for path in ("/health", "/ready", "/metrics", "/version", "/v1/models", "/docs", "/openapi.json")),
]


@pytest.mark.parametrize(("path", "method"), METHODS)
def test_another_method_is_refused(path: str, method: str, wire: Wire) -> None:
    if method == "BREW":  # not HTTP's: the parser knows it or does not
        assert wire.http.request(method, path).status_code in (400, 405)
        return
    answer = wire.http.request(method, path, headers={"origin": "http://evil.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]
    if method == "HEAD":
        assert (answer.status_code, answer.content) == (405, b"")
        return
    assert_refused(answer, 405, f"{path} accepts ")


def test_a_refused_method_is_told_the_allowed_ones(wire: Wire) -> None:
    assert wire.http.get("/v1/embeddings").headers["allow"] == "POST"


def raw(wire: Wire, content: bytes, timeout_s: float = 60) -> tuple[int, bytes]:
    """Send bytes and return status and body of the answer; (0, b"") for a connection that is closed without one."""
    host, port = wire.base_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout_s) as connection:
        answer = b""
        try:
            connection.sendall(content)
            while part := connection.recv(65536):
                answer += part
                head, found, body = answer.partition(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: (\d+)", head)
                if found and length and len(body) >= int(length[1]):
                    break
        except (ConnectionError, TimeoutError):
            pass
    status = re.match(rb"HTTP/1\.1 (\d+)", answer)
    return (int(status[1]) if status else 0, answer.partition(b"\r\n\r\n")[2])


HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


def error_of(content: bytes) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(content)["error"]
    return error


@pytest.mark.parametrize("sent", [b"", b'{"input": "x'], ids=["nothing", "a part"])
def test_a_body_that_does_not_come_is_given_up(sent: bytes, wire: Wire) -> None:
    status, content = raw(wire, HEAD + b"Content-Length: 1000\r\n\r\n" + sent)
    assert (status, error_of(content)["code"]) == (408, "BODY_TOO_SLOW")
    assert f"within {BODY_TIMEOUT_S} s" in error_of(content)["message"]


def test_a_body_that_comes_by_drops_is_given_up(wire: Wire) -> None:
    start = time.monotonic()
    host, port = wire.base_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 20) as connection:
        connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
        connection.settimeout(0.2)
        answer = b""
        while b"\r\n\r\n" not in answer and time.monotonic() - start < PATIENCE_S:
            connection.sendall(b" ")
            try:
                answer += connection.recv(65536)
            except TimeoutError:
                continue
    assert b" 408 " in answer.partition(b"\r\n")[0]


def test_a_length_over_the_limit_is_refused_at_once(wire: Wire) -> None:
    for length in (MAX_BODY_BYTES + 1, 10**18):
        status, content = raw(wire, HEAD + f"Content-Length: {length}\r\n\r\n{{".encode())
        assert (status, error_of(content)["code"]) == (413, "BODY_TOO_LARGE")
        assert f"limit of {MAX_BODY_BYTES} bytes" in error_of(content)["message"]


def test_chunks_over_the_limit_are_refused(wire: Wire) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'{"input": "'
        for _ in range(MAX_BODY_BYTES // 2**16 + 1):
            yield b"x" * 2**16

    answer = wire.http.post("/v1/embeddings", content=chunks(), headers={"content-type": "application/json"})
    assert_refused(answer, 413, f"the body is over the limit of {MAX_BODY_BYTES} bytes")


def test_a_body_at_the_limit_is_read(wire: Wire) -> None:
    body = b'{"input": "x", "dimensions": 0}'
    answer = wire.post(content=body + b" " * (MAX_BODY_BYTES - len(body)))
    assert_refused(answer, 422, "dimensions=0 is not offered")
    assert_refused(wire.post(content=body + b" " * (MAX_BODY_BYTES - len(body) + 1)), 413, "over the limit")


GARBAGE = {
    "no HTTP": b"GARBAGE\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
    "NUL": bytes(1000) + b"\r\n\r\n",
    "no version": b"POST /v1/embeddings\r\n\r\n",
    "a negative length": HEAD + b"Content-Length: -1\r\n\r\n",
    "a length in words": HEAD + b"Content-Length: many\r\n\r\n",
    "two lengths": HEAD + b'Content-Length: 14\r\nContent-Length: 20\r\n\r\n{"input": "x"}',
    "length and chunks": HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a chunk of nonsense": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nxx\r\n0\r\n\r\n",
    "a header without a colon": HEAD + b"nonsense\r\n\r\n",
    "a header of a megabyte": HEAD + b"X: " + b"x" * 2**20 + b"\r\n\r\n",
    "a line of a megabyte": b"GET /" + b"x" * 2**20 + b" HTTP/1.1\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "an upgrade": b"GET /v1/embeddings HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE.keys())
def test_what_is_no_http_gets_no_vector_and_does_no_harm(content: bytes, wire: Wire) -> None:
    status, answer = raw(wire, content, timeout_s=5)
    print(status, answer[:100])
    assert status == 0 or 400 <= status < 500
    assert b"Traceback" not in answer
    assert wire.post({"input": "x"}).status_code == 200


@pytest.mark.parametrize("at", [0, 3, 9])
@pytest.mark.parametrize(
    "bad", [5, {"image": "AAAA"}, {"image": f"{SITE}/nothing"}, LONG], ids=["type", "image", "URL", "length"]
)
def test_one_bad_item_among_good_ones_is_named_and_nothing_is_answered(
    bad: Any, at: int, wire: Wire, site: Site
) -> None:
    items: list[Any] = [f"text {i}" for i in range(5)] + [{"image": IMAGES_BASE64[3]} for _ in range(4)]
    items.insert(at, json.loads(json.dumps(bad).replace(SITE, site.url)))
    answer = wire.post({"input": items})
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["param"] in (f"input[{at}]", f"input[{at}].image")
    assert f"input[{at}]" in answer.json()["error"]["message"]
    assert "data" not in answer.json()


def test_of_several_bad_items_one_is_named(wire: Wire) -> None:
    answer = wire.post({"input": ["x", {"image": "AAAA"}, LONG, {"image": "http://10.0.0.1/"}]})
    assert answer.json()["error"]["param"] in ("input[1].image", "input[2]", "input[3].image")


def test_a_bare_data_uri_is_never_embedded_as_a_text(wire: Wire) -> None:
    """haystack's JinaDocumentImageEmbedder sends its images so; as a text each would give a plausible wrong vector."""
    answer = wire.post({"input": [f"data:image/png;base64,{base64.b64encode(GOOD_PNG).decode()}"]})
    as_image = wire.ask({"input": [{"image": base64.b64encode(GOOD_PNG).decode()}]})
    assert answer.status_code == 422 or answer.json()["usage"] == as_image["usage"]


def test_no_address_was_asked_that_is_not_allowed(wire: Wire, site: Site) -> None:
    """A second site on an address that is not on the list hears nothing, by itself or by a redirect."""
    with socket.create_server(("127.0.0.2", 0)) as listener:
        listener.settimeout(0.5)
        port = listener.getsockname()[1]
        for address in (
            f"http://127.0.0.2:{port}/",
            f"{site.url}/to/http://127.0.0.2:{port}/",
            f"http://0x7f000002:{port}/",
        ):
            assert wire.post(url(address)).status_code == 422
        with pytest.raises(TimeoutError):
            listener.accept()


def test_after_all_of_this_the_golden_rows_are_unchanged(wire: Wire, golden: Golden) -> None:
    assert wire.http.get("/ready").status_code == 200
    difference = wire.golden_difference(golden)
    print(f"largest difference: {difference:.1e}")
    assert difference <= BOUND
