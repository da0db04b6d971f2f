"""Vectors of two revisions of the model do not go together; the client tells which it gets, and holds on to it."""

from collections.abc import Callable
from typing import Any

import pytest
from jina_v4_client import ArgumentError, ServerError, WrongServerError

OLD, NEW = "94ab5b9a669fa4df-bfloat16-602112", "0123456789abcdef-bfloat16-602112"

Made = Callable[..., Any]


@pytest.fixture(autouse=True)
def served(server: Any) -> None:
    server.revisions = {"retrieval": OLD, "code": NEW}
    server.play_ours()


def test_a_client_tells_the_revision_of_its_task(server: Any, make_client: Made) -> None:
    assert make_client(server.url).revision() == OLD
    assert server.paths() == ["/v1/models"]


def test_behind_a_gateway_each_task_has_its_own(server: Any, make_client: Made) -> None:
    server.play_gateway(("code", "retrieval"))  # not in the order in which the client knows the tasks
    client = make_client(server.url)
    assert [client.revision(task) for task in ("retrieval", "code")] == [OLD, NEW]
    for task in ("retrieval", "code"):
        assert client.encode_text("a", task=task).shape == (256,)


def test_a_client_keeps_to_the_revision_that_it_has_told(server: Any, make_client: Made) -> None:
    client = make_client(server.url)
    client.revision()
    client.encode_text("a")
    server.revisions["retrieval"] = NEW
    with pytest.raises(
        WrongServerError, match=f"served revision {OLD} and answered with {NEW}: its model was replaced"
    ):
        client.encode_text("a")
    for ask in (lambda: client.encode_text("a"), client.revision):  # later calls too
        with pytest.raises(
            WrongServerError, match=f"serves revision {NEW} for 'retrieval', and this client is held to {OLD}: "
        ):
            ask()
    assert len(server.bodies("/v1/embeddings")) == 2
    server.revisions["retrieval"] = OLD
    assert client.encode_text("a").shape == (256,)


def test_one_call_never_returns_vectors_of_two_revisions(server: Any, make_client: Made) -> None:
    client = make_client(server.url, max_concurrency=1)
    play = server.routes["/v1/embeddings"]

    def embed(seen: Any) -> Any:
        answer = play(seen)
        server.revisions["retrieval"] = NEW  # from the second request on
        return answer

    server.routes["/v1/embeddings"] = embed
    with pytest.raises(WrongServerError, match="its model was replaced"):
        client.encode_text(["a", "b", "c"], batch_size=1)
    assert len(client.encode_text(["a", "b", "c"], batch_size=1)) == 3  # free: nobody asked


def test_with_skip_the_items_of_the_other_revision_are_left_out(server: Any, make_client: Made) -> None:
    client = make_client(server.url, max_concurrency=1)
    play = server.routes["/v1/embeddings"]

    def embed(seen: Any) -> Any:
        if len(server.bodies("/v1/embeddings")) == 3:
            server.revisions["retrieval"] = NEW
        return play(seen)

    server.routes["/v1/embeddings"] = embed
    done = client.encode_text(["a", "b", "c", "d"], batch_size=1, on_error="skip")
    assert [vector is not None for vector in done.vectors] == [True, True, False, False]
    assert {place: type(error) for place, error in done.errors.items()} == dict.fromkeys((2, 3), WrongServerError)


def test_a_client_made_for_a_revision_refuses_others(server: Any, make_client: Made) -> None:
    assert make_client(server.url, revision=OLD).encode_text("a").shape == (256,)
    with pytest.raises(WrongServerError, match="nothing was embedded"):
        make_client(server.url, revision=NEW).encode_text("a")
    assert len(server.bodies("/v1/embeddings")) == 1


@pytest.mark.parametrize("play", ["play_ours", "play_stock"])
def test_a_client_made_for_a_revision_refuses_a_server_that_tells_none(
    play: str, server: Any, make_client: Made
) -> None:
    server.revisions = {}
    getattr(server, play)()
    assert make_client(server.url).revision() is None
    with pytest.raises(WrongServerError, match="serves revision None"):
        make_client(server.url, revision=OLD).encode_text("a")


@pytest.mark.parametrize("revision", ["", "main", 5, OLD + "\n", f"{OLD}, {NEW}"])
def test_a_revision_that_no_server_can_have_is_refused(revision: Any, server: Any, make_client: Made) -> None:
    with pytest.raises(ArgumentError, match="give what `revision\\(\\)` of a client returned"):
        make_client(server.url, revision=revision)


def test_a_dead_server_is_an_error_and_the_next_question_is_free(server: Any, make_client: Made) -> None:
    models = server.routes["/v1/models"]
    server.routes["/v1/models"] = lambda _: server.json_answer({}, 503)
    client = make_client(server.url, max_retries=0)
    with pytest.raises(ServerError, match="503"):
        client.revision()
    server.routes["/v1/models"] = models
    assert client.revision() == OLD
