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
from conftest import Golden
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
    "input",
    "model",
    "task",
    "prompt_name",
    "input_type",
    "dimensions",
    "embedding_type",
    "encoding_format",
    "outputs",
    "return_multivector",
    "late_chunking",
    "truncate",
    "max_length",
    "max_pixels",
}
ROUTES = {"/v1/embeddings", "/v1/models", "/health", "/ready", "/metrics", "/version"}


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
    "max_length 16": ({"input": TEXTS[3], "max_length": 16}, ["query/3/max16"]),
    "max_length over the text": ({"input": TEXTS[0], "max_length": MAX_LENGTH}, ["query/0"]),
    "truncate what is short": ({"input": TEXTS[3], "truncate": True}, ["query/3"]),
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
        {"input": TEXTS[0], "user": "me", "normalized": False, "truncate_prompt_tokens": 2, "priority": [1, {}]},
        ["query/0"],
    ),
    "fields of vLLM that are gone": (
        {"input": TEXTS[0], "add_special_tokens": True, "mm_processor_kwargs": {"max_pixels": 1}, "messages": []},
        ["query/0"],
    ),
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


ENCODINGS = ("float", "base64", "binary", "ubinary")


def encoded(row: Array, encoding: str) -> Any:
    bits = np.packbits(row > 0)
    values = {
        "base64": lambda: base64.b64encode(row.astype("<f4").tobytes()).decode(),
        "binary": lambda: [int(byte) - 128 for byte in bits],
        "ubinary": bits.tolist,
    }
    return values[encoding]()


@pytest.mark.parametrize("dimensions", [None, 128], ids=["whole", "cut to 128"])
@pytest.mark.parametrize("field", ["embedding_type", "encoding_format"])
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


def test_both_names_of_the_encoding_may_be_given_when_they_agree(wire: Wire) -> None:
    (item,) = wire.ask({"input": "x", "embedding_type": "base64", "encoding_format": ["base64"]})["data"]
    assert isinstance(item["embedding"], str)


MULTI = {
    "return_multivector": {"return_multivector": True},
    "outputs multivector": {"outputs": ["multivector"]},
    "both fields": {"outputs": ["multivector"], "return_multivector": True},
    "as base64": {"return_multivector": True, "embedding_type": "base64"},
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
        assert_near([array(item["embedding"])], [array(one["embedding"])], 1e-6)
        assert_near([array(item["embeddings"])], [array(other["embeddings"])], 1e-6)
    assert_near([array(both["data"][0]["embeddings"])], [golden_row(golden, "query/0", "multi")])


def test_a_smaller_image_has_fewer_tokens_and_another_vector(wire: Wire, golden: Golden) -> None:
    answer = wire.ask({"input": {"image": IMAGES_BASE64[2]}, "max_pixels": 200_704})
    n_tokens = answer["usage"]["total_tokens"]
    assert n_tokens <= 200_704 // 784 + 11 < len(golden_row(golden, "image/2", "multi"))
    assert np.abs(array(answer["data"][0]["embedding"]) - golden_row(golden, "image/2")).max() > 100 * BOUND


def test_truncate_cuts_to_the_limit(wire: Wire) -> None:
    """One that is far over it, and in the same request one that is not."""
    answer = wire.ask({"input": ["a b " * 20_000, TEXTS[0]], "truncate": True})
    assert answer["usage"]["total_tokens"] == MAX_LENGTH + 10
    longest = wire.ask({"input": "a b " * 20_000, "max_length": MAX_LENGTH})
    assert_near([array(answer["data"][0]["embedding"])], [array(longest["data"][0]["embedding"])])


def tensors_of(content: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read safetensors by hand: the tensors and the header."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    dtypes = {"F32": "<f4", "F16": "<f2", "I64": "<i8"}
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


def test_safetensors_of_a_cut_and_of_late_chunks(wire: Wire, golden: Golden) -> None:
    answer = wire.post({"input": TEXTS[0], "dimensions": 128}, accept=SAFETENSORS)
    assert_near(list(tensors_of(answer.content)[0]["dense"]), [golden_row(golden, "query/0/dense128")])
    answer = wire.post({"input": TEXTS[:3], "late_chunking": True}, accept=SAFETENSORS)
    assert tensors_of(answer.content)[0]["dense"].shape == (3, 256)


@pytest.mark.parametrize("accept", ["*/*", "application/json", "text/html", "application/json, */*;q=0.1"])
def test_anything_else_that_is_accepted_gets_json(accept: str, wire: Wire) -> None:
    assert wire.ask({"input": "x"}, accept=accept)["object"] == "list"


def test_errors_are_json_though_tensors_are_accepted(wire: Wire) -> None:
    answer = wire.post({"input": []}, accept=SAFETENSORS)
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/json")


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "APPLICATION/JSON", None])
def test_json_may_be_announced_in_many_ways(kind: str | None, wire: Wire) -> None:
    headers = {} if kind is None else {"content-type": kind}
    assert wire.http.post("/v1/embeddings", content=b'{"input": "x"}', headers=headers).status_code == 200


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
    assert schema["required"] == ["input"]
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


@pytest.mark.parametrize("field", ["embedding_type", "encoding_format"])
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
