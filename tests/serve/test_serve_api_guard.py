"""Before and after every route: key, routes, request id, headers; and the token budget."""

import asyncio
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from jina_v4_serve.api.budget import TokenBudget
from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.api.guard import OPEN, ROUTES, Guard
from jina_v4_serve.api.record import current
from jina_v4_serve.api.settings import read_settings
from jina_v4_serve.errors import OptionError
from jina_v4_serve.plugin import SERVED_REVISIONS, SERVED_TASKS


async def application(scope: Any, receive: Any, send: Any) -> None:
    headers = [(b"content-type", b"text/plain"), (b"X-Request-Id", b"vllm's own")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": scope["state"]["request_id"].encode()})


def request(
    path: str, method: str = "GET", kind: str = "http", app: Any = application, server: Any = None, **headers: str
) -> tuple[Any, ...]:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    loaded = SimpleNamespace(state=SimpleNamespace(jina_v4=object()))
    scope = {"type": kind, "path": path, "method": method, "headers": given, "app": server or loaded}
    asyncio.run(Guard(app)(scope, receive, send))
    return tuple(sent)


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVED_TASKS, "text-matching")
    monkeypatch.delenv("JINA_V4_API_KEY", raising=False)


def test_vllms_own_embeddings_are_never_given_for_ours() -> None:
    start, body = request("/v1/embeddings", "POST", server=SimpleNamespace(state=SimpleNamespace()))
    assert (start["status"], orjson.loads(body["body"])["error"]["code"]) == (503, "NOT_LOADED")


def test_of_several_tasks_an_answer_names_its_own_and_any_other_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVED_TASKS, "retrieval,code")
    monkeypatch.setenv(SERVED_REVISIONS, "one,two")

    async def embeds_code(scope: Any, receive: Any, send: Any) -> None:
        current().task = "code"
        await application(scope, receive, send)

    for app, task, revision in ((application, b"retrieval, code", b"one, two"), (embeds_code, b"code", b"two")):
        headers = dict(request("/v1/embeddings", "POST", app=app)[0]["headers"])
        assert (headers[b"x-jina-v4-task"], headers[b"x-jina-v4-revision"]) == (task, revision)


@pytest.mark.parametrize(("path", "methods"), ROUTES.items(), ids=str)
def test_a_route_answers_with_its_task_and_an_id(path: str, methods: set[str]) -> None:
    start, body = request(path, next(iter(methods)))
    headers = dict(start["headers"])
    assert (headers[b"x-jina-v4-task"], headers[b"x-jina-v4-pooling"]) == (b"text-matching", b"engine")
    assert headers[b"x-request-id"] == body["body"]
    assert [name.lower() for name, _ in start["headers"]].count(b"x-request-id") == 1


def test_an_answer_names_the_revision_that_the_launcher_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert b"x-jina-v4-revision" not in dict(request("/health", "GET")[0]["headers"])
    monkeypatch.setenv(SERVED_REVISIONS, "94ab5b9a669fa4df-bfloat16-602112")
    for path in ("/health", "/nothing"):
        headers = dict(request(path, "GET")[0]["headers"])
        assert headers[b"x-jina-v4-revision"] == b"94ab5b9a669fa4df-bfloat16-602112"


@pytest.mark.parametrize(
    "path", ["/pooling", "/v2/embed", "/score", "/tokenize", "/invocations", "/v1/embeddings/", "/"]
)
def test_another_route_of_vllm_does_not_exist(path: str) -> None:
    start, body = request(path, "POST")
    assert start["status"] == 404
    assert orjson.loads(body["body"])["error"]["code"] == "NOT_FOUND"


def test_another_method_is_refused() -> None:
    start, body = request("/v1/embeddings", "GET")
    assert (start["status"], orjson.loads(body["body"])["error"]["message"]) == (405, "/v1/embeddings takes POST")


def test_a_websocket_is_closed() -> None:
    assert request("/v1/embeddings", kind="websocket") == ({"type": "websocket.close", "code": 1008},)


@pytest.mark.parametrize(("sent", "kept"), [("abc-1.2_3", True), ("a b", False), ("x" * 129, False), ("", False)])
def test_a_sane_request_id_is_kept(sent: str, kept: bool) -> None:
    start, _ = request("/health", x_request_id=sent)
    assert (dict(start["headers"])[b"x-request-id"] == sent.encode()) is kept


@pytest.mark.parametrize("given", ["", "Bearer wrong", "Bearer secre", "Bearer secret ", "secret", "bearer secret"])
def test_without_the_key_only_the_probes_answer(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JINA_V4_API_KEY", "secret")
    for path, methods in ROUTES.items():
        start, body = request(path, next(iter(methods)), authorization=given)
        assert start["status"] == (200 if path in OPEN else 401)
        if path not in OPEN:
            content = orjson.loads(body["body"])
            assert content["code"] == content["error"]["code"] == "UNAUTHORIZED"
            assert isinstance(content["detail"], str)
            assert "secret" not in body["body"].decode()


def test_the_key_opens_every_route(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "key").write_text("from a file\n")
    monkeypatch.setenv("JINA_V4_API_KEY_FILE", str(tmp_path / "key"))
    for path, methods in ROUTES.items():
        start, _ = request(path, next(iter(methods)), authorization="Bearer from a file")
        assert start["status"] == 200


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("JINA_V4_MAX_ITEMS", "many", "JINA_V4_MAX_ITEMS=many is not offered"),
        ("JINA_V4_MAX_BODY_BYTES", "-1", "whole number above 0"),
        ("JINA_V4_API_KEY_FILE", "/nowhere/key", "cannot read /nowhere/key"),
        ("JINA_V4_API_KEY_FILE", "/dev/null", "is empty"),
    ],
)
def test_a_bad_setting_stops_the_server(name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(OptionError, match=message):
        read_settings()


def test_a_budget_refuses_what_does_not_fit_beside_the_rest() -> None:
    budget = TokenBudget(100)
    with budget.spend(60):
        with pytest.raises(ApiError) as caught, budget.spend(60):
            pass
        assert caught.value.status == 429
        assert caught.value.headers() == {"retry-after": "30"}  # nothing was ever finished: no rate is known
        with budget.spend(40), pytest.raises(ApiError):
            budget.check()
        budget.check()
    assert budget.in_flight == 0
    with budget.spend(1000):  # alone, a request may be larger than the budget
        assert budget.in_flight == 1000
        with pytest.raises(ApiError) as caught:
            budget.check()
        assert 1 <= int(caught.value.headers()["retry-after"]) <= 30


def test_a_failed_request_gives_its_tokens_back() -> None:
    budget = TokenBudget(100)
    with pytest.raises(ZeroDivisionError), budget.spend(50):
        raise ZeroDivisionError
    assert budget.in_flight == 0
