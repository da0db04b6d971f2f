"""Replies with status 200 that do not hold the vectors asked for: an error each, never a wrong vector."""

import json
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


def set_vector(server: Any, index: int, vector: Any) -> Callable[[dict[str, Any]], None]:
    return set_item(index, "embedding", server.encode(np.asarray(vector, np.float32)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda d: d.pop("data"), "without a list of embeddings", id="no data"),
        pytest.param(lambda d: d.update(data="x"), "without a list of embeddings", id="data of another type"),
        pytest.param(lambda d: d.update(data=[1, 2, 3]), "without a list of embeddings", id="items of another type"),
        pytest.param(lambda d: d["data"].pop(), r"items \[0, 1\] to a request of 3", id="one too few"),
        pytest.param(lambda d: d["data"].append(d["data"][0]), r"\[0, 1, 2, 0\] to a request of 3", id="one too many"),
        pytest.param(lambda d: d["data"].reverse(), r"items \[2, 1, 0\]", id="wrong order"),
        pytest.param(set_item(1, "index", None), r"items \[0, None, 2\]", id="no index"),
        pytest.param(set_item(1, "embedding", None), "not base64", id="no embedding"),
        pytest.param(set_item(1, "embedding", [0.6, 0.8]), "not base64", id="floats"),
        pytest.param(set_item(1, "embedding", "a!b"), "no base64 of float32", id="broken base64"),
        pytest.param(set_item(1, "embedding", "aGFsbG8="), "no base64 of float32", id="five bytes"),
        pytest.param(set_item(1, "embedding", ""), r"vectors of \[0, 256\] dimensions", id="empty vector"),
    ],
)
def test_a_malformed_reply_of_ours_is_refused(
    server: Any, client: EmbeddingsClient, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    server.play_ours(change=change)
    with pytest.raises(BadReplyError, match=message):
        client.encode_text(TEXTS)


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        pytest.param(np.full(256, np.nan), "a vector of length nan instead of 1 for item 2", id="NaN"),
        pytest.param(np.full(256, np.inf), "a vector of length inf", id="infinity"),
        pytest.param(np.zeros(256), "a vector of length 0 instead", id="zeros"),
        pytest.param(np.eye(256)[0] * 1.01, "a vector of length 1.01 instead", id="not normalised"),
        pytest.param(np.eye(128)[0], r"vectors of \[128, 256\] dimensions", id="another dimension"),
    ],
)
def test_a_wrong_vector_of_ours_is_refused(
    server: Any, client: EmbeddingsClient, vector: np.ndarray, message: str
) -> None:
    server.play_ours(change=set_vector(server, 2, vector))
    with pytest.raises(BadReplyError, match=message):
        client.encode_text(TEXTS)


def test_ours_that_does_not_cut_is_refused(server: Any, client: EmbeddingsClient) -> None:
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
@pytest.mark.parametrize("path", ["/v1/models", "/v1/embeddings"])
def test_what_is_no_json_object_is_refused(server: Any, client: EmbeddingsClient, path: str, content: bytes) -> None:
    server.play_ours()
    headers = {"x_jina_v4_task": "retrieval", "x_jina_v4_pooling": "engine"}
    server.routes[path] = lambda _: server.answer(content, content_type="application/json", **headers)
    with pytest.raises(BadReplyError, match="is base_url the address of the server"):
        client.encode_text(TEXTS)


def test_the_golden_vectors_arrive_bit_for_bit(server: Any, client: EmbeddingsClient, golden: Any) -> None:
    rows = {f"Query: {text}": golden.rows[f"retrieval/query/{n}/dense"] for n, text in enumerate(golden.texts)}
    server.play_ours()
    embed = server.routes["/v1/embeddings"]

    def embed_golden(seen: Any) -> Any:
        answer = embed(seen)
        document = json.loads(answer.content)
        for item, text in zip(document["data"], seen.body["input"], strict=True):
            item["embedding"] = server.encode(rows[text])
        return server.json_answer(document, x_jina_v4_task="retrieval", x_jina_v4_pooling="engine")

    server.routes["/v1/embeddings"] = embed_golden
    np.testing.assert_array_equal(client.encode_text(golden.texts, return_numpy=True), list(rows.values()))
