"""A gateway in front of several servers of ours: one address, the model and the server of each call's task."""

from typing import Any

import pytest
from jina_v4_client import ArgumentError, BadReplyError, EmbeddingsClient, WrongServerError

TASKS = ("retrieval", "text-matching", "code")


def test_each_call_asks_the_model_of_its_task(server: Any) -> None:
    server.play_gateway()
    with EmbeddingsClient(server.url) as client:
        for task in TASKS:
            assert client.encode_text("a", task=task).shape == (256,)
            assert client.encode_text("a", task=task, return_multivector=True).shape == (2, 128)
    bodies = server.bodies("/v1/embeddings")
    assert [body["task"] for body in bodies[::2]] == list(TASKS)
    assert [body["model"] for body in bodies[::2]] == [f"jina-embeddings-v4-{task}" for task in TASKS]
    assert server.paths().count("/v1/models") == 1


def test_the_reply_of_another_task_is_refused(server: Any) -> None:
    server.play_gateway(answered_by=lambda _: "code")
    with EmbeddingsClient(server.url) as client:
        client.encode_text("a", task="code")
        with pytest.raises(WrongServerError, match=r"as jina-v4-serve for 'retrieval' and answered as .* 'code'"):
            client.encode_text("a", task="retrieval")


def test_a_reply_in_the_name_of_several_tasks_is_refused(server: Any) -> None:
    server.play_gateway(answered_by=lambda _: "retrieval,code")
    with (
        EmbeddingsClient(server.url, task="code") as client,
        pytest.raises(WrongServerError, match="answered as jina-v4-serve for 'retrieval, code'"),
    ):
        client.encode_text("a")


def test_spaces_between_the_tasks_do_no_harm(server: Any) -> None:
    server.play_gateway()
    models = server.routes["/v1/models"]

    def spaced(seen: Any) -> Any:
        answer = models(seen)
        answer.headers["x-jina-v4-task"] = "code, retrieval"
        return answer

    server.routes["/v1/models"] = spaced
    with EmbeddingsClient(server.url, task="retrieval") as client:
        assert client.encode_text("a").shape == (256,)


def test_a_task_that_no_server_behind_it_has_embeds_nothing(server: Any) -> None:
    server.play_gateway(("retrieval", "code"))
    with (
        EmbeddingsClient(server.url, task="text-matching") as client,
        pytest.raises(WrongServerError, match="'retrieval' and 'code', and 'text-matching' was asked for"),
    ):
        client.encode_text("a")
    assert server.paths() == ["/v1/models"]


def test_a_model_that_is_named_is_asked_for_its_own_task_only(server: Any) -> None:
    server.play_gateway()
    with EmbeddingsClient(server.url, model="jina-embeddings-v4-code") as client:
        client.encode_text("a", task="code")
        with pytest.raises(ArgumentError, match="is for the task 'code', and 'retrieval' was asked for"):
            client.encode_text("a", task="retrieval")
    assert [body["model"] for body in server.bodies("/v1/embeddings")] == ["jina-embeddings-v4-code"]


def test_a_model_without_a_task_in_its_name_is_asked_for_every_task(server: Any) -> None:
    server.play_gateway()
    cards = [{"id": name, "max_model_len": 99} for name in ("jina-embeddings-v4-code", "jina-embeddings-v4")]
    told = {"x_jina_v4_task": "retrieval,code", "x_jina_v4_pooling": "engine"}
    server.routes["/v1/models"] = lambda _: server.json_answer({"data": cards}, **told)
    with EmbeddingsClient(server.url, model="jina-embeddings-v4") as client:
        client.encode_text("a", task="code")
        client.encode_text("a", task="retrieval")
    sent = [(body["model"], body["task"]) for body in server.bodies("/v1/embeddings")]
    assert sent == [("jina-embeddings-v4", "code"), ("jina-embeddings-v4", "retrieval")]


def test_several_tasks_without_their_models_are_refused(server: Any, client: EmbeddingsClient) -> None:
    told = {"x_jina_v4_task": "retrieval,code", "x_jina_v4_pooling": "engine"}
    server.routes["/v1/models"] = lambda _: server.json_answer({"data": [{"id": "x", "max_model_len": 9}]}, **told)
    with pytest.raises(BadReplyError, match="lists no model jina-embeddings-v4-TASK for any of them"):
        client.encode_text("a")


def test_a_server_that_became_a_gateway_is_as_good(server: Any, client: EmbeddingsClient) -> None:
    server.play_ours()
    client.encode_text("a")
    server.play_gateway()
    assert client.encode_text("a").shape == (256,)
