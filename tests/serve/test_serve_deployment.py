"""The headers and the routes, through a real ASGI application."""

import asyncio
from typing import Any

import pytest
from jina_v4_serve.http import ROUTES, TASK_VARIABLE, Deployment


async def application(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"from vLLM"})


def request(path: str, kind: str = "http") -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    asyncio.run(Deployment(application)({"type": kind, "path": path, "method": "POST"}, receive, send))
    return sent


@pytest.fixture(autouse=True)
def served_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TASK_VARIABLE, "text-matching")


@pytest.mark.parametrize("path", sorted(ROUTES))
def test_a_route_of_the_deployment_answers_with_its_task(path: str) -> None:
    start, body = request(path)
    assert (b"x-jina-v4-task", b"text-matching") in start["headers"]
    assert (b"x-jina-v4-pooling", b"engine") in start["headers"]
    assert (b"content-type", b"text/plain") in start["headers"]
    assert body["body"] == b"from vLLM"


@pytest.mark.parametrize(
    "path",
    ["/pooling", "/v2/embed", "/score", "/rerank", "/tokenize", "/invocations", "/docs", "/v1/embeddings/x", "/"],
)
def test_another_route_of_vllm_does_not_exist(path: str) -> None:
    start, body = request(path)
    assert start["status"] == 404
    assert b"/v1/embeddings" in body["body"]
    assert (b"x-jina-v4-task", b"text-matching") in start["headers"]


def test_a_websocket_is_closed() -> None:
    assert request("/v1/embeddings", kind="websocket") == [{"type": "websocket.close", "code": 1008}]
