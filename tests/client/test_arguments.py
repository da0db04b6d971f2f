"""What a call may not say, and that nothing is sent then."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import written
from jina_v4_client import ArgumentError, EmbeddingsClient, JinaV4Error
from PIL import Image


@pytest.fixture(autouse=True)
def nothing_was_sent(server: Any) -> Any:
    yield
    assert server.seen == []


PICTURE = Image.new("RGB", (40, 30))


def shown(value: object) -> str:
    """An id of a value that is the same in every process."""
    return re.sub(r" at 0x\w+", "", repr(value))[:60]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_name": "document"}, "Invalid prompt_name: document. Must be one of ['query', 'passage']."),
        ({"prompt_name": ""}, "Invalid prompt_name: . Must be one of ['query', 'passage']."),
        ({"task": np.array(["code", "x"])}, "Invalid task: ['code' 'x']. Must be one of"),
        ({"truncate_dim": 300}, "Invalid truncate_dim: 300. Must be one of [128, 256, 512, 1024, 2048]."),
        ({"truncate_dim": True}, "Invalid truncate_dim: True. Must be one of [128, 256, 512, 1024, 2048]."),
        ({"truncate_dim": 128.0}, "Invalid truncate_dim: 128.0. Must be one of [128, 256, 512, 1024, 2048]."),
        ({"task": "search"}, "Invalid task: search. Must be one of ['retrieval', 'text-matching', 'code']."),
        ({"prompt_name": "x", "truncate_dim": 3, "task": "x"}, "Invalid prompt_name: x."),
        ({"truncate_dim": 3, "task": "x"}, "Invalid truncate_dim: 3."),
        ({"task": "x", "max_length": 0}, "Invalid task: x."),
    ],
    ids=str,
)
def test_errors_of_the_published_model_come_in_its_words_and_order(
    client: EmbeddingsClient, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError) as caught:
        client.encode_text("a text", **arguments)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("texts", "arguments", "message"),
    [
        ([], {}, "texts is empty; give at least one item"),
        ((), {}, "texts is empty; give at least one item"),
        (7, {}, "texts must be one item or a list of items, not int"),
        (np.array("a"), {}, "texts must be one item or a list of items, not ndarray"),
        (None, {}, "texts must be one item or a list of items, not NoneType"),
        (b"bytes", {}, "texts must be one item or a list of items, not bytes"),
        ({"a"}, {}, "texts must be one item or a list of items, not set"),
        (["a", 1], {}, r"texts\[1\] must be a str, not int"),
        (["a", None], {}, r"texts\[1\] must be a str, not NoneType"),
        (
            ["a", "b", "x\ud800y"],
            {},
            r"texts\[2\] cannot be written as UTF-8: character 1 is a lone surrogate \(U\+D800\)",
        ),
        ("a", {"max_length": 0}, "max_length=0 is not allowed; give an integer, 1 to 32768"),
        ("a", {"max_length": 32769}, "max_length=32769 is not allowed"),
        ("a", {"max_length": True}, "max_length=True is not allowed"),
        ("a", {"max_length": None}, "max_length=None is not allowed"),
        ("a", {"max_length": 16.0}, r"max_length=16\.0 is not allowed"),
        ("a", {"batch_size": 0}, "batch_size=0 is not allowed; give an integer, at least 1"),
        ("a", {"batch_size": True}, "batch_size=True is not allowed"),
        ("a", {"batch_size": "8"}, "batch_size='8' is not allowed"),
    ],
    ids=shown,
)
def test_a_text_call_that_is_not_allowed_says_why(
    client: EmbeddingsClient, texts: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        client.encode_text(texts, **arguments)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, JinaV4Error)


@pytest.mark.parametrize(
    ("images", "arguments", "message"),
    [
        ([], {}, "images is empty"),
        (7, {}, "images must be one item or a list of items, not int"),
        (
            [PICTURE, 7],
            {},
            r"images\[1\] \(int\): an image is a path, a URL, a data URI, bytes or a PIL image, not int",
        ),
        (np.zeros((2, 4, 3), np.uint8), {}, r"images\[0\] .*not ndarray"),
        (PICTURE, {"truncate_dim": 1}, "Invalid truncate_dim: 1"),
        (PICTURE, {"task": "x"}, "Invalid task: x"),
        (PICTURE, {"max_pixels": 3135}, "max_pixels=3135 is not allowed; give an integer, at least 3136"),
        (PICTURE, {"max_pixels": True}, "max_pixels=True is not allowed"),
        (PICTURE, {"max_pixels": 1e6}, "max_pixels=1000000.0 is not allowed"),
        (PICTURE, {"batch_size": -1}, "batch_size=-1 is not allowed"),
    ],
    ids=shown,
)
def test_an_image_call_that_is_not_allowed_says_why(
    client: EmbeddingsClient, images: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        client.encode_image(images, **arguments)


def test_one_broken_image_keeps_the_good_ones_from_being_sent(client: EmbeddingsClient, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"images\[2\]"):
        client.encode_image([written(PICTURE), PICTURE, tmp_path / "missing.png"])


def test_a_dimension_that_is_not_offered_is_refused_for_multivectors_too(client: EmbeddingsClient) -> None:
    with pytest.raises(ArgumentError, match="Invalid truncate_dim: 300"):
        client.encode_text("a", return_multivector=True, truncate_dim=300)


def test_a_task_must_be_given_somewhere(server: Any) -> None:
    with EmbeddingsClient(server.url) as client, pytest.raises(ArgumentError, match="No task is given"):
        client.encode_text("a")


def test_a_model_of_another_task_is_refused_at_the_call(server: Any) -> None:
    with (
        EmbeddingsClient(server.url, model="jina-embeddings-v4-code") as client,
        pytest.raises(ArgumentError, match="is for the task 'code', and 'retrieval' was asked for: leave model out"),
    ):
        client.encode_text("a", task="retrieval")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_url": "localhost:8000"}, "give one like http://127.0.0.1:8000"),
        ({"base_url": "ftp://host"}, "is no address of a server"),
        ({"base_url": "http://"}, "is no address of a server"),
        ({"base_url": "http://host:99999"}, "is no address of a server"),
        ({"base_url": "http://a..b:8000"}, "is no address of a server; give one like"),
        ({"base_url": "http://.host"}, "is no address of a server; give one like"),
        ({"base_url": f"http://{'a' * 64}.host"}, "is no address of a server; give one like"),
        ({"base_url": None}, "base_url must be a str, not NoneType"),
        ({"base_url": "http://me:secret@host"}, "must not hold a user name"),
        ({"base_url": "http://host?key=1"}, "must not hold a user name, a query"),
        ({"task": "x"}, "Invalid task: x"),
        ({"model": ""}, "model='' is not allowed"),
        ({"model": 7}, "model=7 is not allowed"),
        (
            {"model": "jina-embeddings-v4-code", "task": "retrieval"},
            "model='jina-embeddings-v4-code' is for the task 'code', and 'retrieval' was asked for",
        ),
        ({"wire_dtype": "bfloat16"}, "wire_dtype='bfloat16' is not offered; choose float32 or float16"),
        ({"wire_dtype": None}, "wire_dtype=None is not offered"),
        ({"server_task": "x"}, "Invalid task: x"),
        ({"timeout_s": 0}, "timeout_s=0 is not allowed"),
        ({"timeout_s": float("nan")}, "timeout_s=nan is not allowed"),
        ({"timeout_s": True}, "timeout_s=True is not allowed"),
        ({"max_retries": -1}, "max_retries=-1 is not allowed"),
        ({"http_client": "x"}, "http_client is not allowed"),
        ({"api_key": "two words"}, "api_key must be one word"),
        ({"api_key": "schlüssel"}, "api_key must be one word"),
        ({"api_key": "line\n"}, "api_key must be one word"),
    ],
    ids=shown,
)
def test_a_client_that_is_not_allowed_says_why(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        EmbeddingsClient(**{"base_url": "http://127.0.0.1:9", **arguments})
    assert "secret" not in str(caught.value)


def test_a_bad_key_of_the_environment_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JINA_V4_API_KEY", "hush hush")
    with pytest.raises(ArgumentError, match="the environment variable JINA_V4_API_KEY must be one word") as caught:
        EmbeddingsClient("http://127.0.0.1:9")
    assert "hush" not in str(caught.value)
