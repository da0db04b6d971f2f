"""How vectors travel: safetensors, base64, plain numbers, and what happens where one of them does not get through."""

from typing import Any

import numpy as np
import pytest
from jina_v4_client import ArgumentError, EmbeddingsClient, ServerRefusedError
from jina_v4_client._calls import Batch, Call, cut
from jina_v4_client._images import PreparedImage
from PIL import Image

TEXTS = [f"a text of number {n}" for n in range(9)]
FORMATS = ("safetensors", "base64", "float")


@pytest.mark.parametrize("multivector", [False, True], ids=["dense", "multi"])
@pytest.mark.parametrize("wire_format", FORMATS)
def test_every_format_gives_the_same_bits(server: Any, make_client: Any, wire_format: Any, multivector: bool) -> None:
    server.play_ours()
    found = make_client(server.url, wire_format=wire_format).encode_text(
        TEXTS, return_multivector=multivector, batch_size=4
    )
    make = server.token_rows if multivector else server.vector
    for vector, text in zip(found, TEXTS, strict=True):
        assert (vector.dtype, vector.flags.writeable) == (np.float32, True)
        np.testing.assert_array_equal(vector, make(f"Query: {text}"))
    asked = {(seen.headers["accept"], seen.body.get("encoding_format")) for seen in server.seen[1:]}
    assert asked == {
        ("application/x-safetensors", None) if wire_format == "safetensors" else ("application/json", wire_format)
    }


@pytest.mark.parametrize("multivector", [False, True], ids=["dense", "multi"])
def test_a_server_that_answers_with_json_is_understood_and_asked_for_base64_from_then_on(
    server: Any, make_client: Any, multivector: bool
) -> None:
    server.play_gateway(("retrieval",), json_only=True)
    client = make_client(server.url, max_concurrency=1, wire_dtype="float16")
    found = client.encode_text(TEXTS, return_multivector=multivector, batch_size=3)
    make = server.token_rows if multivector else server.vector
    for vector, text in zip(found, TEXTS, strict=True):
        np.testing.assert_allclose(vector, make(f"Query: {text}"), atol=3e-4)
    bodies = server.bodies("/v1/embeddings")
    assert [body.get("encoding_format") for body in bodies] == [None, "base64", "base64"]


def test_a_server_that_refuses_safetensors_and_base64_is_asked_for_numbers(server: Any, make_client: Any) -> None:
    server.play_ours()
    embed = server.routes["/v1/embeddings"]

    def choosy(seen: Any) -> Any:
        if "safetensors" in seen.headers["accept"]:
            return server.json_answer({"detail": "Not Acceptable"}, 406)
        if seen.body["encoding_format"] == "base64":
            return server.json_answer({"error": {"message": "no base64", "param": "encoding_format"}}, 400)
        return embed(seen)

    server.routes["/v1/embeddings"] = choosy
    client = make_client(server.url, max_concurrency=3)
    for _ in range(2):
        found = client.encode_text(TEXTS, batch_size=2)
        np.testing.assert_array_equal(found, [server.vector(f"Query: {text}") for text in TEXTS])
    formats = [body.get("encoding_format") for body in server.bodies("/v1/embeddings")]
    assert formats[-5:] == ["float"] * 5  # the second call knows
    assert formats.count("float") == 10


def test_a_refusal_for_another_reason_does_not_change_the_format(server: Any, make_client: Any) -> None:
    server.play_ours()
    server.routes["/v1/embeddings"] = lambda _: server.json_answer({"error": {"message": "no", "param": "input"}}, 400)
    with pytest.raises(ServerRefusedError):
        make_client(server.url, wire_format="base64").encode_text("a")
    assert len(server.bodies("/v1/embeddings")) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"wire_format": "npy"}, "wire_format='npy' is not offered; choose safetensors, base64, float"),
        ({"wire_format": "base64", "wire_dtype": "float16"}, "sent as safetensors only, not as wire_format='base64'"),
        ({"max_concurrency": 0}, "max_concurrency=0 is not allowed; give an integer, at least 1"),
        ({"total_timeout_s": 0}, "total_timeout_s=0 is not allowed; give a number of seconds above 0"),
    ],
    ids=str,
)
def test_a_setting_that_is_not_allowed_says_why(make_client: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make_client("http://127.0.0.1:9", **arguments)


# --- cutting ---


def batch_of(items: list[Any], max_length: int = 32768) -> Batch:
    call = Call("sentences", ["x"], "code", batch_size=8, truncate_dim=None, progress=False, max_length=max_length)
    call.items = items  # as they are once they are read
    return Batch(call, range(len(items)))


def texts_of(*lengths: int, max_length: int = 32768) -> Batch:
    return batch_of(["x" * length for length in lengths], max_length)


def images_of(*sizes: tuple[int, int, int]) -> Batch:
    return batch_of([PreparedImage(bytes(n_bytes), "image/png", width, height) for width, height, n_bytes in sizes])


@pytest.mark.parametrize(
    ("whole", "limits", "sizes"),
    [
        pytest.param(texts_of(*[9] * 20), (8, 10**6, 10**6), [8, 8, 4], id="items"),
        pytest.param(texts_of(*[392] * 10), (8, 300, 10**6), [3, 3, 3, 1], id="tokens"),
        pytest.param(texts_of(*[4000] * 4, max_length=10), (8, 20, 10**6), [2, 2], id="tokens, cut off"),
        pytest.param(texts_of(*[100] * 5), (8, 10**6, 250), [2, 2, 1], id="bytes"),
        pytest.param(texts_of(9, 4000, 9, 9), (8, 100, 10**6), [1, 1, 2], id="one alone over the limit"),
        pytest.param(texts_of(4000, 9), (8, 100, 10**6), [1, 1], id="the first over the limit"),
        pytest.param(texts_of(), (8, 100, 10**6), [], id="nothing"),
        pytest.param(images_of(*[(280, 280, 9)] * 4), (8, 222, 10**6), [2, 2], id="image tokens"),
        pytest.param(images_of(*[(28, 28, 300)] * 4), (8, 10**6, 800), [2, 2], id="image bytes"),
        pytest.param(images_of(*[(4000, 3000, 9)] * 4), (8, 1600, 10**6), [2, 2], id="large images"),
    ],
)
def test_batches_are_cut_by_items_tokens_and_bytes(whole: Any, limits: tuple[int, int, int], sizes: list[int]) -> None:
    parts = list(cut(whole, *limits))
    assert [len(part.items) for part in parts] == sizes
    assert [place for part in parts for place in part.places] == list(whole.places)
    assert [item for part in parts for item in part.items] == whole.items


def test_long_texts_go_in_smaller_requests(server: Any) -> None:
    server.play_ours()
    with EmbeddingsClient(server.url, task="retrieval") as client:
        client.encode_text(["word " * 6000] * 5, batch_size=64)
        client.encode_image([Image.new("RGB", (900, 900))] * 30, batch_size=64)
    assert sorted(len(body["input"]) for body in server.bodies("/v1/embeddings")) == [1, 2, 2, 8, 22]


def test_no_more_requests_are_written_than_are_in_flight(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from jina_v4_client import _ours

    server.play_ours()
    write, written, read = _ours.write_request, [], []
    monkeypatch.setattr(_ours, "write_request", lambda *args: (written.append(len(read)), write(*args))[1])
    kept = _ours.read_reply
    monkeypatch.setattr(_ours, "read_reply", lambda *args: (read.append(1), kept(*args))[1])
    with EmbeddingsClient(server.url, task="retrieval", max_concurrency=3) as client:
        client.encode_text([f"text {n}" for n in range(30)], batch_size=1)
    assert all(number - n_read < 3 for number, n_read in enumerate(written))
    assert len(written) == 30


@pytest.mark.parametrize("priority", [0, 7])
def test_a_priority_goes_with_each_request_unless_it_is_the_first(server: Any, make_client: Any, priority: int) -> None:
    server.play_ours()
    make_client(server.url, priority=priority).encode_text(TEXTS, batch_size=4)
    assert {body.get("priority") for body in server.bodies("/v1/embeddings")} == {priority or None}


@pytest.mark.parametrize("priority", [-1, 1000, "last", 1.5])
def test_a_priority_that_no_server_knows_is_refused(priority: Any) -> None:
    with pytest.raises(ArgumentError, match="priority"):
        EmbeddingsClient("http://127.0.0.1:1", priority=priority)
