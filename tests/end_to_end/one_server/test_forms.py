"""Every form, field, alias and encoding of `POST /v1/embeddings`, against values that numpy makes from golden rows."""

import base64
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from bad_bodies import user
from conftest import Golden
from jina_v4_client.scoring.quantization import Int8Vectors, quantize_int8
from jina_v4_client.scoring.token_pooling import pool_tokens
from oracle import cut
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from wire import (
    BOUND,
    IMAGES,
    IMAGES_BASE64,
    MAX_LENGTH,
    SAFETENSORS,
    TASK,
    TEXTS,
    Array,
    Site,
    Wire,
    array,
    assert_near,
)

SITE = "http://site"  # stands for the address of the site with the golden images
URI = "data:image/png;base64,"
FIELDS = {
    "input", "content", "texts", "messages", "task_type", "output_dimension", "output_dimensionality", "truncate_dim",
    "encoding_type", "embedding_types", "output_dtype", "truncation", "priority", "model", "task", "prompt_name",
    "input_type", "dimensions", "embedding_type", "encoding_format", "outputs", "return_multivector", "pool_factor",
    "late_chunking", "truncate", "max_length", "truncate_prompt_tokens", "modality", "max_pixels",
}  # fmt: skip
RANKINGS = ("/v1/rerank", "/v2/rerank", "/v1/score")
ROUTES = {"/v1/embeddings", "/v2/embed", *RANKINGS, "/v1/models", "/health", "/ready", "/metrics", "/version"}


def golden_row(golden: Golden, name: str, kind: str = "dense") -> Array:
    """Return a row by the end of its name: `query/0`, `image/2`, `query/3/max16`, or `query/0 cut to 128`."""
    name, _, size = name.partition(" cut to ")
    row = golden.rows.get(f"{TASK}/{name}/{kind}")
    row = golden.rows[f"{TASK}/{name}"] if row is None else row
    return cut(row, int(size)) if size else row


def at_site(body: dict[str, Any], pictures: Site) -> dict[str, Any]:
    filled: dict[str, Any] = json.loads(json.dumps(body).replace(SITE, pictures.url))
    return filled


MODELS = {
    "jina-embeddings-v4": "query",
    "jina-embeddings-v4-query": "query",
    "jina-embeddings-v4-passage": "passage",
    "jina-embeddings-v4-retrieval": "query",
    "jina-embeddings-v4-retrieval-query": "query",
    "jina-embeddings-v4-retrieval-passage": "passage",
    "jinaai/jina-embeddings-v4": "query",
    "jinaai/jina-embeddings-v4-retrieval-passage": "passage",
}
INPUT_TYPES = {
    "query": "query",
    "search_query": "query",
    "passage": "passage",
    "document": "passage",
    "search_document": "passage",
}
ALL_NULL = dict.fromkeys(FIELDS - {"input"})

# What is asked, and the golden rows of the answer, in order.
DENSE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a text": ({"input": TEXTS[0]}, ["query/0"]),
    "an empty text": ({"input": TEXTS[5]}, ["query/5"]),
    "a list of texts": ({"input": TEXTS}, [f"query/{i}" for i in range(6)]),
    "a list of one text": ({"input": [TEXTS[2]]}, ["query/2"]),
    "a text item": ({"input": {"text": TEXTS[1]}}, ["query/1"]),
    "text items": ({"input": [{"text": text} for text in TEXTS]}, [f"query/{i}" for i in range(6)]),
    "texts and text items": ({"input": [TEXTS[4], {"text": TEXTS[1]}]}, ["query/4", "query/1"]),
    "an item with nulls": ({"input": {"text": TEXTS[0], "image": None, "pdf": None, "id": 7}}, ["query/0"]),
    "an image item": ({"input": {"image": IMAGES_BASE64[3]}}, ["image/3"]),
    "image items": ({"input": [{"image": image} for image in IMAGES_BASE64]}, [f"image/{i}" for i in range(4)]),
    "an image as data URI": ({"input": [{"image": URI + IMAGES_BASE64[0]}]}, ["image/0"]),
    "an image as data URI of another case": ({"input": [{"image": "DATA:;BASE64," + IMAGES_BASE64[0]}]}, ["image/0"]),
    "an image as URL": ({"input": [{"image": f"{SITE}/{IMAGES[2].name}"}]}, ["image/2"]),
    "an image behind five redirects": ({"input": [{"image": f"{SITE}/hops/5/{IMAGES[0].name}"}]}, ["image/0"]),
    "an image URL of type image": (
        {"input": [{"type": "image", "content": f"{SITE}/{IMAGES[2].name}"}, {"type": "text", "content": TEXTS[1]}]},
        ["image/2", "query/1"],
    ),
    "an image URL in a list, by modality": (
        {"input": [{"content": [f"{SITE}/{IMAGES[2].name}"]}], "modality": "image"},
        ["image/2"],
    ),
    "texts and images mixed": (
        {"input": [{"image": IMAGES_BASE64[1]}, TEXTS[0], {"image": f"{SITE}/{IMAGES[3].name}"}, {"text": TEXTS[4]}]},
        ["image/1", "query/0", "image/3", "query/4"],
    ),
    "images have no prompt name": ({"input": [{"image": IMAGES_BASE64[0]}], "prompt_name": "passage"}, ["image/0"]),
    **{
        f"prompt_name {name}": ({"input": TEXTS, "prompt_name": name}, [f"{name}/{i}" for i in range(6)])
        for name in ("query", "passage")
    },
    **{
        f"input_type {name}": ({"input": TEXTS[0], "input_type": name}, [f"{prompt}/0"])
        for name, prompt in INPUT_TYPES.items()
    },
    "task": ({"input": TEXTS[0], "task": "retrieval"}, ["query/0"]),
    "task query": ({"input": TEXTS[0], "task": "retrieval.query"}, ["query/0"]),
    "task passage": ({"input": TEXTS[0], "task": "retrieval.passage"}, ["passage/0"]),
    "task and prompt_name": (
        {"input": TEXTS[0], "task": "retrieval", "prompt_name": "passage"},
        ["passage/0"],
    ),
    **{f"model {name}": ({"input": TEXTS[1], "model": name}, [f"{prompt}/1"]) for name, prompt in MODELS.items()},
    "all four say passage": (
        {
            "input": TEXTS[1],
            "model": "jina-embeddings-v4-passage",
            "task": "retrieval.passage",
            "input_type": "document",
            "prompt_name": "passage",
        },
        ["passage/1"],
    ),
    "dimensions 128": ({"input": TEXTS[0], "dimensions": 128}, ["query/0/dense128"]),
    "dimensions 256": ({"input": TEXTS[0], "dimensions": 256}, ["query/0"]),
    "dimensions of an image": ({"input": {"image": IMAGES_BASE64[0]}, "dimensions": 128}, ["image/0 cut to 128"]),
    **{
        f"dimensions {size}": ({"input": TEXTS[0], "dimensions": size}, [f"query/0 cut to {size}"])
        for size in (1, 7, 100, 129, 255)
    },
    "content and output_dimension": (
        {"content": [TEXTS[0], {"image": IMAGES_BASE64[0]}], "output_dimension": 96},
        ["query/0 cut to 96", "image/0 cut to 96"],
    ),
    "texts, task_type and output_dimensionality": (
        {"texts": [TEXTS[0]], "task_type": "retrieval.passage", "output_dimensionality": 200},
        ["passage/0 cut to 200"],
    ),
    "all names of one field": (
        {"input": [TEXTS[0]], "content": [TEXTS[0]], "texts": [TEXTS[0]], "task": TASK, "task_type": TASK},
        ["query/0"],
    ),
    "max_length 16": ({"input": TEXTS[3], "max_length": 16}, ["query/3/max16"]),
    "max_length over the text": ({"input": TEXTS[0], "max_length": MAX_LENGTH}, ["query/0"]),
    "truncate what is short": ({"input": TEXTS[3], "truncate": True}, ["query/3"]),
    "truncate END": ({"input": TEXTS[3], "truncate": "END", "truncation": True}, ["query/3"]),
    "truncate NONE": ({"input": TEXTS[3], "truncate": "NONE"}, ["query/3"]),
    "truncate false": ({"input": TEXTS[3], "truncate": False}, ["query/3"]),
    "max_pixels over the image": ({"input": {"image": IMAGES_BASE64[3]}, "max_pixels": 602112}, ["image/3"]),
    "late chunking of one text": ({"input": [TEXTS[4]], "late_chunking": True}, ["query/4"]),
    "late chunking of a passage": (
        {"input": TEXTS[0], "late_chunking": True, "task": "retrieval.passage"},
        ["passage/0"],
    ),
    "no late chunking": ({"input": TEXTS[:2], "late_chunking": False}, ["query/0", "query/1"]),
    "return_multivector false": ({"input": TEXTS[0], "return_multivector": False}, ["query/0"]),
    "outputs dense": ({"input": TEXTS[0], "outputs": ["dense"]}, ["query/0"]),
    "all fields null": ({"input": TEXTS[0], **ALL_NULL}, ["query/0"]),
    "unknown fields": (
        {"input": TEXTS[0], "odd": "me", "odder": False, "oddest": [1, {}]},
        ["query/0"],
    ),
    "fields that cannot matter": (
        {"input": TEXTS[0], "user": "me", "metadata": {"a": 1}, "store": [1, {}], "cache_salt": "x", "rid": "y"},
        ["query/0"],
    ),
    "special tokens": (
        {"input": TEXTS[0], "add_special_tokens": True},
        ["query/0"],
    ),
    "no special tokens": (
        {"input": TEXTS[0], "add_special_tokens": False},
        ["query/0"],
    ),
    "fields that ask for what is done": (
        {
            "input": TEXTS[0],
            "normalized": True,
            "use_activation": True,
            "embd_normalize": 2,
            "truncation_side": "right",
            "padding": "do_not_pad",
            "embed_dtype": "float32",
            "endianness": "little",
            "mm_processor_kwargs": {},
            "messages": [],
        },
        ["query/0"],
    ),
    "truncate_prompt_tokens": ({"input": TEXTS[3], "truncate_prompt_tokens": 16}, ["query/3/max16"]),
    "truncate_prompt_tokens -1": ({"input": TEXTS[3], "truncate_prompt_tokens": -1}, ["query/3"]),
    "modality text": ({"input": TEXTS[0], "modality": "text"}, ["query/0"]),
    "modality image": (
        {"input": [IMAGES_BASE64[0], f"{SITE}/{IMAGES[2].name}"], "modality": "image"},
        ["image/0", "image/2"],
    ),
    **{
        f"a bare string that begins with {head!r}": (
            {"input": [TEXTS[0], head + IMAGES_BASE64[1]]},
            ["query/0", "image/1"],
        )
        for head in (
            URI,
            f" {URI}",
            URI.upper(),
            "data:;base64,",
            "data:image/*;base64,",
            "data:image/jpeg;charset=utf-8;base64,",
            "data: image/png;base64,",
            "",
        )
    },
}


@pytest.mark.parametrize(("body", "rows"), DENSE.values(), ids=DENSE.keys())
def test_a_form_gives_the_golden_rows(
    body: dict[str, Any], rows: list[str], wire: Wire, pictures: Site, golden: Golden
) -> None:
    answer = wire.ask(at_site(body, pictures))
    assert answer.keys() == {"object", "model", "data", "usage"}
    assert answer["object"] == "list"
    assert answer["model"] == (body.get("model") or f"jina-embeddings-v4-{TASK}")
    assert all(item.keys() == {"object", "index", "embedding"} for item in answer["data"])
    assert [(item["object"], item["index"]) for item in answer["data"]] == [("embedding", i) for i in range(len(rows))]
    assert_near([array(item["embedding"]) for item in answer["data"]], [golden_row(golden, name) for name in rows])
    n_tokens = sum(
        16 if "max16" in name else len(golden_row(golden, name.partition(" ")[0].removesuffix("/dense128"), "multi"))
        for name in rows
    )
    assert answer["usage"] == {"prompt_tokens": n_tokens, "total_tokens": n_tokens}


def url_part(image: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": image, "detail": "auto"}}


SYSTEM = {"role": "system", "content": "Represent the user's input."}
TEXT_PART = {"type": "text", "text": TEXTS[0]}
PARTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "text parts": ({"input": [TEXT_PART, {"type": "input_text", "text": TEXTS[1]}]}, ["query/0", "query/1"]),
    "a text part alone": ({"input": TEXT_PART}, ["query/0"]),
    "image parts": (
        {"input": [url_part(URI + IMAGES_BASE64[0]), {"type": "image_url", "image_url": f"{SITE}/{IMAGES[2].name}"}]},
        ["image/0", "image/2"],
    ),
    "an image part of OpenAI's responses API": (
        {"input": [{"type": "input_image", "image_url": URI + IMAGES_BASE64[1], "detail": "auto"}]},
        ["image/1"],
    ),
    "content of one part": (
        {"input": [{"content": [url_part(URI + IMAGES_BASE64[3])]}, {"content": [TEXT_PART]}]},
        ["image/3", "query/0"],
    ),
    "content that is a text": ({"input": [{"content": TEXTS[0]}]}, ["query/0"]),
    "content as Elastic has it": (
        {
            "input": [
                {"content": {"type": "image", "format": "base64", "value": URI + IMAGES_BASE64[0]}},
                {"content": [{"type": "text", "format": "text", "value": TEXTS[0]}]},
            ]
        },
        ["image/0", "query/0"],
    ),
    "an image part and an empty text": (
        {"input": [{"content": [url_part(URI + IMAGES_BASE64[0]), {"type": "text", "text": ""}]}]},
        ["image/0"],
    ),
    "parts, strings and items mixed": (
        {"input": [TEXTS[0], TEXT_PART, {"text": TEXTS[1]}, url_part(IMAGES_BASE64[3])], "prompt_name": "passage"},
        ["passage/0", "passage/0", "passage/1", "image/3"],
    ),
    "a chat with a text": ({"messages": [user(TEXTS[0])]}, ["query/0"]),
    "a chat with a text part": ({"messages": [user([TEXT_PART])], "prompt_name": "passage"}, ["passage/0"]),
    "a chat with an image": (
        {"messages": [user([url_part(URI + IMAGES_BASE64[1])])], "encoding_format": "float"},
        ["image/1"],
    ),
    "a chat with an instruction": ({"messages": [SYSTEM, user(TEXTS[0])]}, ["query/0"]),
    "a chat with an empty answer": (
        {"messages": [SYSTEM, user(TEXTS[0]), {"role": "assistant", "content": [{"type": "text", "text": ""}]}]},
        ["query/0"],
    ),
    "several chats": ({"messages": [[user(TEXTS[0])], [user([url_part(IMAGES_BASE64[0])])]]}, ["query/0", "image/0"]),
}


@pytest.mark.parametrize(("body", "rows"), PARTS.values(), ids=PARTS.keys())
def test_parts_and_chats_give_the_golden_rows(
    body: dict[str, Any], rows: list[str], wire: Wire, pictures: Site, golden: Golden
) -> None:
    answer = wire.ask(at_site(body, pictures))
    assert_near([array(item["embedding"]) for item in answer["data"]], [golden_row(golden, name) for name in rows])


def test_a_chat_gives_the_very_vectors_of_the_plain_form(wire: Wire) -> None:
    for item, content in (
        ({"image": IMAGES_BASE64[2]}, [url_part(IMAGES_BASE64[2])]),
        ({"text": TEXTS[3]}, TEXTS[3]),
    ):
        both = {"outputs": ["dense", "multivector"]}
        plain = wire.ask({"input": [item], **both})
        answer = wire.ask({"messages": [SYSTEM, user(content)], **both})
        for kind in ("embedding", "embeddings"):
            assert_near([array(answer["data"][0][kind])], [array(plain["data"][0][kind])])
        assert {**answer, "data": None} == {**plain, "data": None}


def test_an_instruction_that_was_left_out_is_named(wire: Wire) -> None:
    answer = wire.post({"messages": [[user("x")], [SYSTEM, user("y"), SYSTEM | {"role": "developer"}]], "odd": 1})
    assert answer.headers["x-jina-v4-warning"] == (
        "instructions left out, as the model's prompt has none: messages[1][0], messages[1][2];"
        " unknown fields ignored: odd"
    )
    assert "x-jina-v4-warning" not in wire.post({"messages": [user("x")]}).headers


ENCODINGS = ("float", "base64", "int8", "uint8", "binary", "ubinary")
ENCODING_NAMES = ("embedding_type", "encoding_format", "encoding_type", "embedding_types")


def encoded(row: Array, encoding: str) -> Any:
    bits = np.packbits(row > 0)
    values = {
        "base64": lambda: base64.b64encode(row.astype("<f4").tobytes()).decode(),
        "binary": lambda: [int(byte) - 128 for byte in bits],
        "ubinary": bits.tolist,
        "int8": lambda: quantize_int8(row[None]).codes[0].tolist(),  # the client's own
        "uint8": lambda: (quantize_int8(row[None]).codes[0].astype(int) + 128).tolist(),
    }
    return values[encoding]()


@pytest.mark.parametrize("dimensions", [None, 128], ids=["whole", "cut to 128"])
@pytest.mark.parametrize("field", ENCODING_NAMES)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("listed", [False, True], ids=["named", "in a list"])
def test_an_encoding_holds_the_golden_row(
    encoding: str, field: str, dimensions: int | None, listed: bool, wire: Wire, golden: Golden
) -> None:
    body = {"input": TEXTS[0], "dimensions": dimensions, field: [encoding] if listed else encoding}
    (item,) = wire.ask(body)["data"]
    row = golden_row(golden, "query/0" if dimensions is None else "query/0/dense128")
    if encoding in ("binary", "ubinary"):
        assert np.abs(row).min() > BOUND, "no sign may hang on a rounding"
        assert item["embedding"] == encoded(row, encoding)
        return
    vector = item["embedding"]
    if encoding in ("int8", "uint8"):
        codes = np.array(vector) - (128 if encoding == "uint8" else 0)
        assert np.abs(codes).max() == 127
        assert np.abs(codes - row / np.abs(row).max() * 127).max() <= 0.5 + 127 * BOUND / np.abs(row).max()
        assert 1 - float(codes @ row) / float(np.linalg.norm(codes)) < 1e-4
        return
    found = np.frombuffer(base64.b64decode(vector), "<f4") if encoding == "base64" else array(vector)
    assert_near([found], [row])


@pytest.mark.parametrize("body", [{}, {"return_multivector": True}], ids=["dense", "multi-vector"])
def test_several_encodings_are_named_and_agree_to_the_bit(body: dict[str, Any], wire: Wire) -> None:
    inputs = [TEXTS[0], {"image": IMAGES_BASE64[3]}]
    answer = wire.ask({"input": inputs, "embedding_type": list(ENCODINGS), **body})
    for item in answer["data"]:
        rows = item["embeddings"] if body else [item["embedding"]]
        for row in rows:
            assert row.keys() == set(ENCODINGS)
            floats = array(row["float"])
            assert {name: row[name] for name in ENCODINGS[1:]} == {
                name: encoded(floats, name) for name in ENCODINGS[1:]
            }


def test_output_dtype_is_the_same_field_of_one_value(wire: Wire) -> None:
    for encoding in ("float", "int8", "uint8", "binary", "ubinary"):
        plain = wire.ask({"input": TEXTS[0], "embedding_type": encoding, "dimensions": 96})
        assert wire.ask({"texts": TEXTS[0], "output_dtype": encoding, "output_dimension": 96})["data"] == plain["data"]


def test_both_names_of_the_encoding_may_be_given_when_they_agree(wire: Wire) -> None:
    (item,) = wire.ask({"input": "x", "embedding_type": "base64", "encoding_format": ["base64"]})["data"]
    assert isinstance(item["embedding"], str)


MULTI = {
    "return_multivector": {"return_multivector": True},
    "outputs multivector": {"outputs": ["multivector"]},
    "both fields": {"outputs": ["multivector"], "return_multivector": True},
    "as base64": {"return_multivector": True, "embedding_type": "base64"},
    "a pool_factor of 1": {"return_multivector": True, "pool_factor": 1},
}


@pytest.mark.parametrize("body", MULTI.values(), ids=MULTI.keys())
def test_a_multi_vector_is_the_golden_one(body: dict[str, Any], wire: Wire, golden: Golden) -> None:
    inputs = [*TEXTS, *({"image": image} for image in IMAGES_BASE64)]
    answer = wire.ask({"input": inputs, **body, "task": "retrieval.passage"})
    assert [item["object"] for item in answer["data"]] == ["embeddings"] * 10
    assert all(item.keys() == {"object", "index", "embeddings"} for item in answer["data"])
    names = [f"passage/{i}" for i in range(6)] + [f"image/{i}" for i in range(4)]
    expected = [golden_row(golden, name, "multi") for name in names]
    found = [item["embeddings"] for item in answer["data"]]
    if body.get("embedding_type") == "base64":
        found = [[np.frombuffer(base64.b64decode(row), "<f4") for row in rows] for rows in found]
    assert_near([array(rows) for rows in found], expected)
    assert answer["usage"]["total_tokens"] == sum(map(len, expected))


def test_binary_rows_of_a_multi_vector_are_the_golden_signs(wire: Wire, golden: Golden) -> None:
    (item,) = wire.ask({"input": TEXTS[0], "return_multivector": True, "embedding_type": "ubinary"})["data"]
    expected = golden_row(golden, "query/0", "multi")
    assert np.array_equal(item["embeddings"], np.packbits(expected > 0, axis=1))


@pytest.mark.parametrize("dimensions", [None, 128], ids=["whole", "cut to 128"])
def test_both_outputs_of_one_call_are_those_of_two(dimensions: int | None, wire: Wire, golden: Golden) -> None:
    inputs = [TEXTS[0], {"image": IMAGES_BASE64[0]}, TEXTS[3]]
    both = wire.ask({"input": inputs, "outputs": ["dense", "multivector"], "dimensions": dimensions})
    dense = wire.ask({"input": inputs, "outputs": ["dense"], "dimensions": dimensions})
    multi = wire.ask({"input": inputs, "outputs": ["multivector"]})
    assert both["usage"] == dense["usage"] == multi["usage"]
    for item, one, other in zip(both["data"], dense["data"], multi["data"], strict=True):
        assert item.keys() == {"object", "index", "embedding", "embeddings"}
        assert_near([array(item["embedding"])], [array(one["embedding"])])
        assert_near([array(item["embeddings"])], [array(other["embeddings"])])
    assert_near([array(both["data"][0]["embeddings"])], [golden_row(golden, "query/0", "multi")])


def test_a_smaller_image_has_fewer_tokens_and_another_vector(wire: Wire, golden: Golden) -> None:
    answer = wire.ask({"input": {"image": IMAGES_BASE64[2]}, "max_pixels": 200_704})
    n_tokens = answer["usage"]["total_tokens"]
    assert n_tokens <= 200_704 // 784 + 11 < len(golden_row(golden, "image/2", "multi"))
    assert np.abs(array(answer["data"][0]["embedding"]) - golden_row(golden, "image/2")).max() > 100 * BOUND


def test_truncate_cuts_a_long_text_to_the_limit(wire: Wire) -> None:
    """One that is far over it, and in the same request one that is not."""
    answer = wire.ask({"input": ["a b " * 20_000, TEXTS[0]], "truncate": True})
    assert answer["usage"]["total_tokens"] == MAX_LENGTH + 10
    longest = wire.ask({"input": "a b " * 20_000, "max_length": MAX_LENGTH})
    assert_near([array(answer["data"][0]["embedding"])], [array(longest["data"][0]["embedding"])])


def tensors_of(content: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read safetensors by hand: the tensors and the header."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    dtypes = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I8": "<i1", "U8": "<u1"}
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = (8 + size + offset for offset in entry["data_offsets"])
            tensors[name] = np.frombuffer(content[start:end], dtypes[entry["dtype"]]).reshape(entry["shape"])
    return tensors, header


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("outputs", [["dense"], ["multivector"], ["dense", "multivector"]], ids="+".join)
def test_safetensors_hold_the_whole_answer(dtype: str, outputs: list[str], wire: Wire, golden: Golden) -> None:
    items = [*TEXTS, {"image": IMAGES_BASE64[0]}]
    names = [f"query/{i}" for i in range(6)] + ["image/0"]
    body = {"input": items, "outputs": outputs, "model": "jina-embeddings-v4"}
    answer = wire.post(body, accept=SAFETENSORS + ("; dtype=float16" if dtype == "float16" else ""))
    assert answer.status_code == 200
    assert answer.headers["content-type"] == SAFETENSORS
    tensors, header = tensors_of(answer.content)
    expected = [golden_row(golden, name, "multi") for name in names]
    bound = BOUND if dtype == "float32" else 2**-11
    wanted = {"dense": {"dense"}, "multivector": {"multivector", "offsets"}}
    assert tensors.keys() == set().union(*(wanted[output] for output in outputs))
    if "dense" in outputs:
        assert tensors["dense"].dtype == dtype
        assert_near(list(tensors["dense"].astype("f4")), [golden_row(golden, name) for name in names], bound)
    if "multivector" in outputs:
        assert tensors["multivector"].dtype == dtype
        assert tensors["offsets"].tolist() == np.cumsum([0, *map(len, expected)]).tolist()
        found = [tensors["multivector"][start:end].astype("f4") for start, end in pairwise(tensors["offsets"])]
        assert_near(found, expected, bound)
    n_tokens = str(sum(map(len, expected)))
    assert header["__metadata__"] == {
        "model": "jina-embeddings-v4",
        "prompt_tokens": n_tokens,
        "total_tokens": n_tokens,
    }


def test_safetensors_hold_quantized_vectors_in_fewer_bytes(wire: Wire, golden: Golden) -> None:
    """Pooled, and as codes: near what the client's functions make of the golden rows; to the bit in test_serve_pool."""
    names = ["passage/0", "passage/3", "image/1"]
    body = {
        "input": [TEXTS[0], TEXTS[3], {"image": IMAGES_BASE64[1]}],
        "outputs": ["dense", "multivector"],
        "prompt_name": "passage",
        "pool_factor": 2,
    }
    expected = pool_tokens([golden_row(golden, name, "multi") for name in names], 2)
    plain, _ = tensors_of(wire.post(body, accept=SAFETENSORS).content)
    assert plain["offsets"].tolist() == np.cumsum([0, *map(len, expected)]).tolist()
    assert_near([plain["multivector"]], [np.concatenate(expected)])
    codes, _ = tensors_of(wire.post({**body, "embedding_type": "int8"}, accept=SAFETENSORS).content)
    assert codes.keys() == {"dense", "dense_scales", "multivector", "multivector_scales", "offsets"}
    assert (codes["multivector"].dtype, codes["dense"].dtype) == (np.int8, np.int8)
    read = Int8Vectors(codes["multivector"], codes["multivector_scales"], codes["offsets"])
    assert len(read) == 3
    assert_near([read.read(0, read.n_rows)], [plain["multivector"]], 2**-8)
    assert_near([codes["dense"] * codes["dense_scales"][:, None]], [plain["dense"]], 2**-8)
    bits, _ = tensors_of(wire.post({**body, "embedding_type": "ubinary"}, accept=SAFETENSORS).content)
    assert bits["multivector"].shape == (len(plain["multivector"]), 16)
    far = np.abs(plain["multivector"]) > BOUND
    assert (np.unpackbits(bits["multivector"], axis=1) == (plain["multivector"] > 0))[far].all()


def test_safetensors_hold_cut_vectors_and_late_chunks(wire: Wire, golden: Golden) -> None:
    answer = wire.post({"input": TEXTS[0], "dimensions": 128}, accept=SAFETENSORS)
    assert_near(list(tensors_of(answer.content)[0]["dense"]), [golden_row(golden, "query/0/dense128")])
    answer = wire.post({"input": TEXTS[:3], "late_chunking": True}, accept=SAFETENSORS)
    assert tensors_of(answer.content)[0]["dense"].shape == (3, 256)


@pytest.mark.parametrize(
    "accept", ["*/*", "application/json", "text/html", "application/json, */*;q=0.1", f"{SAFETENSORS};q=0.0, */*"]
)
def test_anything_else_that_is_accepted_gets_json(accept: str, wire: Wire) -> None:
    assert wire.ask({"input": "x"}, accept=accept)["object"] == "list"


def test_errors_are_json_though_tensors_are_accepted(wire: Wire) -> None:
    answer = wire.post({"input": []}, accept=SAFETENSORS)
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/json")


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "APPLICATION/JSON", None])
def test_json_may_be_announced_in_many_ways(kind: str | None, wire: Wire) -> None:
    headers = {} if kind is None else {"content-type": kind}
    assert wire.http.post("/v1/embeddings", content=b'{"input": "x"}', headers=headers).status_code == 200


COHERE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "queries": ({"texts": TEXTS, "input_type": "search_query"}, [f"query/{i}" for i in range(6)]),
    "documents": ({"texts": TEXTS[:2], "input_type": "search_document"}, ["passage/0", "passage/1"]),
    "a model for passages": ({"texts": TEXTS[:1], "model": "jina-embeddings-v4-retrieval-passage"}, ["passage/0"]),
    "images": (
        {"images": [URI + IMAGES_BASE64[0], f"{SITE}/{IMAGES[2].name}"], "input_type": "image"},
        ["image/0", "image/2"],
    ),
    "inputs": (
        {
            "inputs": [{"content": [TEXT_PART]}, {"content": [url_part(IMAGES_BASE64[1])]}],
            "input_type": "search_document",
        },
        ["passage/0", "image/1"],
    ),
    "output_dimension": (
        {"texts": TEXTS[:1], "input_type": "search_query", "output_dimension": 96},
        ["query/0 cut to 96"],
    ),
    "max_tokens": ({"texts": [TEXTS[3]], "input_type": "search_query", "max_tokens": 16}, ["query/3/max16"]),
}


def cohere(wire: Wire, body: dict[str, Any]) -> Any:
    answer = wire.http.post("/v2/embed", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize(("body", "rows"), COHERE.values(), ids=COHERE.keys())
def test_coheres_form_gives_the_golden_rows(
    body: dict[str, Any], rows: list[str], wire: Wire, pictures: Site, golden: Golden
) -> None:
    answer = cohere(wire, at_site(body, pictures))
    assert answer.keys() == {"id", "embeddings", "texts", "meta", "response_type"}
    assert answer["response_type"] == "embeddings_by_type"
    assert answer["embeddings"].keys() == {"float"}
    assert_near([array(row) for row in answer["embeddings"]["float"]], [golden_row(golden, name) for name in rows])
    assert answer["texts"] == body.get("texts", [TEXTS[0]] if "inputs" in body else [])


def test_coheres_types_agree_to_the_bit_with_the_plain_form(wire: Wire) -> None:
    embeddings = cohere(
        wire,
        {"texts": TEXTS[:2], "input_type": "search_query", "embedding_types": [*ENCODINGS], "output_dimension": 96},
    )["embeddings"]
    plain = wire.ask({"input": TEXTS[:2], "dimensions": 96, "embedding_type": [*ENCODINGS]})["data"]
    assert [{name: embeddings[name][i] for name in ENCODINGS} for i in range(2)] == [
        {name: item["embedding"][name] for name in ENCODINGS} for item in plain
    ]


def test_coheres_form_cuts_long_texts_and_counts_tokens(wire: Wire) -> None:
    body = {"texts": ["a b " * 20_000, TEXTS[0]], "input_type": "search_query"}
    units = cohere(wire, body)["meta"]["billed_units"]
    assert units == {"input_tokens": MAX_LENGTH + 10, "image_tokens": 0}


def test_an_example_of_every_kind_on_the_openapi_page_is_answered(wire: Wire) -> None:
    page = wire.http.get("/openapi.json").json()
    n_sent = 0
    for path in ("/v1/embeddings", "/v2/embed", *RANKINGS):
        content = page["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        for name, example in content["examples"].items():
            answer = wire.http.post(path, json=example["value"])
            assert answer.status_code == 200, (name, answer.text)
            n_sent += 1
    assert n_sent >= 16


def test_a_model_name_with_none_puts_nothing_before_a_text(wire: Wire, golden: Golden) -> None:
    texts = [f"Query: {TEXTS[0]}", f"Passage: {TEXTS[1]}"]
    for name in ("jina-embeddings-v4-none", "jina-embeddings-v4-retrieval-none"):
        answer = wire.ask({"input": texts, "model": name})
        found = [array(item["embedding"]) for item in answer["data"]]
        assert_near(found, [golden_row(golden, "query/0"), golden_row(golden, "passage/1")])


def test_every_reply_names_the_prompt_that_it_used(wire: Wire) -> None:
    picture = {"image": IMAGES_BASE64[3]}
    for body, prompt in (
        ({"input": "x"}, "query"),
        ({"input": "x", "task": "retrieval.passage"}, "passage"),
        ({"input": "x", "model": "jina-embeddings-v4-none"}, "none"),
        ({"input": [picture]}, "image"),
        ({"input": ["x", picture], "prompt_name": "passage"}, "passage, image"),
        ({"messages": [user([url_part(IMAGES_BASE64[3])])]}, "image"),
    ):
        for accept in ("application/json", SAFETENSORS):
            assert wire.post(body, accept=accept).headers["x-jina-v4-prompt"] == prompt
    answer = wire.http.post("/v2/embed", json={"texts": ["x"], "input_type": "search_document"})
    assert answer.headers["x-jina-v4-prompt"] == "passage"


def n_prefixed(wire: Wire) -> float:
    (line,) = re.findall(
        r'^jina_v4_prefixed_texts_total{.*task="retrieval".*} (\S+)$', wire.http.get("/metrics").text, re.M
    )
    return float(line)


def test_a_prefix_that_is_there_already_is_counted_and_named_and_changes_nothing(wire: Wire, judge: "Judge") -> None:
    before = n_prefixed(wire)
    text = "Query: where is the sea?"
    answer = wire.post({"input": ["x", text, {"text": text}, "Passage: y"]})
    assert answer.headers["x-jina-v4-warning"] == (
        "texts that already began with 'Query:', which was added again: input[1], input[2]"
    )
    assert n_prefixed(wire) - before == 2
    expected = judge.mean(judge.rows(judge.plain.encode(f"Query: {text}").ids))
    assert_near([array(answer.json()["data"][1]["embedding"])], [expected])
    again = wire.post({"input": text, "prompt_name": "none"})
    assert "x-jina-v4-warning" not in again.headers
    assert n_prefixed(wire) - before == 2


class Judge:
    """The folded model in plain transformers: hidden states of any token ids; a tokenizer without special tokens."""

    def __init__(self, checkpoint: Path) -> None:
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.parsing: Tokenizer = AutoTokenizer.from_pretrained(checkpoint).backend_tokenizer
        self.plain = Tokenizer(self.parsing.model)  # knows the merges and nothing else
        self.plain.normalizer, self.plain.pre_tokenizer = self.parsing.normalizer, self.parsing.pre_tokenizer

    @torch.inference_mode()
    def rows(self, token_ids: list[int]) -> Array:
        hidden: Array = self.model.model(input_ids=torch.tensor([token_ids])).last_hidden_state[0].numpy()
        return hidden

    def mean(self, rows: Array) -> Array:
        mean = rows.mean(0)
        return array(mean / np.linalg.norm(mean))


@pytest.fixture(scope="module")
def judge(folded: Callable[[str], Path]) -> Judge:
    return Judge(folded("float32") / f"jina-embeddings-v4-{TASK}")


@pytest.mark.parametrize("prompt_name", ["query", "passage"])
def test_late_chunks_are_the_means_of_their_spans_of_one_text(prompt_name: str, judge: Judge, wire: Wire) -> None:
    texts = [TEXTS[0], TEXTS[1], "", TEXTS[4]]
    answer = wire.ask({"input": texts, "late_chunking": True, "prompt_name": prompt_name, "embedding_type": "base64"})
    parts = [f"{prompt_name.capitalize()}: {texts[0]}", *(f" {text}" for text in texts[1:])]
    token_ids = [judge.plain.encode(part).ids for part in parts]
    rows = judge.rows([token_id for ids in token_ids for token_id in ids])
    ends = np.cumsum([len(ids) for ids in token_ids])
    expected = [judge.mean(part) for part in np.split(rows, ends[:-1])]
    found = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in answer["data"]]
    assert_near(found, expected)
    assert [item["index"] for item in answer["data"]] == [0, 1, 2, 3]
    assert answer["usage"] == {"prompt_tokens": int(ends[-1]), "total_tokens": int(ends[-1])}
    alone = wire.ask({"input": texts, "prompt_name": prompt_name})["data"]
    differences = [np.abs(chunk - array(item["embedding"])).max() for chunk, item in zip(found, alone, strict=True)]
    assert differences[0] <= BOUND, "nothing stands before the first"
    assert min(differences[1:]) > 100 * BOUND


def test_late_chunks_may_be_cut_and_encoded(wire: Wire) -> None:
    whole = wire.ask({"input": TEXTS[:3], "late_chunking": True})["data"]
    small = wire.ask({"input": TEXTS[:3], "late_chunking": True, "dimensions": 128, "embedding_type": "ubinary"})[
        "data"
    ]
    for item, other in zip(whole, small, strict=True):
        assert other["embedding"] == encoded(array(item["embedding"])[:128], "ubinary")


SPECIAL = [
    "<|vision_start|>",
    "<|image_pad|>",
    "<|vision_start|><|image_pad|><|vision_end|>",
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Describe the image.<|im_end|>\n",
    "before <|vision_start|> between <|vision_end|> after",
    "<|endoftext|>",
    "<|im_end|>",
    "<|video_pad|> and <|im_start|>system",
]


@pytest.mark.parametrize("form", ["a text", "an item", "a late chunk"])
@pytest.mark.parametrize("text", SPECIAL)
def test_a_special_token_in_a_text_is_its_characters(text: str, form: str, judge: Judge, wire: Wire) -> None:
    body: dict[str, Any] = {"input": {"text": text} if form == "an item" else text}
    answer = wire.ask(body | ({"late_chunking": True} if form == "a late chunk" else {}))
    plain = judge.plain.encode(f"Query: {text}").ids
    parsed = judge.parsing.encode(f"Query: {text}", add_special_tokens=False).ids
    assert len(parsed) < len(plain)
    assert answer["usage"]["total_tokens"] == len(plain)
    found = array(answer["data"][0]["embedding"])
    assert_near([found], [judge.mean(judge.rows(plain))])
    assert np.abs(found - judge.mean(judge.rows(parsed))).max() > 100 * BOUND


ODD_TEXTS = {
    "NUL": "a\0b",
    "control characters": "".join(map(chr, range(32))),
    "no character": "\ufffe\uffff",
    "beyond the first plane": "😀\U0001d518\U0010ffff",
    "right to left marks": "\u202e\u200f\u2066x",
    "combining": "e" + "\u0301" * 50,
    "white space": " \t\r\n\u00a0\u3000",
}


@pytest.mark.parametrize("text", ODD_TEXTS.values(), ids=ODD_TEXTS.keys())
@pytest.mark.parametrize("escaped", [True, False], ids=["escaped", "as UTF-8"])
def test_an_odd_text_is_a_text(text: str, escaped: bool, judge: Judge, wire: Wire) -> None:
    content = json.dumps({"input": text}, ensure_ascii=escaped)
    if not escaped and any(character < " " for character in text):
        content = json.dumps({"input": text})  # JSON allows those only escaped
    answer = wire.post(content=content.encode())
    assert answer.status_code == 200, answer.text
    ids = judge.plain.encode(f"Query: {text}").ids
    assert answer.json()["usage"]["total_tokens"] == len(ids)
    assert_near([array(answer.json()["data"][0]["embedding"])], [judge.mean(judge.rows(ids))])


def test_of_two_fields_of_one_name_the_last_counts(wire: Wire) -> None:
    answer = wire.post(content=b'{"input": "x", "dimensions": 256, "dimensions": 128}')
    assert len(answer.json()["data"][0]["embedding"]) == 128


def test_every_answer_says_what_the_server_is(wire: Wire) -> None:
    answers: list[httpx2.Response] = [
        *(
            wire.http.get(path)
            for path in ("/v1/models", "/health", "/ready", "/metrics", "/version", "/docs", "/none")
        ),
        wire.post({"input": "x"}),
        wire.post({"input": []}),
    ]
    for answer in answers:
        assert answer.headers["x-jina-v4-task"] == TASK
        assert answer.headers["x-jina-v4-pooling"] == "engine"
        assert re.fullmatch(r"[0-9a-f]{16}-float32-602112", answer.headers["x-jina-v4-revision"])
        assert answer.headers.get_list("x-request-id") == [answer.headers["x-request-id"]]
    assert len({answer.headers["x-request-id"] for answer in answers}) == len(answers)


@pytest.mark.parametrize(
    ("sent", "echoed"),
    [
        ("abc-123_X.y", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("a b", False),
        ("<script>", False),
        ("../../log", False),
        ("", False),
    ],
)
def test_a_sane_request_id_comes_back(sent: str, echoed: bool, wire: Wire) -> None:
    for body in ({"input": "x"}, {"input": []}):
        answer = wire.post(body, x_request_id=sent)
        assert (answer.headers["x-request-id"] == sent) is echoed
        if answer.status_code != 200:
            assert answer.json()["detail"]["request_id"] == answer.headers["x-request-id"]


def test_one_request_id_may_be_used_by_many_at_once(wire: Wire, golden: Golden) -> None:
    """vLLM names its requests; two of one name must not get in each other's way."""

    def ask(i: int) -> Array:
        return array(wire.ask({"input": TEXTS[i % 6]}, x_request_id="same")["data"][0]["embedding"])

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(48)))
    assert_near(found, [golden_row(golden, f"query/{i % 6}") for i in range(48)])


def test_the_openapi_page_shows_the_real_fields_and_only_our_routes(wire: Wire) -> None:
    page = wire.http.get("/openapi.json").json()
    assert page["paths"].keys() == ROUTES
    schema = page["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"].keys() == FIELDS
    assert "required" not in schema
    assert all(field.get("description") for field in schema["properties"].values())
    assert {"200", "400", "401", "404", "422", "429"} <= page["paths"]["/v1/embeddings"]["post"]["responses"].keys()


def test_the_page_of_the_schema_needs_no_other_host(wire: Wire) -> None:
    page = wire.http.get("/docs")
    assert page.status_code == 200
    assert "/openapi.json" in page.text
    needed = re.findall(r"""(?:src|href)=["']([^"']+)""", page.text)
    assert sorted(needed) == ["/static/swagger-ui-bundle.js", "/static/swagger-ui.css", "data:,"]
    for path in sorted(needed)[:2]:
        assert len(wire.http.get(path).content) > 100_000


@pytest.mark.parametrize("field", ENCODING_NAMES)
def test_the_openapi_page_allows_the_name_of_one_encoding(field: str, wire: Wire) -> None:
    page = wire.http.get("/openapi.json").json()
    schema = page["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    offered = [kind for kind in schema["properties"][field]["anyOf"] if kind.get("type") == "string"]
    assert [sorted(kind["enum"]) for kind in offered] == [sorted(ENCODINGS)]


def test_the_models_page_names_the_model_and_no_path(wire: Wire) -> None:
    (card,) = wire.http.get("/v1/models").json()["data"]
    assert card["id"] == f"jina-embeddings-v4-{TASK}"
    assert card["max_model_len"] == MAX_LENGTH
    assert not str(card["root"]).startswith("/"), "the folder of the checkpoint is nobody's business"
