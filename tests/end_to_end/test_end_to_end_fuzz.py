"""Thousands of requests that nobody would send: no 5xx, every refusal in its form, and the golden rows as before.

hypothesis makes them, the same ones as long as the code stays the same, from the schema that the server shows: bodies
that follow it, bodies that leave it in a field, valid bodies with broken bytes, random and broken images, odd routes
and headers.
"""

import asyncio
import base64
import io
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx2
import numpy as np
import pytest
from conftest import Golden
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from wire import BOUND, LEAKS, SAFETENSORS, TASK, Wire

AT_ONCE = 8
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
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, kind)
    return file.getvalue()


IMAGES = [small_image(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "ICO", "QOI", "AVIF")]


def strategy(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """What a JSON schema of ours allows, kept small."""
    if "anyOf" in schema:
        return st.one_of(*(strategy(kind) for kind in schema["anyOf"]))
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "image" in schema.get("properties", {}):
        return st.sampled_from(IMAGES).map(lambda image: {"image": base64.b64encode(image).decode()})
    kinds: dict[str, Callable[[], st.SearchStrategy[Any]]] = {
        "string": lambda: TEXT,
        "integer": lambda: st.integers(min_value=int(schema.get("minimum", -(2**63)))),
        "boolean": st.booleans,
        "null": st.none,
        "array": lambda: st.lists(strategy(schema["items"]), min_size=schema.get("minItems", 0), max_size=3),
        "object": lambda: st.fixed_dictionaries({k: strategy(v) for k, v in schema["properties"].items()}),
    }
    return kinds[schema["type"]]()


def bodies(schema: dict[str, Any], *, likely: bool) -> st.SearchStrategy[dict[str, Any]]:
    """Bodies that follow the schema; the likely ones hold what this server offers, so that most give vectors."""
    properties = schema["properties"]
    offered = {
        "model": st.sampled_from(
            [f"jina-embeddings-v4-{TASK}", "jina-embeddings-v4", "jina-embeddings-v4-query", None]
        ),
        "task": st.sampled_from([TASK, f"{TASK}.query", None]),
        "prompt_name": st.sampled_from(["query", None]),
        "input_type": st.sampled_from(["query", "search_query", None]),
        "dimensions": st.sampled_from([128, 256, None]),
        "max_length": st.integers(1, 64),
        "max_pixels": st.integers(3136, 602_112),
    }
    optional = {name: strategy(value) for name, value in properties.items() if name != "input"}
    return st.fixed_dictionaries(
        {"input": strategy(properties["input"])}, optional=optional | offered if likely else optional
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
def with_an_odd_head(draw: st.DrawFn, valid: st.SearchStrategy[dict[str, Any]], paths: list[str]) -> Sent:
    header = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30).map(str.strip)
    names = st.sampled_from(["accept", "content-type", "x-request-id", "authorization", "content-encoding", "origin"])
    path = draw(st.one_of(st.sampled_from(paths), header.map(lambda text: "/" + text.replace("#", ""))))
    return Sent(
        dumped(draw(valid)),
        path,
        draw(st.sampled_from(["POST", "POST", "GET", "PUT", "DELETE", "OPTIONS", "PATCH"])),
        draw(st.dictionaries(names, header | st.just(SAFETENSORS) | st.just("application/json"), max_size=3)),
    )


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
        assert content["error"]["message"], sent
        assert content["error"]["message"] == content["detail"]["message"]
        shown = LEAKS.search(content["error"]["message"])
        assert shown is None or shown[0] in repr(sent), content  # what was sent may be shown
        return
    if sent.path != "/v1/embeddings" or answer.headers["content-type"] == SAFETENSORS:
        return
    for item in answer.json()["data"]:
        floats = item.get("embedding", item.get("embeddings"))
        if isinstance(floats, list) and floats and isinstance(floats[0], float):
            assert math.isclose(float(np.linalg.norm(floats)), 1, abs_tol=1e-5), sent


def test_thousands_of_odd_requests_do_no_harm(wire: Wire, golden: Golden, capsys: pytest.CaptureFixture[str]) -> None:
    page = wire.http.get("/openapi.json").json()
    schema = page["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    likely, valid = bodies(schema, likely=True), bodies(schema, likely=False)
    requests = {
        "bodies that are offered": made(likely.map(lambda body: Sent(dumped(body))), 300),
        "bodies of the schema": made(valid.map(lambda body: Sent(dumped(body))), 500),
        "a field of another kind": made(with_a_field_changed(likely, list(schema["properties"])), 700),
        "broken bytes": made(with_bytes_broken(likely), 700),
        "broken images": made(with_a_broken_image(), 500),
        "odd routes and headers": made(with_an_odd_head(likely, ["/v1/embeddings", *page["paths"]]), 300),
    }
    total: Counter[int] = Counter()
    lines = []
    for kind, sent in requests.items():
        answers = asyncio.run(answered(wire.base_url, sent))
        for request, answer in zip(sent, answers, strict=True):
            check(request, answer)
        counts = Counter(answer.status_code for answer in answers)
        lines.append(f"  {kind:<26} {len(sent):>5}  " + "  ".join(f"{s}: {n}" for s, n in sorted(counts.items())))
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
