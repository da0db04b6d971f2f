"""Replies with status 200 that do not hold the vectors asked for: an error each, never a wrong vector."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from jina_v4_client import BadReplyError, EmbeddingsClient, ServerError, WrongServerError

TEXTS = ["one", "two", "three"]


def set_item(index: int, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document["data"][index][key] = value

    return change


Tensors = dict[str, np.ndarray]


def put(name: str, make: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors], None]:
    """Replace a tensor by what is made of it."""

    def change(tensors: Tensors) -> None:
        tensors[name] = make(tensors[name])

    return change


def with_row(index: int, row: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    def make(rows: np.ndarray) -> np.ndarray:
        rows = rows.copy()
        rows[index] = row
        return rows

    return make


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda t: t.clear(), "answered with nothing where dense was asked for", id="nothing"),
        pytest.param(
            lambda t: t.update(offsets=np.zeros(4, np.int64)), "dense and offsets where dense was asked", id="more"
        ),
        pytest.param(lambda t: t.update(vectors=t.pop("dense")), "vectors where dense was asked", id="another name"),
        pytest.param(
            lambda t: t.update({"x\n" * 999: t.pop("dense")}),
            r"answered with '(x\\n){50}'\.\.\. where",
            id="a long name",
        ),
        pytest.param(put("dense", lambda d: d[:2]), "2 vectors to a request of 3", id="one too few"),
        pytest.param(put("dense", lambda d: np.repeat(d, 2, axis=0)), "6 vectors to a request of 3", id="too many"),
        pytest.param(put("dense", lambda d: d[:0]), r"dense of float32 \(0, 256\) where a table", id="no rows"),
        pytest.param(put("dense", lambda d: d[:, :0]), r"dense of float32 \(3, 0\) where a table", id="no columns"),
        pytest.param(put("dense", np.ravel), r"dense of float32 \(768,\) where a table", id="flat"),
        pytest.param(put("dense", lambda d: d[None]), r"dense of float32 \(1, 3, 256\) where a table", id="deep"),
        pytest.param(put("dense", lambda d: d.astype("f2")), r"dense of float16 .* table of float32", id="float16"),
        pytest.param(put("dense", lambda d: d.astype("f8")), r"dense of float64 .* table of float32", id="float64"),
        pytest.param(put("dense", lambda d: d.astype("i4")), r"dense of int32 .* table of float32", id="integers"),
        pytest.param(put("dense", with_row(2, np.full(256, np.nan))), "length nan instead of 1 in row 2", id="NaN"),
        pytest.param(put("dense", with_row(2, np.full(256, np.inf))), "a vector of length inf", id="infinity"),
        pytest.param(put("dense", with_row(2, np.zeros(256))), "a vector of length 0 instead", id="zeros"),
        pytest.param(put("dense", lambda d: d * np.float32(1.01)), "length 1.01 instead of 1 in row 0", id="length"),
    ],
)
def test_a_wrong_reply_of_ours_is_refused(
    server: Any, client: EmbeddingsClient, change: Callable[[Tensors], None], message: str
) -> None:
    server.play_ours(change=change)
    with pytest.raises(BadReplyError, match=message):
        client.encode_text(TEXTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda t: t.pop("offsets"), "multivector where multivector and offsets was", id="no offsets"),
        pytest.param(lambda t: t.pop("multivector"), "offsets where multivector and offsets was", id="only offsets"),
        pytest.param(lambda t: t.update(dense=t["multivector"]), "dense and multivector and offsets", id="more"),
        pytest.param(put("offsets", lambda o: o[:-1]), r"offsets of int64 \(3,\) where int64 \(4,\)", id="too few"),
        pytest.param(put("offsets", lambda o: np.append(o, 7)), r"offsets of int64 \(5,\) where", id="too many"),
        pytest.param(put("offsets", lambda o: o.astype("i4")), r"offsets of int32 \(4,\) where int64", id="int32"),
        pytest.param(put("offsets", lambda o: o.astype("f8")), r"offsets of float64", id="floats"),
        pytest.param(put("offsets", lambda o: o[None]), r"offsets of int64 \(1, 4\)", id="deep"),
        pytest.param(put("offsets", lambda o: o + 1), "do not share out its 6 rows", id="not from 0"),
        pytest.param(put("offsets", lambda o: np.array([0, 2, 4, 5])), "do not share out its 6 rows", id="short"),
        pytest.param(put("offsets", lambda o: np.array([0, 2, 4, 9])), "do not share out its 6 rows", id="beyond"),
        pytest.param(put("offsets", lambda o: np.array([0, 4, 2, 6])), "do not share out", id="not in order"),
        pytest.param(put("offsets", lambda o: np.array([0, 3, 3, 6])), "do not share out", id="an item without rows"),
        pytest.param(put("offsets", lambda o: np.array([0, -2, 4, 6])), "do not share out", id="negative"),
        pytest.param(put("multivector", lambda m: m[:-1]), "do not share out its 5 rows", id="a row too few"),
        pytest.param(
            put("multivector", lambda m: np.tile(m, 2) / np.float32(2**0.5)), "rows of 256 numbers, not 128", id="wide"
        ),
        pytest.param(put("multivector", lambda m: m[0]), r"multivector of float32 \(128,\)", id="flat"),
        pytest.param(put("multivector", lambda m: m.astype("f2")), "multivector of float16", id="float16"),
        pytest.param(put("multivector", with_row(5, np.full(128, np.nan))), "length nan .* in row 5", id="NaN"),
        pytest.param(
            put("multivector", with_row(1, np.ones(128))), "length 11.3137 instead of 1 in row 1", id="length"
        ),
    ],
)
def test_a_wrong_multivector_reply_of_ours_is_refused(
    server: Any, client: EmbeddingsClient, change: Callable[[Tensors], None], message: str
) -> None:
    server.play_ours(change=change)
    with pytest.raises(BadReplyError, match=message):
        client.encode_text(TEXTS, return_multivector=True)


def test_float32_where_float16_was_asked_for_is_refused(server: Any) -> None:
    server.play_ours(change=put("dense", lambda d: d.astype("f4")))
    with (
        EmbeddingsClient(server.url, task="retrieval", wire_dtype="float16") as client,
        pytest.raises(BadReplyError, match=r"dense of float32 .* where a table of float16 was asked for"),
    ):
        client.encode_text(TEXTS)


def bfloat16(content: bytes) -> bytes:
    return content.replace(b'"F32"', b'"BF16"').replace(b"[3,256]", b"[3,512]")


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda content: b"", id="no bytes"),
        pytest.param(lambda content: content[:7], id="less than a head"),
        pytest.param(lambda content: content[:40], id="half a head"),
        pytest.param(lambda content: content[:-1], id="a byte too few"),
        pytest.param(lambda content: content + b"\0", id="a byte too many"),
        pytest.param(lambda content: b"\xff" * 8 + content[8:], id="a head of 2**64 bytes"),
        pytest.param(lambda content: content.replace(b'"F32"', b'"Q32"'), id="a dtype that does not exist"),
        pytest.param(bfloat16, id="a dtype that numpy does not have"),
        pytest.param(lambda content: content.replace(b"[3,256]", b"[3,255]"), id="a shape that does not fit"),
        pytest.param(lambda content: b'{"data": [{"index": 0, "embedding": [1.0]}]}', id="JSON"),
        pytest.param(lambda content: b"<!DOCTYPE html><html></html>", id="HTML"),
    ],
)
def test_bytes_that_are_no_safetensors_are_refused(
    server: Any, client: EmbeddingsClient, spoil: Callable[[bytes], bytes]
) -> None:
    server.play_ours()
    embed = server.routes["/v1/embeddings"]

    def spoilt(seen: Any) -> Any:
        answer = embed(seen)
        return server.answer(spoil(answer.content), **answer.headers)

    server.routes["/v1/embeddings"] = spoilt
    with pytest.raises(BadReplyError, match="bytes that are no safetensors"):
        client.encode_text(TEXTS)


@pytest.mark.parametrize("kind", ["application/octet-stream", "text/html; charset=utf-8", "", None], ids=repr)
def test_a_reply_of_another_type_is_refused(server: Any, client: EmbeddingsClient, kind: str | None) -> None:
    server.play_ours()
    embed = server.routes["/v1/embeddings"]

    def typed(seen: Any) -> Any:
        answer = embed(seen)
        headers = {name: value for name, value in answer.headers.items() if name != "content-type"}
        return server.answer(answer.content, **headers, **({} if kind is None else {"content_type": kind}))

    server.routes["/v1/embeddings"] = typed
    with pytest.raises(BadReplyError, match="where application/x-safetensors was asked for; install the client of"):
        client.encode_text(TEXTS)


def test_the_type_of_a_reply_may_have_parameters(server: Any, client: EmbeddingsClient) -> None:
    server.play_ours()
    embed = server.routes["/v1/embeddings"]

    def typed(seen: Any) -> Any:
        answer = embed(seen)
        answer.headers["content-type"] = "Application/X-SafeTensors; dtype=float32"
        return answer

    server.routes["/v1/embeddings"] = typed
    assert len(client.encode_text(TEXTS)) == 3


def test_a_server_of_ours_that_does_not_cut_vectors_is_refused(server: Any, client: EmbeddingsClient) -> None:
    server.play_ours()
    embed = server.routes["/v1/embeddings"]

    def forget_dimensions(seen: Any) -> Any:
        seen.body.pop("dimensions")
        return embed(seen)

    server.routes["/v1/embeddings"] = forget_dimensions
    with pytest.raises(BadReplyError, match="answered with 256 dimensions where truncate_dim=128 was asked"):
        client.encode_text(TEXTS, truncate_dim=128)


def test_batches_of_different_width_are_refused(server: Any, client: EmbeddingsClient) -> None:
    server.play_ours()
    embed, widths = server.routes["/v1/embeddings"], iter([256, 128])

    def narrower(seen: Any) -> Any:
        seen.body["dimensions"] = next(widths)
        return embed(seen)

    server.routes["/v1/embeddings"] = narrower
    with pytest.raises(BadReplyError, match=r"one call with vectors of \[128, 256\] dimensions"):
        client.encode_text(TEXTS, batch_size=2)


def set_usage(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda metadata: metadata.update(usage=value)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        pytest.param(lambda d: d.pop("data"), BadReplyError, "does not list its items", id="no data"),
        pytest.param(lambda d: d["data"].pop(), BadReplyError, r"items \[0, 1\] to a request of 3", id="one too few"),
        pytest.param(lambda d: d["data"].reverse(), BadReplyError, r"items \[2, 1, 0\]", id="wrong order"),
        pytest.param(set_item(0, "shape", [512]), WrongServerError, "one vector an item instead of", id="pooled"),
        pytest.param(set_item(0, "shape", [2, -256]), BadReplyError, r"of shape \[2, -256\]", id="negative shape"),
        pytest.param(set_item(0, "shape", None), BadReplyError, "of shape None", id="no shape"),
        pytest.param(set_item(0, "shape", [1, 256]), BadReplyError, "do not fit", id="shape smaller than bytes"),
        pytest.param(set_item(2, "shape", [9, 256]), BadReplyError, "do not fit", id="shape larger than bytes"),
        pytest.param(set_item(1, "start", 4), BadReplyError, "do not fit", id="wrong start"),
        pytest.param(set_item(1, "embed_dtype", "float16"), BadReplyError, "do not fit", id="another dtype"),
        pytest.param(set_item(1, "endianness", "big"), BadReplyError, "do not fit", id="big-endian"),
        pytest.param(set_usage({"prompt_tokens": 7}), WrongServerError, "of 6 tokens out of 7", id="cached tokens"),
    ],
)
def test_a_malformed_reply_of_a_stock_server_is_refused(
    server: Any,
    client: EmbeddingsClient,
    change: Callable[[dict[str, Any]], None],
    kind: type[ServerError],
    message: str,
) -> None:
    server.play_stock(change=change)
    with pytest.raises(kind, match=message):
        client.encode_text(TEXTS)


@pytest.mark.parametrize("usage", [None, {}], ids=str)
def test_a_stock_server_need_not_count_tokens(server: Any, client: EmbeddingsClient, usage: Any) -> None:
    server.play_stock(change=set_usage(usage))
    assert len(client.encode_text(TEXTS)) == 3


@pytest.mark.parametrize("metadata", ["", "{", "[]", "null"], ids=repr)
def test_hidden_states_without_a_description_are_refused(server: Any, client: EmbeddingsClient, metadata: str) -> None:
    server.play_stock()
    server.routes["/pooling"] = lambda _: server.answer(b"1234", metadata=metadata)
    with pytest.raises(BadReplyError, match="header that"):
        client.encode_text(TEXTS)


def test_bytes_that_were_not_announced_are_refused(server: Any, client: EmbeddingsClient) -> None:
    server.play_stock()
    pool = server.routes["/pooling"]

    def longer(seen: Any) -> Any:
        answer = pool(seen)
        return server.answer(answer.content + b"1234", metadata=answer.headers["metadata"])

    server.routes["/pooling"] = longer
    with pytest.raises(BadReplyError, match=r"answered with 6148 bytes where 6144 were announced"):
        client.encode_text(TEXTS)


def unit_rows(item: object) -> np.ndarray:
    rows = np.eye(256, dtype=np.float32)[:3]
    return rows[: len(str(item).split())]


def rows_with_nan(item: object) -> np.ndarray:
    rows = 10 * np.eye(256, dtype=np.float32)[:2]
    rows[1, 5] = np.nan
    return rows


def rows_of_two_widths(item: object) -> np.ndarray:
    return np.full((2, 256 if "three" in str(item) else 128), 3, np.float32)


@pytest.mark.parametrize(
    ("rows_of", "kind", "message"),
    [
        (unit_rows, WrongServerError, "normalises every token"),
        (rows_with_nan, BadReplyError, "NaN or infinity"),
        (rows_of_two_widths, BadReplyError, r"vectors of \[128, 256\] dimensions"),
    ],
)
def test_wrong_hidden_states_are_refused(
    server: Any, client: EmbeddingsClient, rows_of: Any, kind: type[ServerError], message: str
) -> None:
    server.play_stock(rows_of=rows_of)
    with pytest.raises(kind, match=message):
        client.encode_text(TEXTS)


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b'"x"', b"{", b"\xff\xfe", b"[" * 100_000], ids=lambda value: repr(value[:8])
)
def test_what_is_no_json_object_is_refused(server: Any, client: EmbeddingsClient, content: bytes) -> None:
    server.play_ours()
    server.routes["/v1/models"] = lambda _: server.answer(content, content_type="application/json")
    with pytest.raises(BadReplyError, match="is base_url the address of the server"):
        client.encode_text(TEXTS)


def test_the_golden_vectors_arrive_bit_for_bit(server: Any, client: EmbeddingsClient, golden: Any) -> None:
    rows = [golden.rows[f"retrieval/query/{n}/dense"] for n in range(len(golden.texts))]
    server.play_ours(change=put("dense", lambda _: np.stack(rows)))
    np.testing.assert_array_equal(client.encode_text(golden.texts, return_numpy=True), rows)


def test_the_golden_multivectors_arrive_bit_for_bit(server: Any, client: EmbeddingsClient, golden: Any) -> None:
    rows = [golden.rows[f"retrieval/query/{n}/multi"] for n in range(len(golden.texts))]
    tensors = {"multivector": np.concatenate(rows), "offsets": np.cumsum([0, *map(len, rows)], dtype=np.int64)}
    server.play_ours(change=lambda t: t.update(tensors))
    for found, expected in zip(client.encode_text(golden.texts, return_multivector=True), rows, strict=True):
        np.testing.assert_array_equal(found, expected)
