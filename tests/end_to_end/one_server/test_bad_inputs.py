"""What a server says to bad input: the status and the message of each, and that nothing else is harmed by it."""

import base64
import io
import json
import re
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pdf_files
import pytest
from conftest import Golden
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
    MAX_ITEMS,
    MAX_LENGTH,
    MAX_PDF_PAGES,
    PDF_MEMORY_BYTES,
    PDF_TIMEOUT_S,
    Site,
    Wire,
    assert_refused,
    opened_site,
)

SITE = "http://site"  # stands for the address of the site below
LONG = "a b " * 8_250  # 33,000 tokens and the prefix's


@dataclass(frozen=True)
class Bad:
    """A bad request and what the server says to it; `body` is JSON, or the bytes themselves."""

    status: int
    message: str
    body: Any = None
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


def png(width: int, height: int, color: str = "red") -> bytes:
    return saved(Image.new("RGB", (width, height), color), "PNG")


def saved(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


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
GOOD_JPEG = saved(Image.new("RGB", (64, 64), "blue"), "JPEG")
BOMB = declared_png(30_000, 30_000)
FILES = {
    **{path.name: path.read_bytes() for path in IMAGES},
    "empty": b"",
    "page.html": b"<html><body>Welcome</body></html>",
    "large": bytes(MAX_IMAGE_BYTES + 1),
    "spin.pdf": pdf_files.spinning(),
    "bomb.png": BOMB,
}


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with opened_site(FILES) as site:
        yield site


NOT_JSON = "the body is not JSON"
JSON = {
    "an empty body": Bad(400, NOT_JSON, b""),
    "white space": Bad(400, NOT_JSON, b" \n"),
    "an open brace": Bad(400, NOT_JSON, b"{"),
    "an unfinished string": Bad(400, NOT_JSON, b'{"input": "x'),
    "an unfinished body": Bad(400, NOT_JSON, b'{"input": ["a", "b"'),
    "a trailing comma": Bad(400, NOT_JSON, b'{"input": "x",}'),
    "single quotes": Bad(400, NOT_JSON, b"{'input': 'x'}"),
    "no quotes": Bad(400, NOT_JSON, b"{input: 1}"),
    "a comment": Bad(400, NOT_JSON, b'{"input": "x" /* why */}'),
    "something after the end": Bad(400, NOT_JSON, b'{"input": "x"} x'),
    "two bodies": Bad(400, NOT_JSON, b'{"input": "x"}{"input": "x"}'),
    "form data": Bad(400, NOT_JSON, b"input=x"),
    "a raw control character": Bad(400, NOT_JSON, b'{"input": "\x00"}'),
    "an unknown escape": Bad(400, NOT_JSON, b'{"input": "\\x41"}'),
    "half an escape": Bad(400, NOT_JSON, b'{"input": "\\u00"}'),
    "a lone high surrogate": Bad(400, NOT_JSON, b'{"input": "a\\ud800b"}'),
    "a lone low surrogate": Bad(400, NOT_JSON, b'{"input": "a\\udc00b"}'),
    "surrogates the wrong way round": Bad(400, NOT_JSON, b'{"input": "\\udc00\\ud800"}'),
    "a surrogate in a name": Bad(400, NOT_JSON, b'{"input": "x", "\\ud800": 1}'),
    "half an emoji among texts": Bad(400, NOT_JSON, b'{"input": ["x", "y", "z", "a\\ud83d"]}', "input[3]"),
    "half an emoji in an item": Bad(400, NOT_JSON, b'{"input": ["x", {"text": "\\ude00"}]}', "input[1].text"),
    "half an emoji as UTF-8": Bad(400, NOT_JSON, b'{"input": ["x", "\xed\xa0\xbd"]}', "input[1]"),
    "a number of 5,000 digits": Bad(400, NOT_JSON, b'{"input": "x", "dimensions": ' + b"9" * 5000 + b"}"),
    "a surrogate as UTF-8": Bad(400, NOT_JSON, b'{"input": "\xed\xa0\x80"}'),
    "no UTF-8": Bad(400, NOT_JSON, b'{"input": "\xff"}'),
    "overlong UTF-8": Bad(400, NOT_JSON, b'{"input": "\xc0\xaf"}'),
    "Latin-1": Bad(400, NOT_JSON, '{"input": "é"}'.encode("latin-1")),
    "UTF-16": Bad(400, NOT_JSON, '{"input": "x"}'.encode("utf-16")),
    "a byte order mark": Bad(400, NOT_JSON, b'\xef\xbb\xbf{"input": "x"}'),
    "compressed": Bad(
        415, "the body is encoded as deflate", zlib.compress(b'{"input": "x"}'), headers={"content-encoding": "deflate"}
    ),
    "deep lists": Bad(400, NOT_JSON, b"[" * 100_000),
    "deep objects": Bad(400, NOT_JSON, b'{"input":' * 100_000),
    "deep lists in a field": Bad(400, NOT_JSON, b'{"input": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
    "deep lists in an unknown field": Bad(400, NOT_JSON, b'{"input": "x", "y": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
    "a list": Bad(400, "the body is JSON, but not an object", ["x"]),
    "a string": Bad(400, "the body is JSON, but not an object", "x"),
    "a number": Bad(400, "the body is JSON, but not an object", 5),
    "null": Bad(400, "the body is JSON, but not an object", b"null"),
    "NaN": Bad(400, "the body is JSON, but not an object", b"NaN"),
}

TYPES = {
    **{
        f"{name} {json.dumps(value)}": Bad(422, f"{name}={shown} is not offered", {"input": "x", name: value}, name)
        for name, value, shown in (
            ("model", 5, "5"),
            ("model", ["jina-embeddings-v4"], "['jina-embeddings-v4']"),
            ("task", 5, "5"),
            ("task", {}, "{}"),
            ("task", "", ""),
            ("task", "classification", "classification"),
            ("task", "retrieval.document", "retrieval.document"),
            ("task", "text-matching.query", "text-matching.query"),
            ("task", "RETRIEVAL", "RETRIEVAL"),
            ("prompt_name", "document", "document"),
            ("prompt_name", "Query", "Query"),
            ("prompt_name", True, "True"),
            ("input_type", "image", "image"),
            ("input_type", 0, "0"),
            ("dimensions", "128", "128"),
            ("dimensions", 128.0, "128.0"),
            ("dimensions", 128.5, "128.5"),
            ("dimensions", True, "True"),
            ("dimensions", [128], "[128]"),
            ("return_multivector", "yes", "yes"),
            ("return_multivector", 1, "1"),
            ("pool_factor", 0, "0"),
            ("pool_factor", "2", "2"),
            ("pool_factor", 1.5, "1.5"),
            ("pool_factor", True, "True"),
            ("late_chunking", "true", "true"),
            ("late_chunking", 0, "0"),
            ("truncate", "START", "START"),
            ("truncate", 1, "1"),
            ("max_length", 0, "0"),
            ("max_length", -1, "-1"),
            ("max_length", "16", "16"),
            ("max_length", True, "True"),
            ("max_length", 16.5, "16.5"),
            ("max_pixels", 3135, "3135"),
            ("max_pixels", -(2**70), str(-(2**70))),
            ("max_pixels", "602112", "602112"),
            ("outputs", "dense", "dense"),
            ("outputs", {"dense": True}, "{'dense': True}"),
            ("embedding_type", 5, "5"),
            ("embedding_type", {"float": True}, "{'float': True}"),
        )
    },
    **{
        f"{name} {value}": Bad(422, "is not offered", {"input": "x", name: value}, f"{name}[{at}]")
        for name, value, at in (
            ("embedding_type", "int4", 0),
            ("embedding_type", ["float", "int4"], 1),
            ("embedding_type", [None], 0),
            ("encoding_format", "hex", 0),
            ("encoding_format", ["FLOAT"], 0),
            ("outputs", ["sparse"], 0),
            ("outputs", ["dense", 1], 1),
        )
    },
    **{
        f"dimensions {value}": Bad(
            422,
            f"dimensions={value} is not offered; choose 1 to 256",
            {"input": "x", "dimensions": value},
            "dimensions",
        )
        for value in (-128, -1, 0, 257, 300, 2048, 10**30)
    },
    "dimensions NaN": Bad(422, "dimensions=nan is not offered", b'{"input": "x", "dimensions": NaN}', "dimensions"),
    "dimensions 1e400": Bad(422, "dimensions=inf is not offered", b'{"input": "x", "dimensions": 1e400}', "dimensions"),
    "max_length over the limit": Bad(
        422, f"choose 1 to {MAX_LENGTH}", {"input": "x", "max_length": MAX_LENGTH + 1}, "max_length"
    ),
    "max_length 2^63": Bad(422, f"choose 1 to {MAX_LENGTH}", {"input": "x", "max_length": 2**63}, "max_length"),
    "max_pixels over the limit": Bad(422, "choose 3136 to 602112", {"input": "x", "max_pixels": 602_113}, "max_pixels"),
    "no encoding": Bad(422, "embedding_type is empty", {"input": "x", "embedding_type": []}, "embedding_type"),
    "no output": Bad(422, "outputs is empty", {"input": "x", "outputs": []}, "outputs"),
    "a huge value is shortened": Bad(422, "...", {"input": "x", "task": "y" * 100_000}, "task"),
    "a value with control characters": Bad(422, "task=?[31m? is not", {"input": "x", "task": "\x1b[31m\n"}, "task"),
}

TOKENS = "has token ids: they are another tokenizer's"
ITEM = 'is a text, {"text": ...}, {"image": ...} or {"pdf": ...}'
EITHER = "send exactly one of text, image and pdf"
INPUTS = {
    "no input": Bad(422, "input is required", {"model": "jina-embeddings-v4"}, "input"),
    "input null": Bad(422, "input is required", {"input": None}, "input"),
    "input a number": Bad(422, "input is a text, an item or a list", {"input": 5}, "input"),
    "input true": Bad(422, "input is a text, an item or a list", {"input": True}, "input"),
    "no items": Bad(422, "input is empty", {"input": []}, "input"),
    "an empty item": Bad(422, EITHER, {"input": {}}, "input"),
    "an item of nulls": Bad(422, EITHER, {"input": ["x", {"text": None, "image": None}]}, "input[1]"),
    "an item of other fields": Bad(422, EITHER, {"input": ["x", {"contents": "y"}]}, "input[1]"),
    "an item that is null": Bad(422, ITEM, {"input": ["x", None]}, "input[1]"),
    "an item that is a float": Bad(422, ITEM, {"input": ["x", 1.5]}, "input[1]"),
    "an item that is a list of texts": Bad(422, ITEM, {"input": ["x", ["y"]]}, "input[1]"),
    "token ids": Bad(422, TOKENS, {"input": [1, 2, 3]}, "input[0]"),
    "lists of token ids": Bad(422, TOKENS, {"input": [[1, 2], [3]]}, "input[0]"),
    "an item that is true": Bad(422, ITEM, {"input": [True]}, "input[0]"),
    "an item that is an empty list": Bad(422, ITEM, {"input": [[]]}, "input[0]"),
    "negative token ids": Bad(422, TOKENS, {"input": ["x", [-1]]}, "input[1]"),
    "a text that is a number": Bad(422, "input.text must be a string", {"input": {"text": 5}}, "input.text"),
    "a text that is a list": Bad(422, "must be a string", {"input": ["x", {"text": ["y"]}]}, "input[1].text"),
    "an image that is a number": Bad(422, "must be a string", {"input": [{"image": 5}]}, "input[0].image"),
    "an image as OpenAI's chat has it": Bad(
        422, "must be a string", {"input": [{"image": {"url": f"{SITE}/{IMAGES[0].name}"}}]}, "input[0].image"
    ),
    "text and image": Bad(422, "has text and image", {"input": {"text": "x", "image": "y"}}, "input"),
    "too many items": Bad(
        422, f"has {MAX_ITEMS + 1} items; at most {MAX_ITEMS} go", {"input": ["x"] * (MAX_ITEMS + 1)}, "input"
    ),
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
}

BOTH = "not trained to make one vector of both. Send them as two items, with a vector each, or send only an image"
PICTURE = {"type": "image_url", "image_url": {"url": IMAGES_BASE64[0]}}
WORDS = {"type": "text", "text": "x"}


def chat(*messages: object, **others: object) -> dict[str, Any]:
    return {"messages": list(messages), **others}


def user(content: object) -> dict[str, Any]:
    return {"role": "user", "content": content}


PARTS = {
    "a part of another type": Bad(
        422, "type=video_url is not offered; choose text", {"input": [{"content": [{"type": "video_url"}]}]}
    ),
    "a part without type": Bad(
        422, "type=None is not offered", {"input": {"content": [{"text": "x"}]}}, "input.content[0].type"
    ),
    "a part of a list as type": Bad(422, "is not offered", {"input": {"content": [{"type": ["text"]}]}}),
    "a part that is a number": Bad(422, "is a content part", {"input": {"content": [5]}}, "input.content[0]"),
    "a part without its text": Bad(
        422, "is of type text; send its text", {"input": {"content": [{"type": "text"}]}}, "input.content[0]"
    ),
    "a part of a file id": Bad(
        422, "has file_id", {"input": {"content": [{"type": "input_image", "file_id": "x"}]}}, "input.content[0]"
    ),
    "an image part of another": Bad(
        422, "has text", {"input": [{"type": "image_url", "image_url": "y", "text": "x"}]}, "input[0]"
    ),
    "a part with two contents": Bad(
        422, "send its text or value", {"input": {"content": [WORDS | {"value": "y"}]}}, "input.content[0]"
    ),
    "an image part without URL": Bad(
        422,
        "must be a string",
        {"input": {"content": [{"type": "image_url", "image_url": {}}]}},
        "input.content[0].image_url.url",
    ),
    "a text part of a number": Bad(
        422, "must be a string", {"input": {"content": [{"type": "text", "text": 5}]}}, "input.content[0].text"
    ),
    "a broken image in a part": Bad(
        422, "nor base64", {"input": [{"type": "input_image", "image_url": "what?"}]}, "input[0].image_url"
    ),
    "no parts": Bad(422, "list of one part", {"input": {"content": []}}, "input.content"),
    "content that is a number": Bad(422, "list of one part", {"input": ["x", {"content": 5}]}, "input[1].content"),
    "two texts in an item": Bad(422, "has 2 parts", {"input": {"content": [WORDS, WORDS]}}, "input.content"),
    "two images in an item": Bad(422, "has 2 parts", {"input": {"content": [PICTURE, PICTURE]}}, "input.content"),
    "text and image fused in content": Bad(422, BOTH, {"input": {"content": [WORDS, PICTURE]}}, "input.content"),
    "text and image fused in an item": Bad(422, BOTH, {"input": [{"text": "x", "image": "y"}]}, "input[0]"),
    "text and image fused in a chat": Bad(422, BOTH, chat(user([PICTURE, WORDS])), "messages[0].content"),
    "a text of type image": Bad(
        422, "read as text; send it as", {"input": [{"type": "image", "text": "x"}]}, "input[0].type"
    ),
    "an image of type text": Bad(
        422, "read as image; send it as", {"input": ["x", {"type": "text", "image": IMAGES_BASE64[0]}]}, "input[1].type"
    ),
    "a video": Bad(422, "read as text", {"input": ["x", {"type": "video_url", "content": "http://x/"}]}),
    "content and a role": Bad(422, "has role", {"input": [user("x")]}, "input[0]"),
    "input and messages": Bad(422, "input and messages", chat(user("x"), input="x"), "messages"),
    "messages a text": Bad(422, "messages is a list of messages", {"messages": "x"}, "messages"),
    "no messages": Bad(422, "messages is a list of messages", {"messages": []}, "messages"),
    "a message that is a text": Bad(422, "is a message", chat("x"), "messages[0]"),
    "a list among messages": Bad(422, "is a message", chat(user("x"), [user("y")]), "messages[1]"),
    "a message among chats": Bad(422, "is a list of messages", chat([user("x")], user("y")), "messages[1]"),
    "no user turn": Bad(422, "0 user turns", chat({"role": "system", "content": "x"}), "messages"),
    "two user turns": Bad(422, "2 user turns", chat(user("x"), user("y")), "messages"),
    "an assistant's turn": Bad(422, "role=assistant", chat(user("x"), {"role": "assistant", "content": "y"})),
    "a tool's turn": Bad(422, "role=tool", chat(user("x"), {"role": "tool", "content": ""}), "messages[1].role"),
    "no role": Bad(422, "role=None", chat({"content": "x"}), "messages[0].role"),
    "a call in a message": Bad(422, "has tool_calls", chat(user("x") | {"tool_calls": [1]}), "messages[0]"),
    "a user turn without content": Bad(422, "list of one part", chat(user(None)), "messages[0].content"),
    "an empty chat": Bad(422, "0 user turns", chat([user("x")], []), "messages[1]"),
    "too many chats": Bad(422, f"has {MAX_ITEMS + 1} chats", chat(*[[user("x")]] * (MAX_ITEMS + 1)), "messages"),
    "a template for a chat": Bad(422, "chat_template=", chat(user("x"), chat_template="{{ x }}"), "chat_template"),
    "33k tokens in a chat": Bad(400, "messages[0].content has 33003 tokens", chat(user(LONG)), "messages[0].content"),
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
    "a TGA, which is not on the list": Bad(422, UNKNOWN, image(saved(Image.new("RGB", (9, 9)), "TGA")), IMAGE),
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
        422, "8100 x 8000 pixels are over the limit of 64000000", image(declared_png(8100, 8000)), IMAGE
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
NO_PAGES = "input[1].pdf is a broken PDF file, or has no pages"
RANGES = 'must have ascending numbers and ranges from 1, such as "1-4,9" or "10-"'
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
    "HTML as PDF": Bad(422, "is not a PDF file", pdf(FILES["page.html"]), PDF),
    "an empty PDF": Bad(422, "is not a PDF file", pdf(b""), PDF),
    "a PDF's head alone": Bad(422, NO_PAGES, pdf(b"%PDF-1.7\n"), PDF),
    "a PDF that is cut off": Bad(422, NO_PAGES, pdf(BOOK[:60]), PDF),
    "a PDF of 0 pages": Bad(422, NO_PAGES, pdf(pdf_files.NO_PAGES), PDF),
    "a PDF without a catalogue": Bad(422, NO_PAGES, pdf(pdf_files.NO_CATALOGUE), PDF),
    "a PDF whose references lead nowhere": Bad(422, NO_PAGES, pdf(BOOK.replace(b" obj", b" job")), PDF),
    "an encrypted PDF": Bad(422, "is encrypted and needs a password", pdf(pdf_files.encrypted(b"secret")), PDF),
    "a PDF of 10,000 pages": Bad(
        422, f"10000 pages are requested; at most {MAX_PDF_PAGES} go into one", pdf(pdf_files.book(10_000)), PDF
    ),
    "two PDFs of too many pages": Bad(
        422,
        f"{MAX_PDF_PAGES - 1} pages are requested, and 3 of earlier files",
        {"input": [*pdf(BOOK)["input"], *pdf(pdf_files.book(MAX_PDF_PAGES - 1))["input"]]},
        "input[3].pdf",
    ),
    "a PDF with a bad page": Bad(422, "has a page 2 that cannot be rendered", pdf(pdf_files.ONE_BAD), PDF),
    "a PDF of a thin page": Bad(422, "aspect ratios up to 200", pdf(pdf_files.blank(90_000, 10)), PDF),
    "a PDF of a page without area": Bad(422, "less than a pixel", pdf(pdf_files.blank(0.2, 0.2)), PDF),
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
    "a page behind the last": Bad(
        422, "begins a range at page 4; the last page is 3", pdf(BOOK, pages="4"), "input[1].pages"
    ),
    "a range behind the last": Bad(422, "at page 9; the last page is 3", pdf(BOOK, pages="1-2,9-"), "input[1].pages"),
    **{
        f"pages {json.dumps(pages)}": Bad(422, RANGES, pdf(BOOK, pages=pages), "input[1].pages")
        for pages in (
            "",
            "0",
            "0-2",
            "3-1",
            "1,1",
            "2,1",
            "2-,3",
            "1-2,2",
            "-2",
            "1-2-3",
            "all",
            "1.5",
            "1;2",
            "1 2",
            "1-0",
            "1-4 9",
            1,
            [1],
        )
    },
    "pages of 40,000 characters": Bad(
        422, "at most 20000 are read", pdf(BOOK, pages="1" + " " * 40_000 + "1"), "input[1].pages"
    ),
    "a PDF among late chunks": Bad(422, "an image or PDF", pdf(BOOK) | {"late_chunking": True}, "late_chunking"),
    "a private URL of a PDF": Bad(
        422, "leads to an address that is not public", {"input": ["x", {"pdf": "http://10.0.0.1/x.pdf"}]}, PDF
    ),
    "a URL of a PDF that is not there": Bad(422, "status 404", {"input": ["x", {"pdf": f"{SITE}/nothing"}]}, PDF),
    "a URL of a page as PDF": Bad(422, "is not a PDF file", {"input": ["x", {"pdf": f"{SITE}/page.html"}]}, PDF),
    "a URL of a PDF that spins": Bad(422, "of processor time", {"input": ["x", {"pdf": f"{SITE}/spin.pdf"}]}, PDF),
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
            "http://127.0.0.2/x.png",
            "http://127.1.2.3:8001/health",
            "http://10.0.0.1/x.png",
            "http://172.16.0.1/",
            "http://192.168.0.1/",
            "http://169.254.169.254/latest/meta-data/",
            "http://100.64.0.1/",
            "http://0.0.0.0/",
            "http://224.0.0.1/",
            "http://255.255.255.255/",
            "http://[::1]/",
            "http://[::]/",
            "http://[::ffff:127.0.0.1]/",
            "http://[::ffff:a9fe:a9fe]/",
            "http://[64:ff9b::7f00:1]/",
            "http://[2002:7f00:1::]/",
            "http://[fe80::1]/",
            "http://[fd00::1]/",
            "https://[::1]/",
            "http://localhost/x.png",
            "HTTP://LOCALHOST:8001/x.png",
            "http://127.0.0.1@127.0.0.2/",
            "http://user:word@10.0.0.1/",
            "http://\uff11\uff16\uff19.254.169.254/latest/meta-data/",
            "http://169。254。169。254/",
            "http://①②⑦.0.0.2/",
            "http://[fec0::1]/",
            "http://[64:ff9b:1::7f00:1]/",
        )
    },
    **{
        # Either answer is right: how a resolver reads these is its own affair.
        f"{address} in another spelling": Bad(422, "the URL", url(address), IMAGE)
        for address in (
            "http://2130706434/",
            "http://0x7f.0.0.2/",
            "http://0177.0.0.2/",
            "http://127.2/",
            "http://localhost./",
        )
    },
    **{
        address: Bad(422, "only http and https", url(address), IMAGE)
        for address in (
            "file:///etc/passwd",
            "FILE:///etc/passwd",
            "ftp://127.0.0.1/x.png",
            "gopher://127.0.0.1/",
            "s3://bucket/x.png",
        )
    },
    **{
        address: Bad(422, UNREACHED, url(address), IMAGE)
        for address in (
            "http://",
            "http:///x.png",
            "http://[nonsense/",
            "http://127.0.0.1:1/",
            "http://127.0.0.1:99999/",
            "http://127.0.0.1:port/",
            "http://a..b/",
            f"http://{'a' * 300}/",
            "http://nothing.invalid/x.png",
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
}

CONFLICTS = {
    "multi-vector and dimensions": Bad(
        422,
        "dimensions is for dense vectors",
        {"input": "x", "return_multivector": True, "dimensions": 128},
        "dimensions",
    ),
    "output multivector and dimensions": Bad(
        422,
        "dimensions is for dense vectors",
        {"input": "x", "outputs": ["multivector"], "dimensions": 128},
        "dimensions",
    ),
    "pool_factor of dense vectors": Bad(
        422, "pool_factor is for multi-vectors", {"input": "x", "pool_factor": 2}, "pool_factor"
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
    "outputs and return_multivector": Bad(
        422,
        "return_multivector contradicts outputs",
        {"input": "x", "outputs": ["dense"], "return_multivector": True},
        "return_multivector",
    ),
    "outputs and no return_multivector": Bad(
        422,
        "return_multivector contradicts outputs",
        {"input": "x", "outputs": ["multivector"], "return_multivector": False},
        "return_multivector",
    ),
    "two encodings": Bad(
        422,
        "encoding_format contradicts embedding_type",
        {"input": "x", "embedding_type": "float", "encoding_format": "base64"},
        "encoding_format",
    ),
    **{
        f"{first} and {second}": Bad(
            422, f"{second} contradicts {first}", {"input": "x", first: value, second: other}, second
        )
        for first, second, value, other in (
            ("input", "content", "x", "y"),
            ("input", "texts", "x", ["x"]),
            ("task", "task_type", "retrieval", "code"),
            ("dimensions", "output_dimension", 128, 256),
            ("output_dimension", "output_dimensionality", 128, 256),
            ("dimensions", "truncate_dim", 128, 256),
            ("truncate", "truncation", True, False),
            ("embedding_type", "encoding_type", "int8", "float"),
            ("encoding_format", "embedding_types", "float", ["float", "int8"]),
        )
    },
    "a dtype and another encoding": Bad(
        422,
        "output_dtype=int8 contradicts encoding_format=float",
        {"input": "x", "encoding_format": "float", "output_dtype": "int8"},
        "output_dtype",
    ),
    "bits that fill no bytes": Bad(
        422,
        "for bits choose a multiple of 8",
        {"input": "x", "dimensions": 100, "embedding_type": ["float", "ubinary"]},
        "dimensions",
    ),
    "prompt_name and model": Bad(
        422,
        "prompt_name says query, model says passage",
        {"input": "x", "prompt_name": "query", "model": "jina-embeddings-v4-passage"},
        "prompt_name",
    ),
    "prompt_name and task": Bad(
        422,
        "prompt_name says passage, task says query",
        {"input": "x", "prompt_name": "passage", "task": "retrieval.query"},
        "prompt_name",
    ),
    "input_type and task": Bad(
        422,
        "input_type says query, task says passage",
        {"input": "x", "input_type": "search_query", "task": "retrieval.passage"},
        "input_type",
    ),
    "task and model": Bad(
        422,
        "task says query, model says passage",
        {"input": "x", "task": "retrieval.query", "model": "jina-embeddings-v4-retrieval-passage"},
        "task",
    ),
    "late chunks of an image": Bad(
        422, "late_chunking is for texts", {"input": ["x", {"image": "y"}], "late_chunking": True}, "late_chunking"
    ),
    "late chunks as multi-vectors": Bad(
        422,
        "late_chunking returns dense vectors only",
        {"input": ["x"], "late_chunking": True, "return_multivector": True},
        "late_chunking",
    ),
    "the code task": Bad(422, "`make serve-code` serves (port 8003", {"input": "x", "task": "code.query"}, "task"),
    "the text-matching task": Bad(422, "port 8002", {"input": "x", "task": "text-matching"}, "task"),
    "the code model": Bad(422, "port 8003", {"input": "x", "model": "jina-embeddings-v4-code"}, "model"),
    "the code model for passages": Bad(
        422, "for the code server", {"input": "x", "model": "jina-embeddings-v4-code-passage"}, "model"
    ),
    "another model": Bad(404, "no model gpt-4 here", {"input": "x", "model": "gpt-4"}, "model"),
    "another version": Bad(404, "no model", {"input": "x", "model": "jina-embeddings-v3"}, "model"),
    "two endings": Bad(404, "no model", {"input": "x", "model": "jina-embeddings-v4-query-query"}, "model"),
    "both endings": Bad(404, "no model", {"input": "x", "model": "jina-embeddings-v4-query-passage"}, "model"),
    "both endings the other way": Bad(404, "no model", {"input": "x", "model": "jina-embeddings-v4-passage-query"}),
    "no prompt and another": Bad(
        422,
        "task says query, model says none",
        {"input": "x", "task": "retrieval.query", "model": "jina-embeddings-v4-none"},
    ),
    "no name": Bad(404, "no model", {"input": "x", "model": ""}, "model"),
    "a path as model": Bad(404, "no model", {"input": "x", "model": "../../../etc/passwd"}, "model"),
}

FIELDS = {
    **{
        f"{name} {json.dumps(value)}": Bad(422, f"{name}=", {"input": "x", name: value}, name)
        for name, value in (
            ("normalized", False),
            ("normalize", False),
            ("use_activation", False),
            ("embd_normalize", -1),
            ("pooling", "cls"),
            ("instruction", "Represent this:"),
            ("prompt", "Represent this:"),
            ("prompt_template", "Represent {text}"),
            ("task_type", "RETRIEVAL_QUERY"),
            ("modality", "audio"),
            ("truncation", "START"),
            ("truncation_side", "left"),
            ("truncation_direction", "Left"),
            ("truncate_prompt_tokens", 0),
            ("truncate_prompt_tokens", -2),
            ("truncate_prompt_tokens", MAX_LENGTH + 1),
            ("truncate_prompt_tokens", "5"),
            ("max_tokens", 5),
            ("padding", "max_length"),
            ("embed_dtype", "float16"),
            ("endianness", "big"),
            ("output_dimension", 257),
            ("output_dimensionality", 0),
            ("output_dtype", "int4"),
            ("output_dtype", ["int8"]),
            ("mm_processor_kwargs", {"max_pixels": 3136}),
            ("options", {"num_ctx": 5}),
            ("chat_template", "{{ messages }}"),
            ("lora_path", "x"),
            ("images", ["y"]),
            ("image", "http://10.0.0.1/x.png"),
            ("pdf", "y"),
            ("query", "y"),
            ("documents", ["y"]),
            ("dimension", 128),
            ("prefix", "Passage: "),
        )
    },
    "two lengths": Bad(
        422,
        "truncate_prompt_tokens contradicts max_length",
        {"input": "x", "max_length": 5, "truncate_prompt_tokens": 6},
        "truncate_prompt_tokens",
    ),
    "a length and truncate false": Bad(
        422, "contradicts truncate=false", {"input": "x", "max_length": 5, "truncate": False}, "max_length"
    ),
    "a length and truncation NONE": Bad(
        422,
        "contradicts truncation=false",
        {"input": "x", "truncate_prompt_tokens": 5, "truncation": "NONE"},
        "truncate_prompt_tokens",
    ),
    "an item with a field beside its text": Bad(
        422, "has image_url", {"input": ["x", {"text": "y", "image_url": "http://10.0.0.1/"}]}, "input[1]"
    ),
}

KINDS = {
    f"a body of {kind}": Bad(415, "send application/json", b'{"input": "x"}', "content-type", {"content-type": kind})
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/octet-stream",
        "application/vnd.api+json",
        "application/jsonp",
        "",
        "/",
    )
}

SEARCH = {"texts": ["x"], "input_type": "search_query"}
COHERE = {
    "no body": Bad(400, NOT_JSON, b""),
    "a list as body": Bad(400, "not an object", []),
    "nothing to embed": Bad(422, "none of texts, images and inputs", {"input_type": "search_query"}),
    "input": Bad(422, "input is a field of /v1/embeddings", SEARCH | {"input": "x"}),
    "dimensions": Bad(422, "dimensions is a field of /v1/embeddings", SEARCH | {"dimensions": 128}),
    "texts and images": Bad(422, "has texts and images", SEARCH | {"images": ["y"]}),
    "texts and inputs": Bad(
        422, "has texts and inputs", SEARCH | {"inputs": [{"content": [{"type": "text", "text": "y"}]}]}
    ),
    "texts as one text": Bad(422, "texts=x is not offered", SEARCH | {"texts": "x"}),
    "no texts": Bad(422, "texts is empty", SEARCH | {"texts": []}),
    "token ids as texts": Bad(422, "texts[0]=1 is not offered", SEARCH | {"texts": [1]}),
    "too many texts": Bad(422, f"has {MAX_ITEMS + 1} items", SEARCH | {"texts": ["x"] * (MAX_ITEMS + 1)}),
    "no input_type": Bad(422, "input_type is required with texts", {"texts": ["x"]}),
    "an input_type of ours": Bad(422, "input_type=query is not offered", SEARCH | {"input_type": "query"}),
    "clustering": Bad(422, "or the text-matching model", SEARCH | {"input_type": "clustering"}),
    "classification": Bad(422, "or the text-matching model", SEARCH | {"input_type": "classification"}),
    "image for texts": Bad(422, "input_type=image is for images", SEARCH | {"input_type": "image"}),
    "input_type and model": Bad(422, "contradicts itself", SEARCH | {"model": "jina-embeddings-v4-passage"}),
    "Cohere's model": Bad(404, "no model embed-v4.0 here", SEARCH | {"model": "embed-v4.0"}),
    "another task's model": Bad(422, "for the code server", SEARCH | {"model": "jina-embeddings-v4-code"}),
    "START": Bad(422, "truncate=START is not offered: texts are cut at their end", SEARCH | {"truncate": "START"}),
    "true as truncate": Bad(422, "truncate=True is not offered", SEARCH | {"truncate": True}),
    "NONE and 33k tokens": Bad(400, "texts[1] has 33003", SEARCH | {"texts": ["x", LONG], "truncate": "NONE"}),
    "NONE and max_tokens": Bad(422, "contradicts truncate=NONE", SEARCH | {"truncate": "NONE", "max_tokens": 5}),
    "max_tokens 0": Bad(422, f"choose 1 to {MAX_LENGTH}", SEARCH | {"max_tokens": 0}),
    "257 dimensions": Bad(
        422, "output_dimension=257 is not offered; choose 1 to 256", SEARCH | {"output_dimension": 257}
    ),
    "an unknown type": Bad(422, "embedding_types[0]=int4 is not offered", SEARCH | {"embedding_types": ["int4"]}),
    "an image that is none": Bad(422, "images[1] is neither", {"images": [IMAGES_BASE64[0], "what?"]}),
    "a private URL": Bad(422, PRIVATE, {"images": ["http://10.0.0.1/x.png"]}),
    "inputs of texts": Bad(422, 'inputs[0] is {"content": [...]}', {"inputs": ["x"], "input_type": "search_query"}),
    "an input without content": Bad(422, "inputs[0] is", {"inputs": [{"text": "x"}], "input_type": "search_query"}),
    "text and image fused in an input": Bad(
        422, BOTH, {"inputs": [{"content": [WORDS, PICTURE]}], "input_type": "search_document"}
    ),
    "no key of Cohere's": Bad(422, "normalized=False", SEARCH | {"normalized": False}),
}

RANK: dict[str, Any] = {"query": "q", "documents": ["a", "b"]}
RANKINGS = {
    "no body": Bad(400, NOT_JSON, b""),
    "a list as body": Bad(400, "not an object", []),
    "half an emoji in a document": Bad(400, NOT_JSON, b'{"query": "q", "documents": ["a", "\\ud83d"]}', "documents[1]"),
    "no query": Bad(422, "query is required", {"documents": ["a"]}, "query"),
    "query null": Bad(422, "query is one text or image", RANK | {"query": None}, "query"),
    "two queries": Bad(422, "query is one text or image", RANK | {"query": ["q", "r"]}, "query"),
    "a number as query": Bad(422, "query is one text or image", RANK | {"query": 5}, "query"),
    "a query without anything": Bad(422, EITHER, RANK | {"query": {}}, "query"),
    "a broken image as query": Bad(422, "neither an http(s) URL", RANK | {"query": {"image": "what?"}}, "query.image"),
    "text and image fused in a query": Bad(422, BOTH, RANK | {"query": {"text": "x", "image": "y"}}, "query"),
    "a query of 33k tokens": Bad(400, "query has 33003 tokens", RANK | {"query": LONG}, "query"),
    "no documents": Bad(422, "documents is required", {"query": "q"}, "documents"),
    "an empty list": Bad(422, "documents is empty", RANK | {"documents": []}, "documents"),
    "documents null": Bad(422, "documents is a text, an item or a list", RANK | {"documents": None}, "documents"),
    "documents a number": Bad(422, "documents is a text, an item or a list", RANK | {"documents": 5}, "documents"),
    "a document that is null": Bad(422, ITEM, RANK | {"documents": ["a", None]}, "documents[1]"),
    "token ids as documents": Bad(422, TOKENS, RANK | {"documents": [1, 2]}, "documents[0]"),
    "a document of other fields": Bad(422, EITHER, RANK | {"documents": [{"title": "x"}]}, "documents[0]"),
    "a text document of type image": Bad(
        422, "read as text", RANK | {"documents": [{"type": "image", "text": "x"}]}, "documents[0].type"
    ),
    "a document with a title": Bad(422, "has title", RANK | {"documents": [{"text": "x", "title": "y"}]}),
    "two texts in a document": Bad(
        422, "has 2 parts", RANK | {"documents": [{"content": [WORDS, WORDS]}]}, "documents[0].content"
    ),
    "a broken image among documents": Bad(
        422, "is not an image", RANK | {"documents": ["a", {"image": "AAAA"}]}, "documents[1].image"
    ),
    "a private URL": Bad(422, PRIVATE, RANK | {"documents": [{"image": "http://10.0.0.1/x.png"}]}),
    "a PDF file": Bad(
        422, "a PDF file has many pages", RANK | {"documents": ["a", {"pdf": "AAAA"}]}, "documents[1].pdf"
    ),
    "a document of 33k tokens": Bad(400, "documents[1] has 33003", RANK | {"documents": ["a", LONG]}, "documents[1]"),
    "too many documents": Bad(
        422, f"has {MAX_ITEMS + 1} items", RANK | {"documents": ["x"] * (MAX_ITEMS + 1)}, "documents"
    ),
    "top_n 0": Bad(422, "top_n=0 is not offered", RANK | {"top_n": 0}, "top_n"),
    "top_n -1": Bad(422, "top_n=-1 is not offered", RANK | {"top_n": -1}, "top_n"),
    "top_n 1.5": Bad(422, "top_n=1.5 is not offered", RANK | {"top_n": 1.5}, "top_n"),
    "top_n NaN": Bad(422, "top_n=nan is not offered", b'{"query": "q", "documents": ["a"], "top_n": NaN}', "top_n"),
    "top_n a text": Bad(422, "top_n=3 is not offered", RANK | {"top_n": "3"}, "top_n"),
    "by cosine": Bad(422, "by=cosine is not offered", RANK | {"by": "cosine"}, "by"),
    "return_documents a text": Bad(422, "return_documents=yes", RANK | {"return_documents": "yes"}),
    "max_tokens_per_doc and truncate false": Bad(
        422, "contradicts truncate=false", RANK | {"truncate": False, "max_tokens_per_doc": 5}, "max_tokens_per_doc"
    ),
    "max_tokens_per_doc -1": Bad(422, "max_tokens_per_doc=-1", RANK | {"max_tokens_per_doc": -1}),
    "max_tokens_per_query over the limit": Bad(
        422, f"choose 0 to {MAX_LENGTH}", RANK | {"max_tokens_per_query": MAX_LENGTH + 1}, "max_tokens_per_query"
    ),
    "max_pixels over the limit": Bad(422, "choose 3136 to 602112", RANK | {"max_pixels": 602_113}, "max_pixels"),
    "a model of one prompt": Bad(422, "uses both prompts", RANK | {"model": "jina-embeddings-v4-query"}, "model"),
    "a task of one prompt": Bad(422, "uses both prompts", RANK | {"task": "retrieval.passage"}, "task"),
    "another task's model": Bad(422, "for the code server", RANK | {"model": "jina-embeddings-v4-code"}, "model"),
    "a reranker's model": Bad(404, "no model jina-reranker-m0 here", RANK | {"model": "jina-reranker-m0"}, "model"),
    "prompt_name": Bad(422, "is a field of /v1/embeddings", RANK | {"prompt_name": "query"}, "prompt_name"),
    "dimensions": Bad(422, "is a field of /v1/embeddings", RANK | {"dimensions": 128}, "dimensions"),
    "rank_fields": Bad(422, "rank_fields is not offered", RANK | {"rank_fields": ["title"]}, "rank_fields"),
    "an instruction": Bad(422, "instruction=Find is not offered", RANK | {"instruction": "Find"}, "instruction"),
    "an empty document without prefix": Bad(
        422, "is empty", RANK | {"documents": [""], "model": "jina-embeddings-v4-none"}, "documents[0]"
    ),
}
PAIRS = {
    "no body": Bad(400, NOT_JSON, b""),
    "no queries": Bad(422, "queries is required", {"documents": "a"}, "queries"),
    "no documents": Bad(422, "documents is required", {"text_1": "q"}, "documents"),
    "empty queries": Bad(422, "text_1 is empty", {"text_1": [], "text_2": "a"}, "text_1"),
    "empty documents": Bad(422, "text_2 is empty", {"text_1": "q", "text_2": []}, "text_2"),
    "two queries for three documents": Bad(
        422, "2 queries and 3 documents", {"text_1": ["q", "r"], "text_2": ["a", "b", "c"]}, "queries"
    ),
    "two queries for one document": Bad(422, "2 queries and 1 documents", {"text_1": ["q", "r"], "text_2": "a"}),
    "two names": Bad(422, "contradicts queries", {"queries": "q", "text_1": "r", "text_2": "a"}, "text_1"),
    "a broken image": Bad(422, "is not an image", {"text_1": {"image": "AAAA"}, "text_2": "a"}, "text_1.image"),
    "a long document": Bad(400, "data_2[1] has 33003", {"data_1": "q", "data_2": ["a", LONG]}, "data_2[1]"),
    "an instruction": Bad(422, "instruction=x is not", {"text_1": "q", "text_2": "a", "instruction": "x"}),
    "a prompt for the template": Bad(422, "chat_template=x", {"text_1": "q", "text_2": "a", "chat_template": "x"}),
}
TABLE = {**JSON, **TYPES, **INPUTS, **PARTS, **BAD_IMAGES, **PDFS, **URLS, **CONFLICTS, **FIELDS, **KINDS}


@pytest.mark.parametrize("bad", TABLE.values(), ids=TABLE.keys())
def test_bad_input_is_named(bad: Bad, wire: Wire, site: Site) -> None:
    content = bad.body if isinstance(bad.body, bytes) else json.dumps(bad.body).encode()
    content = content.replace(SITE.encode(), site.url.encode()).replace(
        b"https://site", site.url.replace("http", "https").encode()
    )
    answer = wire.post(content=content, **bad.headers)
    assert_refused(answer, bad.status, bad.message, bad.param)


@pytest.mark.parametrize(
    ("path", "bad"),
    [
        pytest.param(path, bad, id=f"{path} {name}")
        for path, table in (("/v1/rerank", RANKINGS), ("/v1/score", PAIRS))
        for name, bad in table.items()
    ],
)
def test_bad_input_of_a_ranking_is_named(path: str, bad: Bad, wire: Wire) -> None:
    content = bad.body if isinstance(bad.body, bytes) else json.dumps(bad.body).encode()
    answer = wire.http.post(path, content=content, headers={"content-type": "application/json"})
    assert_refused(answer, bad.status, bad.message, bad.param)


@pytest.mark.parametrize(
    ("path", "bad"),
    [
        pytest.param(path, bad, id=f"{path} {name}")
        for path, table in (("/v2/embed", COHERE), ("/v2/rerank", RANKINGS))
        for name, bad in table.items()
    ],
)
def test_bad_input_of_coheres_form_is_named_in_coheres_shape(path: str, bad: Bad, wire: Wire) -> None:
    content = bad.body if isinstance(bad.body, bytes) else json.dumps(bad.body).encode()
    answer = wire.http.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == bad.status, answer.text
    body = answer.json()
    assert body.keys() == {"id", "message"}
    assert body["id"] == answer.headers["x-request-id"]
    assert bad.message in body["message"]
    assert not LEAKS.search(body["message"])


def test_the_table_is_long_enough() -> None:
    assert len(TABLE) == sum(map(len, (JSON, TYPES, INPUTS, PARTS, BAD_IMAGES, PDFS, URLS, CONFLICTS, FIELDS, KINDS)))
    assert len(TABLE) > 200


ROUTES = (
    "/",
    "/pooling",
    "/v1/pooling",
    "/v1/embed",
    "/v2/embed/",
    "/score",
    "/v1/score/",
    "/rerank",
    "/v1/rerank/",
    "/v2/rerank/",
    "/classify",
    "/tokenize",
    "/detokenize",
    "/tokenizer_info",
    "/invocations",
    "/inference/v1/generate",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/audio/transcriptions",
    "/v1/load_lora_adapter",
    "/v1/models/jina-embeddings-v4-retrieval",
    "/ping",
    "/load",
    "/server_info",
    "/sleep",
    "/wake_up",
    "/reset_mm_cache",
    "/reset_prefix_cache",
    "/collective_rpc",
    "/start_profile",
    "/redoc",
    "/docs/oauth2-redirect",
    "/static",
    "/static/",
    "/static/swagger-ui-bundle.js.map",
    "/static/../docs",
    "/v1/embeddings/",
    "/v1//embeddings",
    "//v1/embeddings",
    "/V1/EMBEDDINGS",
    "/v1/embeddings%2f",
    "/v1/embeddings;x",
    "/embeddings",
    "/%2e%2e/etc/passwd",
    "/.env",
    "/metrics/",
    "/health/x",
)


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
