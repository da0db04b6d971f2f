"""Thousands of requests that nobody would send: no 5xx, every refusal in its form, and the golden rows as before.

hypothesis makes them, the same ones as long as the code stays the same, from the schema that the server shows: bodies
that follow it, bodies that leave it in a field, valid bodies with broken bytes, random and broken images, odd routes
and headers.
"""

import asyncio
import base64
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import httpx2
import numpy as np
import pytest
from conftest import Golden
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from image_files import plain
from pdf_files import FILLED, NO_PAGES, ONE_BAD, book, encrypted, page_with, text_field
from wire import BOUND, LEAKS, SAFETENSORS, TASK, Wire

pytestmark = pytest.mark.long

AT_ONCE = 8
COHERE = "/v2/embed"
RERANK, COHERE_RERANK, SCORE = "/v1/rerank", "/v2/rerank", "/v1/score"
COHERE_SHAPED = (COHERE, COHERE_RERANK)
# A request has one of these, and of a field with several names one.
HOLDERS = ("input", "content", "texts", "messages", "images", "inputs")
NAMES = (
    ("task", "task_type"),
    ("dimensions", "output_dimension", "output_dimensionality", "truncate_dim"),
    ("truncate", "truncation"),
    ("embedding_type", "encoding_format", "encoding_type", "embedding_types", "output_dtype"),
)
ALLOWED = {200, 400, 404, 405, 413, 415, 422, 429}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
ANY_TEXT = st.text(max_size=30)  # lone surrogates too
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(ANY_TEXT, children, max_size=3),
    max_leaves=6,
)


@dataclass(frozen=True)
class Sent:
    """A request."""

    content: bytes
    path: str = "/v1/embeddings"
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=dict)


def dumped(body: object) -> bytes:
    return json.dumps(body).encode()


def small_image(kind: str) -> bytes:
    return plain((32, 32), "red", kind)


IMAGES = [small_image(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "ICO", "QOI", "AVIF")]
PDFS = [book(1), book(3), encrypted(b""), NO_PAGES, ONE_BAD, page_with(text_field(b"Marie"), FILLED)]


def strategy(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """What a JSON schema of ours allows, kept small."""
    if "anyOf" in schema:
        return st.one_of(*(strategy(kind) for kind in schema["anyOf"]))
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "contentMediaType" in schema:
        files = IMAGES if schema["contentMediaType"] == "image/*" else PDFS
        return st.sampled_from(files).map(lambda file: base64.b64encode(file).decode())
    if "pattern" in schema:  # ranges of pages
        return st.sampled_from(["1", "1-2", "2-", "1,3-", "9"])
    kinds: dict[str, Callable[[], st.SearchStrategy[Any]]] = {
        "string": lambda: TEXT,
        "integer": lambda: st.integers(min_value=int(schema.get("minimum", -(2**63)))),
        "boolean": st.booleans,
        "null": st.none,
        "array": lambda: st.lists(
            strategy(schema["items"]), min_size=schema.get("minItems", 0), max_size=schema.get("maxItems", 3)
        ),
        "object": lambda: an_object(schema),
    }
    return kinds[schema["type"]]()


def an_object(schema: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    values = {name: strategy(value) for name, value in schema["properties"].items()}
    required = {name: values.pop(name) for name in schema["required"]}
    return st.fixed_dictionaries(required, optional=values)


def bodies(schema: dict[str, Any], *, likely: bool) -> st.SearchStrategy[dict[str, Any]]:
    """Bodies that follow the schema; the likely ones hold what this server offers, so that most give vectors."""
    properties = schema["properties"]
    holders = [name for name in HOLDERS if name in properties]
    offered = {
        "model": st.sampled_from(
            [f"jina-embeddings-v4-{TASK}", "jina-embeddings-v4", "jina-embeddings-v4-query", None]
        ),
        "task": st.sampled_from([TASK, f"{TASK}.query", None]),
        "prompt_name": st.sampled_from(["query", None]),
        "input_type": st.sampled_from(["search_query", None]),
        "task_type": st.sampled_from([TASK, f"{TASK}.query", None]),
        **{
            name: st.sampled_from([1, 96, 128, 200, 256, None])
            for name in ("dimensions", "output_dimension", "output_dimensionality", "truncate_dim")
        },
        "max_length": st.integers(1, 64),
        **dict.fromkeys(("truncate", "truncation"), st.sampled_from([True, "END", None])),  # false forbids a length
        "max_pixels": st.integers(3136, 602_112),
        "pool_factor": st.sampled_from([1, None]),
    }
    optional = {name: strategy(value) for name, value in properties.items() if name not in holders}
    optional |= {name: value for name, value in offered.items() if name in properties} if likely else {}
    if likely:  # each body has the names of one column
        return st.integers(0, 4).flatmap(lambda column: _bodies(properties, holders, _column(optional, column)))
    return _bodies(properties, holders, optional)


def _column(optional: dict[str, Any], column: int) -> dict[str, Any]:
    left_out = {name for names in NAMES for name in names if name != names[column % len(names)]}
    return {name: value for name, value in optional.items() if name not in left_out}


def _bodies(
    properties: dict[str, Any], holders: list[str], optional: dict[str, Any]
) -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(
        *(st.fixed_dictionaries({name: strategy(properties[name])}, optional=optional) for name in holders)
    )


@st.composite
def with_a_field_changed(draw: st.DrawFn, valid: st.SearchStrategy[dict[str, Any]], names: list[str]) -> Sent:
    body = dict(draw(valid))
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
        body[name] = draw(JSON)
    return Sent(dumped(body))


@st.composite
def with_bytes_broken(draw: st.DrawFn, valid: st.SearchStrategy[dict[str, Any]]) -> Sent:
    content = dumped(draw(valid))
    kind = draw(st.sampled_from(["cut", "flip", "insert", "remove", "twice", "nest"]))
    at = draw(st.integers(0, len(content) - 1))
    if kind == "cut":
        content = content[:at]
    elif kind == "flip":
        content = content[:at] + bytes([content[at] ^ draw(st.integers(1, 255))]) + content[at + 1 :]
    elif kind == "insert":
        content = content[:at] + draw(st.binary(min_size=1, max_size=8)) + content[at:]
    elif kind == "remove":
        content = content[:at] + content[at + draw(st.integers(1, 16)) :]
    elif kind == "twice":  # one name, two values
        other = dumped(draw(JSON))
        name = draw(st.sampled_from(["input", "dimensions", "task", "embedding_type"]))
        content = b'{"' + name.encode() + b'": ' + other + b", " + content[1:]
    else:
        n_levels = draw(st.integers(1, 400))
        content = b'{"input": ' * n_levels + content + b"}" * n_levels
    return Sent(content)


@st.composite
def with_a_broken_image(draw: st.DrawFn) -> Sent:
    content = draw(st.one_of(st.sampled_from(IMAGES), st.binary(max_size=64)))
    for _ in range(draw(st.integers(1, 4))):
        if content:
            at = draw(st.integers(0, len(content) - 1))
            content = content[:at] + draw(st.binary(max_size=4)) + content[at + draw(st.integers(0, 4)) :]
    source = base64.b64encode(content).decode()
    source = draw(st.sampled_from(["", "data:image/png;base64,", "data:,", "data:;base64,"])) + source
    return Sent(dumped({"input": ["x", {"image": draw(st.one_of(st.just(source), ANY_TEXT))}]}))


@st.composite
def with_a_broken_pdf(draw: st.DrawFn) -> Sent:
    content = draw(st.sampled_from(PDFS))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(content) - 1))
        content = content[:at] + draw(st.binary(max_size=4)) + content[at + draw(st.integers(0, 40)) :]
    item = {"pdf": base64.b64encode(content).decode(), "pages": draw(st.none() | st.sampled_from(["1", "2-"]) | JSON)}
    return Sent(dumped({"input": ["x", item], "max_pixels": 3136}))


@st.composite
def with_an_odd_head(draw: st.DrawFn, valid: st.SearchStrategy[dict[str, Any]], paths: list[str]) -> Sent:
    header = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30).map(str.strip)
    names = st.sampled_from(["accept", "content-type", "x-request-id", "authorization", "content-encoding", "origin"])
    path = draw(st.one_of(st.sampled_from(paths), header.map(lambda text: "/" + text.replace("#", "").lstrip("/"))))
    return Sent(
        dumped(draw(valid)),
        path,
        draw(st.sampled_from(["POST", "POST", "GET", "PUT", "DELETE", "OPTIONS", "PATCH"])),
        draw(st.dictionaries(names, header | st.just(SAFETENSORS) | st.just("application/json"), max_size=3)),
    )


def rankings(schema: dict[str, Any], queries: str, documents: str) -> st.SearchStrategy[dict[str, Any]]:
    """Rankings that are offered, or nearly: with the fields that this server takes, and one query for all documents."""
    properties = schema["properties"]
    optional = {
        "model": st.sampled_from([f"jina-embeddings-v4-{TASK}", "jina-embeddings-v4-none", None]),
        "task": st.sampled_from([TASK, None]),
        "max_tokens_per_query": st.integers(0, 64),
        "max_tokens_per_doc": st.integers(0, 64),
        "max_pixels": st.integers(3136, 602_112),
        "truncate": st.sampled_from([True, None]),
        **{name: strategy(properties[name]) for name in ("by", "top_n", "return_documents") if name in properties},
    }
    item = strategy(properties["query"] if "query" in properties else properties[queries]["anyOf"][0])
    return st.fixed_dictionaries({queries: item, documents: st.lists(item, min_size=1, max_size=4)}, optional=optional)


def at(path: str, requests: st.SearchStrategy[Sent]) -> st.SearchStrategy[Sent]:
    return requests.map(lambda sent: replace(sent, path=path))


def made(requests: st.SearchStrategy[Sent], count: int) -> list[Sent]:
    """Let hypothesis make so many, the same at every run."""
    found: list[Sent] = []

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(requests)
    def collect(sent: Sent) -> None:
        found.append(sent)

    collect()
    return found


async def answered(base_url: str, requests: list[Sent]) -> list[httpx2.Response]:
    slots = asyncio.Semaphore(AT_ONCE)
    async with httpx2.AsyncClient(base_url=base_url, timeout=60, trust_env=False) as http:

        async def send(sent: Sent) -> httpx2.Response:
            headers = {"content-type": "application/json"} | sent.headers
            async with slots:
                return await http.request(sent.method, sent.path, content=sent.content, headers=headers)

        return await asyncio.gather(*map(send, requests))


def check(sent: Sent, answer: httpx2.Response) -> None:
    """Check what must hold of any answer."""
    assert answer.status_code in ALLOWED, (sent, answer.text)
    assert answer.headers["x-jina-v4-task"] == TASK
    if answer.status_code != 200:
        content = answer.json()
        message = content["message"] if sent.path in COHERE_SHAPED else content["error"]["message"]
        assert message, sent
        assert sent.path in COHERE_SHAPED or message == content["detail"]["message"]
        shown = LEAKS.search(message)
        assert shown is None or shown[0] in repr(sent), content  # what was sent may be shown
        return
    if sent.path == COHERE:
        for row in answer.json()["embeddings"].get("float", ()):
            assert math.isclose(float(np.linalg.norm(row)), 1, abs_tol=1e-5), sent
        return
    if sent.path in (RERANK, COHERE_RERANK, SCORE):
        content = answer.json()
        scores = [
            item.get("relevance_score", item.get("score")) for item in content.get("results", content.get("data"))
        ]
        assert all(-1.00001 <= score <= 1.00001 for score in scores), (sent, content)
        assert sent.path == SCORE or scores == sorted(scores, reverse=True), (sent, content)
        return
    if sent.path != "/v1/embeddings" or answer.headers["content-type"] == SAFETENSORS:
        return
    for item in answer.json()["data"]:
        floats = item.get("embedding", item.get("embeddings"))
        if isinstance(floats, list) and floats and isinstance(floats[0], float):
            assert math.isclose(float(np.linalg.norm(floats)), 1, abs_tol=1e-5), sent


def test_thousands_of_odd_requests_do_no_harm(wire: Wire, golden: Golden, capsys: pytest.CaptureFixture[str]) -> None:
    page = wire.http.get("/openapi.json").json()
    schema, of_cohere, of_rerank, of_score = (
        page["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        for path in ("/v1/embeddings", COHERE, RERANK, SCORE)
    )
    likely_of_cohere = bodies(of_cohere, likely=True)
    reranks, pairs = rankings(of_rerank, "query", "documents"), rankings(of_score, "text_1", "text_2")
    likely, valid = bodies(schema, likely=True), bodies(schema, likely=False)
    requests = {
        "bodies that are offered": made(likely.map(lambda body: Sent(dumped(body))), 200),
        "bodies of the schema": made(valid.map(lambda body: Sent(dumped(body))), 300),
        "a field of another kind": made(with_a_field_changed(likely, list(schema["properties"])), 400),
        "broken bytes": made(with_bytes_broken(likely), 400),
        "broken images": made(with_a_broken_image(), 300),
        "broken PDF files": made(with_a_broken_pdf(), 100),
        "bodies of Cohere's form": made(at(COHERE, likely_of_cohere.map(lambda body: Sent(dumped(body)))), 120),
        "Cohere's, a field of another kind": made(
            at(COHERE, with_a_field_changed(likely_of_cohere, list(of_cohere["properties"]))), 200
        ),
        "Cohere's, broken bytes": made(at(COHERE, with_bytes_broken(likely_of_cohere)), 120),
        "rankings": made(at(RERANK, reranks.map(lambda body: Sent(dumped(body)))), 100),
        "rankings of Cohere's form": made(at(COHERE_RERANK, reranks.map(lambda body: Sent(dumped(body)))), 40),
        "pairs": made(at(SCORE, pairs.map(lambda body: Sent(dumped(body)))), 60),
        "rankings, a field of another kind": made(
            at(RERANK, with_a_field_changed(reranks, list(of_rerank["properties"]))), 150
        ),
        "pairs, a field of another kind": made(
            at(SCORE, with_a_field_changed(pairs, list(of_score["properties"]))), 100
        ),
        "rankings, broken bytes": made(at(COHERE_RERANK, with_bytes_broken(reranks)), 100),
        "odd routes and headers": made(with_an_odd_head(likely, ["/v1/embeddings", *page["paths"]]), 200),
    }
    total: Counter[int] = Counter()
    lines = []
    for kind, sent in requests.items():
        answers = asyncio.run(answered(wire.base_url, sent))
        for request, answer in zip(sent, answers, strict=True):
            check(request, answer)
        counts = Counter(answer.status_code for answer in answers)
        lines.append(f"  {kind:<34} {len(sent):>5}  " + "  ".join(f"{s}: {n}" for s, n in sorted(counts.items())))
        total += counts
    with capsys.disabled():
        print(f"\n{sum(total.values())} odd requests, by status:", *lines, sep="\n")
    assert sum(total.values()) >= 2000
    assert total[200] >= 200, "most of it must not be refused at the door"
    assert total[422] >= 200
    assert wire.http.get("/ready").status_code == 200
    difference = wire.golden_difference(golden)
    print(f"largest difference: {difference:.1e}")
    assert difference <= BOUND
