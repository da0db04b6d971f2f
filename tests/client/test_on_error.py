"""on_error="skip": what fails is left out and explained, and takes none of its neighbours along."""

import gc
import re
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import plain
from jina_v4_client import (
    ArgumentError,
    BadReplyError,
    ImageError,
    PartialResult,
    ServerAuthenticationError,
    ServerConnectionError,
    ServerFailedError,
    ServerRefusedError,
    ServerTimeoutError,
    WrongServerError,
)

TEXTS = [f"text {n}" for n in range(20)]
BAD = {3, 4, 11, 19}


def refusing(server: Any, refuse: Callable[[int], Any]) -> None:
    """Let the server refuse a request that holds a bad text; `refuse` gets the first bad item's index in it."""
    embed = server.routes["/v1/embeddings"]

    def play(seen: Any) -> Any:
        bad = [i for i, item in enumerate(seen.body["input"]) if int(item["text"].split()[1]) in BAD]
        return refuse(bad[0]) if bad else embed(seen)

    server.routes["/v1/embeddings"] = play


def named(server: Any, status: int) -> Callable[[int], Any]:
    return lambda index: server.json_answer(
        {"error": {"message": f"input[{index}] is too long", "param": f"input[{index}]"}}, status
    )


def unnamed(server: Any, status: int) -> Callable[[int], Any]:
    return lambda index: server.json_answer({"error": {"message": "something is too long"}}, status)


def check(server: Any, found: PartialResult, bad: set[int] = BAD) -> None:
    assert set(found.errors) == bad
    assert list(found.errors) == sorted(bad)
    assert len(found.vectors) == len(TEXTS)
    for place, vector in enumerate(found.vectors):
        if place in bad:
            assert vector is None
        else:
            np.testing.assert_array_equal(vector, server.vector(f"Query: {TEXTS[place]}"))


@pytest.mark.parametrize("refuse", [named, unnamed])
@pytest.mark.parametrize("batch_size", [1, 5, 20])
@pytest.mark.parametrize("status", [400, 413, 422])
def test_refused_items_leave_their_neighbours_alone(
    server: Any, make_client: Any, refuse: Any, batch_size: int, status: int
) -> None:
    server.play_ours()
    refusing(server, refuse(server, status))
    found = make_client(server.url).encode_text(TEXTS, batch_size=batch_size, on_error="skip")
    check(server, found)
    for error in found.errors.values():
        assert isinstance(error, ServerRefusedError)
        assert "is too long" in str(error)
    assert len(server.bodies("/v1/embeddings")) <= 2 * len(TEXTS)
    assert server.paths().count("/v1/models") == 1


@pytest.mark.long
def test_a_thousand_bad_items_of_one_batch_are_left_out_one_by_one(server: Any, make_client: Any) -> None:
    server.play_ours()
    server.routes["/v1/embeddings"] = lambda _: named(server, 422)(0)
    found = make_client(server.url).encode_text(["x"] * 1200, batch_size=2048, on_error="skip")
    assert len(found.errors) == 1200
    assert len(server.bodies("/v1/embeddings")) == 1200


def test_a_server_that_refuses_everything_is_asked_no_more_than_twice_an_item(server: Any, make_client: Any) -> None:
    server.play_ours()
    server.routes["/v1/embeddings"] = lambda _: unnamed(server, 400)(0)
    found = make_client(server.url).encode_text(TEXTS, batch_size=20, on_error="skip")
    assert found.vectors == [None] * 20
    assert len(server.bodies("/v1/embeddings")) == 2 * 20 - 1


def test_a_refusal_of_what_the_call_asks_for_ends_it(server: Any, make_client: Any) -> None:
    server.play_ours()
    message = {"message": "max_pixels=9999999 is over this server's limit", "param": "max_pixels"}
    server.routes["/v1/embeddings"] = lambda _: server.json_answer({"error": message}, 422)
    with pytest.raises(ServerRefusedError, match="over this server's limit"):
        make_client(server.url, max_concurrency=1).encode_image(
            [plain((40, 30))] * 9, on_error="skip", max_pixels=9999999
        )
    assert len(server.bodies("/v1/embeddings")) == 1


def test_an_index_that_is_not_in_the_request_is_not_believed(server: Any, make_client: Any) -> None:
    server.play_ours()
    refusing(server, lambda index: named(server, 422)(index + 20))
    check(server, make_client(server.url).encode_text(TEXTS, on_error="skip"))


def test_without_skip_the_item_of_the_call_is_named(server: Any, make_client: Any) -> None:
    server.play_ours()
    refusing(server, named(server, 400))
    client = make_client(server.url, max_concurrency=1)
    with pytest.raises(ServerRefusedError, match=r"input\[3\] is too long$"):
        client.encode_text(TEXTS, batch_size=10)
    with pytest.raises(ServerRefusedError, match=r"input\[1\] is too long \(input\[1\] is item 11 of the call\)$"):
        client.encode_text(TEXTS[5:10] + TEXTS[12:17] + TEXTS[10:12], batch_size=10)


def test_with_skip_every_error_names_the_item_of_the_call(server: Any, make_client: Any) -> None:
    server.play_ours()
    refusing(server, named(server, 400))
    found = make_client(server.url).encode_text(TEXTS, batch_size=10, on_error="skip")
    assert [str(error).partition("input")[2] for error in found.errors.values()] == [
        "[3] is too long",
        "[3] is too long (input[3] is item 4 of the call)",
        "[1] is too long (input[1] is item 11 of the call)",
        "[8] is too long (input[8] is item 19 of the call)",
    ]


def test_an_item_for_which_the_server_fails_leaves_its_neighbours_alone(server: Any, make_client: Any) -> None:
    server.play_ours()
    refusing(server, lambda _: server.json_answer({"error": "not finite"}, 500))
    found = make_client(server.url, max_retries=1).encode_text(TEXTS, on_error="skip", batch_size=7)
    check(server, found)
    assert all(isinstance(error, ServerFailedError) for error in found.errors.values())


@pytest.mark.parametrize(
    ("answer", "kind", "n_requests"),
    [
        pytest.param(lambda server: server.dropped(), ServerConnectionError, 3, id="broken connections"),
        pytest.param(lambda server: server.json_answer({}, 503), ServerFailedError, 3, id="503"),
        pytest.param(lambda server: server.answer(b"?"), WrongServerError, 3, id="another server"),
        pytest.param(lambda server: server.json_answer({}, 404), ServerRefusedError, 3, id="404"),
        pytest.param(lambda server: server.json_answer({}, 401), ServerAuthenticationError, 1, id="401"),
    ],
)
def test_a_server_that_is_gone_is_not_asked_for_ever(
    server: Any, make_client: Any, answer: Any, kind: type[Exception], n_requests: int
) -> None:
    server.play_ours()
    embed, lock, left = server.routes["/v1/embeddings"], threading.Lock(), iter(range(2))

    def play(seen: Any) -> Any:
        with lock:
            right = next(left, None) is not None
        return embed(seen) if right else answer(server)

    server.routes["/v1/embeddings"] = play
    client = make_client(server.url, max_retries=0, max_concurrency=1)
    found = client.encode_text(TEXTS, batch_size=2, on_error="skip")
    check(server, found, set(range(4, 20)))
    assert all(isinstance(error, kind) for error in found.errors.values())
    assert len(server.bodies("/v1/embeddings")) == 2 + n_requests


def test_a_server_that_fails_on_everything_is_given_up(server: Any, make_client: Any) -> None:
    server.play_ours()
    server.routes["/v1/embeddings"] = lambda _: server.json_answer({}, 500)
    client = make_client(server.url, max_retries=0, max_concurrency=1)
    found = client.encode_text(TEXTS * 50, batch_size=4, on_error="skip")
    assert found.vectors == [None] * 1000
    assert len(server.bodies("/v1/embeddings")) < 20


@pytest.mark.proof
def test_the_total_time_limit_leaves_what_is_done(server: Any, make_client: Any) -> None:
    server.play_ours()
    embed = server.routes["/v1/embeddings"]

    def play(seen: Any) -> Any:
        if "text 9" in str(seen.body):
            server.closing.wait(60)
        return embed(seen)

    server.routes["/v1/embeddings"] = play
    client = make_client(server.url, total_timeout_s=4.0, max_concurrency=1)
    client.encode_text("a")
    found = client.encode_text(TEXTS, batch_size=3, on_error="skip")
    assert set(range(9, 20)) <= set(found.errors) < set(range(20))
    check(server, found, set(found.errors))
    assert all(isinstance(error, ServerTimeoutError) for error in found.errors.values())


def test_skip_does_not_hide_that_there_is_no_server(server: Any, make_client: Any) -> None:
    server.routes["/v1/models"] = lambda _: server.html_answer()
    with pytest.raises(BadReplyError):
        make_client(server.url).encode_text(TEXTS, on_error="skip")


def test_images_that_cannot_be_read_or_fetched_are_left_out(server: Any, make_client: Any, tmp_path: Path) -> None:
    server.play_ours()
    server.routes["/right.png"] = lambda _: server.answer(plain((40, 30), 1))
    images = [
        plain((40, 30)),
        b"no image",
        f"{server.url}/right.png",
        f"{server.url}/missing.png",
        tmp_path / "none.png",
        plain((40, 30), 2),
        7,
    ]
    found = make_client(server.url).encode_image(images, on_error="skip", truncate_dim=128)
    assert [vector is not None for vector in found.vectors] == [True, False, True, False, False, True, False]
    assert list(found.errors) == [1, 3, 4, 6]
    for place, error in found.errors.items():
        assert isinstance(error, ImageError)
        assert str(error).startswith(f"images[{place}] (")
    assert [len(body["input"]) for body in server.bodies("/v1/embeddings")] == [3]


def test_texts_that_cannot_be_sent_are_left_out(server: Any, make_client: Any) -> None:
    server.play_ours()
    found = make_client(server.url).encode_text(["a", None, "x\ud800", "b"], on_error="skip")
    assert {place: re.sub(r",.*|:.*", "", str(error)) for place, error in found.errors.items()} == {
        1: "texts[1] must be a str",
        2: "texts[2] cannot be written as UTF-8",
    }
    np.testing.assert_array_equal(found.vectors[3], server.vector("Query: b"))


@pytest.mark.parametrize(("call", "items"), [("encode_text", "texts"), ("encode", "sentences")])
def test_texts_that_a_stock_server_would_misread_are_left_out(
    server: Any, make_client: Any, call: str, items: str
) -> None:
    server.play_stock()
    embed = getattr(make_client(server.url), call)
    found = embed(["one", "<|image_pad|>", "two"], prompt_name="query", on_error="skip", batch_size=2)
    assert [vector is None for vector in found.vectors] == [False, True, False]
    assert isinstance(found.errors[1], ArgumentError)
    assert str(found.errors[1]).startswith(f"{items}[1] holds '<|image_pad|>'")
    assert server.bodies("/pooling")[0]["input"] == ["Query: one", "Query: two"]


class Item(str):
    """A text or URL that a weak reference can watch."""

    __slots__ = ("__weakref__",)


@pytest.mark.parametrize(
    ("call", "item", "bad"),
    [
        pytest.param("encode_text", "a", None, id="no text"),
        pytest.param("encode_text", "a", "refused", id="refused"),
        pytest.param("encode_text", "a", "no key", id="given up"),
        pytest.param("encode_image", "{url}/missing.png", b"no image", id="no image"),
    ],
)
def test_errors_that_are_kept_hold_nothing_else_of_the_call(
    server: Any, make_client: Any, call: str, item: str, bad: Any
) -> None:
    """A program that embeds in parts may collect them; all images of all parts would stay in memory."""
    server.play_ours()
    embed = server.routes["/v1/embeddings"]

    def answer(seen: Any) -> Any:
        if {"text": "no key"} in seen.body["input"]:
            return server.json_answer({}, 401)
        return named(server, 400)(1) if {"text": "refused"} in seen.body["input"] else embed(seen)

    server.routes["/v1/embeddings"] = answer
    items = [Item(item.format(url=server.url)), bad]
    of_the_call = weakref.ref(items[0])
    errors = getattr(make_client(server.url), call)(items, on_error="skip").errors
    assert 1 in errors
    del items
    gc.collect()
    assert of_the_call() is None


def test_several_failures_at_the_same_time_end_no_call(server: Any, make_client: Any) -> None:
    server.play_ours()
    together = threading.Barrier(4)

    def refuse(_: Any) -> Any:
        together.wait(timeout=30)
        return server.json_answer({}, 401)

    server.routes["/v1/embeddings"] = refuse
    client = make_client(server.url, max_concurrency=4)
    for _ in range(10):
        found = client.encode_text(list("abcd"), on_error="skip", batch_size=1)
        assert set(found.errors) == {0, 1, 2, 3}


def test_nothing_is_sent_if_no_item_is_left(server: Any, make_client: Any) -> None:
    found = make_client(server.url).encode_text([None, 3], on_error="skip")
    assert found.vectors == [None, None]
    assert server.seen == []


def test_a_single_item_gives_the_same_form(server: Any, make_client: Any) -> None:
    server.play_ours()
    found = make_client(server.url).encode_text("a", on_error="skip", return_numpy=True)
    assert isinstance(found, PartialResult)
    assert (len(found.vectors), found.errors) == (1, {})


def test_on_error_takes_no_other_word(server: Any, make_client: Any) -> None:
    with pytest.raises(ArgumentError, match="on_error='ignore' is not offered; choose raise or skip"):
        make_client(server.url).encode_text("a", on_error="ignore")
