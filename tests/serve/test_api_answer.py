"""Encodings against numpy, and both bodies of an answer."""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jina_v4_client.quantization import quantize_int8
from jina_v4_serve.api.forms.reply import as_safetensors, encode, headers, write
from jina_v4_serve.api.request import EmbedRequest, Item
from jina_v4_serve.api.vectors import Vectors
from numpy.typing import NDArray
from safetensors import deserialize
from safetensors.numpy import load

ROW = arrays(np.float32, 128, elements=st.floats(-1, 1, width=32))


def vectors(n_tokens: int, seed: int) -> Vectors:
    random = np.random.default_rng(seed)
    return Vectors(
        random.standard_normal((1, 256), dtype=np.float32),
        random.standard_normal((n_tokens, 128), dtype=np.float32),
        n_tokens,
    )


def asked(**fields: object) -> EmbedRequest:
    usual = {
        "task": "retrieval",
        "model": "m",
        "items": [Item(text="a")],
        "prompt_name": "query",
        "prefix": "Query: ",
    }
    return EmbedRequest(**(usual | fields))  # type: ignore[arg-type]


def in_json(request: EmbedRequest, items: Sequence[Vectors]) -> Any:
    return orjson.loads(orjson.dumps(write(request, items, "id"), option=orjson.OPT_SERIALIZE_NUMPY))


@given(ROW)
def test_floats_come_back_as_they_were(row: NDArray[np.float32]) -> None:
    text = orjson.dumps(encode(row, "float"), option=orjson.OPT_SERIALIZE_NUMPY)
    np.testing.assert_array_equal(np.array(orjson.loads(text), np.float32), row)
    assert base64.b64decode(encode(row, "base64")) == row.astype("<f4").tobytes()


@given(ROW)
def test_bits_are_the_signs_packed_into_bytes(row: NDArray[np.float32]) -> None:
    expected = [int("".join("1" if value > 0 else "0" for value in row[i : i + 8]), 2) for i in range(0, 128, 8)]
    assert encode(row, "ubinary") == expected
    assert encode(row, "binary") == [byte - 128 for byte in expected]


def test_json_has_dense_and_multi_vectors_in_their_fields() -> None:
    items = [vectors(3, 0), vectors(5, 1)]
    both = in_json(asked(outputs=frozenset({"dense", "multivector"})), items)
    assert both["usage"] == {"prompt_tokens": 8, "total_tokens": 8}
    assert [(entry["object"], entry["index"], len(entry["embeddings"])) for entry in both["data"]] == [
        ("embedding", 0, 3),
        ("embedding", 1, 5),
    ]
    rows = in_json(asked(outputs=frozenset({"multivector"})), items)["data"][1]
    assert (rows["object"], set(rows)) == ("embeddings", {"object", "index", "embeddings"})
    keyed = in_json(asked(encodings=["float", "binary"]), items)["data"][0]["embedding"]
    assert (len(keyed["float"]), len(keyed["binary"])) == (256, 32)


def test_late_chunks_are_items_of_their_own() -> None:
    one = Vectors(np.eye(3, 256, dtype=np.float32), np.empty((0, 128), np.float32), 9)
    answer = in_json(asked(late_chunking=True), [one])
    assert [entry["index"] for entry in answer["data"]] == [0, 1, 2]
    assert answer["usage"]["total_tokens"] == 9
    assert load(as_safetensors(asked(late_chunking=True), [one], "float32"))["dense"].shape == (3, 256)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_safetensors_hold_dense_and_multi_vectors(dtype: str) -> None:
    items = [vectors(3, 0), vectors(5, 1)]
    body = as_safetensors(asked(outputs=frozenset({"dense", "multivector"})), items, dtype)
    found = load(body)
    assert {name: array.dtype.name for name, array in found.items()} == {
        "dense": dtype,
        "multivector": dtype,
        "offsets": "int64",
    }
    assert found["offsets"].tolist() == [0, 3, 8]
    np.testing.assert_array_equal(found["dense"], np.concatenate([item.dense for item in items]).astype(dtype))
    np.testing.assert_array_equal(found["multivector"][3:], items[1].multivector.astype(dtype))
    header = orjson.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
    assert header["__metadata__"] == {"model": "m", "prompt_tokens": "8", "total_tokens": "8"}
    assert len(deserialize(body)) == 3


def test_the_warning_names_at_most_twenty_of_each_and_nothing_that_is_no_name() -> None:
    assert headers([], asked()) == {"x-jina-v4-prompt": "query"}
    clipped = [f"input[{i}].image" for i in (10, 2, 0)]
    assert headers(clipped, asked(ignored=["a\r\nset-cookie: b", "é", "x" * 65, "fine_1"])) == {
        "x-jina-v4-prompt": "query",
        "x-jina-v4-warning": "more than 8 bits per pixel, values over 255 read as 255:"
        " input[0].image, input[2].image, input[10].image; unknown fields ignored: ?, ?, ?, fine_1",
    }
    _, value = headers([f"input[{i}].image" for i in range(2048)], asked(ignored=["y"] * 2048)).values()
    assert "input[19].image and 2028 more; unknown" in value
    assert len(value) < 1000


@given(ROW)
def test_int8_is_the_clients_bit_for_bit_and_uint8_is_that_plus_128(row: NDArray[np.float32]) -> None:
    codes = encode(row, "int8")
    if np.abs(row).max() > 1e-18:  # the client refuses a row whose squares are too small for float32
        assert codes == quantize_int8(row[None]).codes[0].tolist()
    assert encode(row, "uint8") == [code + 128 for code in codes]
    assert all(type(code) is int for code in codes)
