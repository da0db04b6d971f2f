"""Which server it is, what it is asked for, and that its task is the right one."""

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jina_v4_client import (
    ArgumentError,
    BadReplyError,
    EmbeddingsClient,
    ServerRefusedError,
    WrongServerError,
)
from PIL import Image

PICTURE = Image.new("RGB", (280, 140), (10, 200, 30))
N_PICTURE_TOKENS = 50


# --- a server of ours ---


def test_ours_is_asked_for_pooled_vectors(server: Any, client: EmbeddingsClient) -> None:
    server.play_ours()
    vector = client.encode_text("a text")
    assert server.seen[1].body == {
        "model": "jina-embeddings-v4-retrieval",
        "task": "retrieval",
        "outputs": ["dense"],
        "input": [{"text": "a text"}],
        "prompt_name": "query",
    }
    assert [seen.headers["accept"] for seen in server.seen] == ["application/json", "application/x-safetensors"]
    assert (vector.dtype, vector.shape, vector.flags.writeable) == (np.float32, (256,), True)
    np.testing.assert_array_equal(vector, server.vector("Query: a text"))


def test_ours_is_asked_for_images_many_a_request(server: Any, client: EmbeddingsClient) -> None:
    server.play_ours()
    vectors = client.encode_image([PICTURE] * 3, batch_size=2, max_pixels=50000, truncate_dim=128, return_numpy=True)
    assert vectors.shape == (3, 128)
    second, first = sorted(server.bodies("/v1/embeddings"), key=lambda body: len(body["input"]))
    assert (len(first["input"]), len(second["input"])) == (2, 1)
    image = first.pop("input")[0]["image"]
    assert image.startswith("data:image/png;base64,")
    assert first == {
        "model": "jina-embeddings-v4-retrieval",
        "task": "retrieval",
        "outputs": ["dense"],
        "max_pixels": 50000,
        "dimensions": 128,
    }


def test_without_max_pixels_the_server_decides(server: Any, client: EmbeddingsClient) -> None:
    server.play_ours()
    client.encode_image(PICTURE)
    assert "max_pixels" not in server.bodies("/v1/embeddings")[0]


PROMPTS = pytest.mark.parametrize(
    ("task", "prompt_name", "prefix"),
    [
        ("retrieval", None, "Query: "),
        ("retrieval", "query", "Query: "),
        ("retrieval", "passage", "Passage: "),
        ("code", None, "Query: "),
        ("code", "passage", "Passage: "),
        ("text-matching", None, "Query: "),
        ("text-matching", "query", "Query: "),
        ("text-matching", "passage", "Query: "),
    ],
)


@PROMPTS
def test_a_server_of_ours_gets_the_prompts_name_and_the_bare_text(
    server: Any, task: Any, prompt_name: str | None, prefix: str
) -> None:
    server.play_ours(task)
    with EmbeddingsClient(server.url) as client:
        client.encode_text(["", "Straße 日本 😀\n"], task=task, prompt_name=prompt_name)
    (body,) = server.bodies("/v1/embeddings")
    assert body["input"] == [{"text": ""}, {"text": "Straße 日本 😀\n"}]
    assert (body["task"], body["prompt_name"]) == (task, prompt_name or "query")


@PROMPTS
def test_for_a_stock_server_the_client_puts_the_prefix(
    server: Any, task: Any, prompt_name: str | None, prefix: str
) -> None:
    server.play_stock(f"x-{task}")
    with EmbeddingsClient(server.url) as client:
        client.encode_text(["", "Straße 日本 😀\n"], task=task, prompt_name=prompt_name)
    assert server.bodies("/pooling")[0]["input"] == [prefix, f"{prefix}Straße 日本 😀\n"]


@pytest.mark.parametrize(("max_length", "sent"), [(16, 16), (4096, 4096), (4097, None), (32768, None)])
def test_truncation_is_asked_for_up_to_the_servers_limit(
    server: Any, client: EmbeddingsClient, max_length: int, sent: int | None
) -> None:
    server.play_ours()
    client.encode_text("a", max_length=max_length)
    server.play_stock()
    with EmbeddingsClient(server.url, task="retrieval") as other:
        other.encode_text("a", max_length=max_length)
    assert server.bodies("/v1/embeddings")[0].get("max_length") == sent
    (body,) = server.bodies("/pooling")
    assert body.get("truncate_prompt_tokens") == sent
    assert body.get("truncation_side") == ("right" if sent else None)


TOKENIZER = Path(__file__).parents[1] / "golden" / "checkpoint" / "tokenizer.json"
SPECIAL = [token["content"] for token in json.loads(TOKENIZER.read_text())["added_tokens"] if token["special"]]


@pytest.mark.parametrize("token", SPECIAL)
def test_a_text_with_a_special_token_of_a_stock_server_is_refused_before_anything_is_embedded(
    server: Any, client: EmbeddingsClient, token: str
) -> None:
    server.play_stock()
    with pytest.raises(ArgumentError) as caught:
        client.encode_text(["fine", f"see {token} here"], batch_size=1)
    assert str(caught.value).startswith(f"texts[1] holds '{token}' at character 4")
    assert server.paths() == ["/v1/models"]


def test_ours_reads_special_tokens_in_a_text_as_text(server: Any, client: EmbeddingsClient) -> None:
    server.play_ours()
    client.encode_text(SPECIAL, batch_size=len(SPECIAL))
    assert server.bodies("/v1/embeddings")[0]["input"] == [{"text": token} for token in SPECIAL]


@pytest.mark.parametrize(("wire_dtype", "exact"), [("float32", True), ("float16", False)])
def test_vectors_are_float32_of_unit_length_whatever_is_sent(server: Any, wire_dtype: Any, exact: bool) -> None:
    server.play_ours()
    expected = server.vector("Query: a")
    with EmbeddingsClient(server.url, task="retrieval", wire_dtype=wire_dtype) as client:
        found = client.encode_text("a")
    assert ("float16" in server.seen[1].headers["accept"]) is not exact
    assert found.dtype == np.float32
    assert np.linalg.norm(found.astype(float)) == pytest.approx(1, abs=1e-7)
    assert np.array_equal(found, expected) is exact
    np.testing.assert_allclose(found, expected, atol=3e-4)


def test_batches_keep_the_order_and_the_server_is_asked_once_who_it_is(server: Any, client: EmbeddingsClient) -> None:
    server.play_ours()
    texts = [f"text {n}" for n in range(21)]
    vectors = client.encode_text(texts)
    client.encode_text("again")
    assert sorted(len(body["input"]) for body in server.bodies("/v1/embeddings")) == [1, 5, 8, 8]
    assert server.paths().count("/v1/models") == 1
    np.testing.assert_array_equal(vectors, [server.vector(f"Query: {text}") for text in texts])


@pytest.mark.parametrize("form", [list, tuple, np.array], ids=["list", "tuple", "array"])
def test_every_sequence_of_texts_gives_a_list_of_vectors(server: Any, client: EmbeddingsClient, form: Any) -> None:
    server.play_ours()
    vectors = client.encode_text(form(["a", "b"]))
    assert isinstance(vectors, list)
    assert [vector.shape for vector in vectors] == [(256,), (256,)]
    assert client.encode_text(form(["a"]), return_numpy=True).shape == (1, 256)
    assert client.encode_text("a", return_numpy=True).shape == (256,)


def test_integers_of_numpy_are_taken_as_integers(server: Any, client: EmbeddingsClient) -> None:
    server.play_ours()
    client.encode_text("a", truncate_dim=np.int64(128), max_length=np.int32(9), batch_size=np.uint8(3))
    assert server.bodies("/v1/embeddings")[0]["dimensions"] == 128


@pytest.mark.parametrize("play", ["play_ours", "play_stock"])
def test_another_task_than_the_served_one_embeds_nothing(server: Any, play: str) -> None:
    getattr(server, play)()
    with (
        EmbeddingsClient(server.url, task="retrieval") as client,
        pytest.raises(
            WrongServerError, match=r"serves the task 'retrieval', and 'code' was asked for.*make serve-code"
        ),
    ):
        client.encode_image(PICTURE, task="code")
    assert server.paths() == ["/v1/models"]


def test_the_callers_model_is_sent_if_it_is_served(server: Any) -> None:
    server.play_ours()
    server.routes["/v1/models"] = lambda _: server.json_answer(
        {"data": [{"id": "base", "max_model_len": 99}, {"id": "mine", "root": "x", "parent": "base"}]},
        x_jina_v4_task="retrieval",
        x_jina_v4_pooling="engine",
    )
    with EmbeddingsClient(server.url, task="retrieval", model="mine") as client:
        client.encode_text("a", max_length=99)
    assert server.bodies("/v1/embeddings")[0]["model"] == "mine"
    assert server.bodies("/v1/embeddings")[0]["max_length"] == 99
    with (
        EmbeddingsClient(server.url, task="retrieval", model="other") as client,
        pytest.raises(WrongServerError, match="does not serve the model 'other'; it serves base, mine"),
    ):
        client.encode_text("a")


@pytest.mark.parametrize(
    "headers",
    [
        {"x_jina_v4_task": "retrieval"},
        {"x_jina_v4_pooling": "engine"},
        {"x_jina_v4_task": "separation", "x_jina_v4_pooling": "engine"},
        {"x_jina_v4_task": "retrieval", "x_jina_v4_pooling": "client"},
        {"x_jina_v4_task": "retrieval,separation", "x_jina_v4_pooling": "engine"},
        {"x_jina_v4_task": "retrieval,retrieval", "x_jina_v4_pooling": "engine"},
        {"x_jina_v4_task": "", "x_jina_v4_pooling": "engine"},
    ],
    ids=str,
)
def test_headers_that_this_client_does_not_know_are_refused(
    server: Any, client: EmbeddingsClient, headers: dict[str, str]
) -> None:
    card = {"id": "x-retrieval", "max_model_len": 99}
    server.routes["/v1/models"] = lambda _: server.json_answer({"data": [card]}, **headers)
    with pytest.raises(BadReplyError, match="install the client of the server's version"):
        client.encode_text("a")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "lists no models"),
        ({"data": []}, "lists no models"),
        ({"data": ["x"]}, "lists no models"),
        ([], "JSON that is no object"),
        ({"data": [{"id": "x-retrieval"}]}, "lacks the model's name or max_model_len"),
        ({"data": [{"max_model_len": 9, "root": "x-retrieval"}]}, "lacks the model's name"),
    ],
    ids=str,
)
def test_a_list_of_models_that_is_no_vllms_is_refused(
    server: Any, client: EmbeddingsClient, document: Any, message: str
) -> None:
    server.routes["/v1/models"] = lambda _: server.json_answer(document)
    with pytest.raises(BadReplyError, match=message):
        client.encode_text("a")


# --- a stock vLLM ---


def test_a_stock_server_is_asked_for_hidden_states_and_pooled_here(server: Any, client: EmbeddingsClient) -> None:
    server.play_stock()
    vectors = client.encode_text(["one two three", "four"], prompt_name="passage", max_length=500, truncate_dim=128)
    assert server.bodies("/pooling") == [
        {
            "model": "jina-embeddings-v4-retrieval",
            "input": ["Passage: one two three", "Passage: four"],
            "truncate_prompt_tokens": 500,
            "truncation_side": "right",
            "task": "token_embed",
            "use_activation": False,
            "encoding_format": "bytes",
            "embed_dtype": "float32",
            "endianness": "little",
        }
    ]
    for text, vector in zip(["one two three", "four"], vectors, strict=True):
        mean = server.text_rows(f"Passage: {text}").astype(float).mean(axis=0)[:128]
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-7)


def test_a_stock_server_gets_one_image_a_request_and_its_vision_span_is_pooled(
    server: Any, client: EmbeddingsClient
) -> None:
    rows = server.image_rows(N_PICTURE_TOKENS)
    server.play_stock(rows_of=lambda _: rows)
    vectors = client.encode_image([PICTURE, PICTURE], max_pixels=50000)
    client.encode_image(PICTURE)
    assert server.paths() == ["/v1/models", "/pooling", "/pooling", "/pooling"]
    body = server.bodies("/pooling")[0]
    assert body["messages"][0]["role"] == "user"
    assert body["mm_processor_kwargs"] == {"min_pixels": 3136, "max_pixels": 50000}
    mean = rows[3:-6].astype(float).mean(axis=0)
    np.testing.assert_allclose(vectors[1], mean / np.linalg.norm(mean), atol=1e-7)


@pytest.mark.parametrize("n_tokens", [N_PICTURE_TOKENS - 1, N_PICTURE_TOKENS + 21], ids=["fewer", "more"])
def test_an_image_prompt_of_another_length_is_refused(server: Any, client: EmbeddingsClient, n_tokens: int) -> None:
    """A chat template with a system message, or 12,845,056 pixels instead of 602,112, would pass for right."""
    server.play_stock(rows_of=lambda _: server.image_rows(n_tokens))
    with pytest.raises(WrongServerError, match="its chat template or its pixel limits differ"):
        client.encode_image(PICTURE)


def test_many_texts_to_a_stock_server_are_sent_in_several_requests(server: Any, client: EmbeddingsClient) -> None:
    server.play_stock()
    assert len(client.encode_text(["word"] * 600, batch_size=600)) == 600
    assert sorted(len(body["input"]) for body in server.bodies("/pooling")) == [88, 256, 256]


@pytest.mark.parametrize(
    ("model", "root", "server_task", "task"),
    [
        ("jina-embeddings-v4-code", "/x", None, "code"),
        ("mine", "/models/jina-embeddings-v4-text-matching/", None, "text-matching"),
        ("v4-retrieval", "/models/v4-retrieval", "retrieval", "retrieval"),
        ("mine", "/x", "code", "code"),
    ],
)
def test_the_task_of_a_stock_server_is_in_its_names_or_said_by_the_caller(
    server: Any, model: str, root: str, server_task: Any, task: Any
) -> None:
    server.play_stock(model, root)
    with EmbeddingsClient(server.url, task=task, server_task=server_task) as client:
        assert client.encode_text("a").shape == (256,)


@pytest.mark.parametrize(
    ("model", "root", "server_task", "message"),
    [
        ("mine", "/x", None, r"serves 'mine', whose name does not end with a task.*server_task="),
        ("v4-retrieval", "/x/v4-code", None, "names code and retrieval"),
        ("v4-retrieval", "/x", "code", "with server_task='code' names code and retrieval"),
    ],
)
def test_a_stock_server_whose_task_cannot_be_told_embeds_nothing(
    server: Any, model: str, root: str, server_task: Any, message: str
) -> None:
    server.play_stock(model, root)
    with (
        EmbeddingsClient(server.url, task="retrieval", server_task=server_task) as client,
        pytest.raises(WrongServerError, match=message),
    ):
        client.encode_text("a")
    assert server.paths() == ["/v1/models"]


def test_a_stock_server_without_token_pooling_is_told_how_to_start(server: Any, client: EmbeddingsClient) -> None:
    server.play_stock()
    del server.routes["/pooling"]
    with pytest.raises(ServerRefusedError, match=r'must be started with .*"task":"token_embed"'):
        client.encode_text("a")


# --- replaced while the client lives ---


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            ("play_ours", "retrieval"),
            ("play_ours", "code"),
            "asked as jina-v4-serve for 'retrieval' and answered as jina-v4-serve for 'code'",
        ),
        (("play_ours", "retrieval"), ("play_stock", "v4-retrieval"), "answered as a stock vLLM"),
    ],
    ids=["another task", "a stock vLLM"],
)
def test_a_server_that_was_replaced_returns_nothing_and_is_found_anew(
    server: Any, client: EmbeddingsClient, before: tuple[str, str], after: tuple[str, str], message: str
) -> None:
    getattr(server, before[0])(before[1])
    client.encode_text("a")
    embed = server.routes["/v1/embeddings"]
    getattr(server, after[0])(after[1])
    if after[0] == "play_stock":
        server.routes["/v1/embeddings"] = lambda seen: server.answer(embed(seen).content)
    with pytest.raises(WrongServerError, match=message):
        client.encode_text("a")
    server.play_ours("retrieval")
    assert client.encode_text("a").shape == (256,)


def test_a_stock_server_that_became_ours_returns_nothing(server: Any, client: EmbeddingsClient) -> None:
    server.play_stock()
    client.encode_text("a")
    pool = server.routes["/pooling"]

    def ours(seen: Any) -> Any:
        answer = pool(seen)
        headers = {"x_jina_v4_task": "retrieval", "x_jina_v4_pooling": "engine"}
        return server.answer(answer.content, metadata=answer.headers["metadata"], **headers)

    server.routes["/pooling"] = ours
    with pytest.raises(WrongServerError, match="asked as a stock vLLM and answered as jina-v4-serve for 'retrieval'"):
        client.encode_text("a")


def test_the_golden_images_are_sent_untouched(server: Any, client: EmbeddingsClient, golden: Any) -> None:
    server.play_ours()
    client.encode_image(golden.images)
    (body,) = server.bodies("/v1/embeddings")
    sent = [item["image"] for item in body["input"]]
    assert sent == [f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" for path in golden.images]
