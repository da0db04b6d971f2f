"""Before and after every route: key, routes, request id, headers; and the token budget."""

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from jina_v4_serve.api.budget import TokenBudget
from jina_v4_serve.api.door import COHERE, COHERE_RERANK, EMBEDDING_ROUTES, OPEN
from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.api.guard import ROUTES, Guard
from jina_v4_serve.api.keys import Keys
from jina_v4_serve.api.record import current
from jina_v4_serve.errors import OptionError
from jina_v4_serve.settings import SERVED_REVISIONS, SERVED_TASKS, read_settings


async def application(scope: Any, receive: Any, send: Any) -> None:
    headers = [(b"content-type", b"text/plain"), (b"X-Request-Id", b"vllm's own")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": scope["state"]["request_id"].encode()})


def request(
    path: str, method: str = "GET", app: Any = application, server: Any = None, **headers: str
) -> tuple[Any, ...]:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    loaded = SimpleNamespace(state=SimpleNamespace(jina_v4=object()))
    scope = {"type": "http", "path": path, "method": method, "headers": given, "app": server or loaded}
    asyncio.run(Guard(app)(scope, receive, send))
    return tuple(sent)


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVED_TASKS, "text-matching")
    monkeypatch.delenv("JINA_V4_API_KEY", raising=False)


def test_vllms_own_embeddings_are_never_given_for_ours() -> None:
    """It has all of these routes itself."""
    for path in EMBEDDING_ROUTES:
        start, body = request(path, "POST", server=SimpleNamespace(state=SimpleNamespace()))
        assert start["status"] == 503
        assert "the routes of jina-v4-serve are not loaded" in body["body"].decode()


def test_of_several_tasks_an_answer_names_its_own_and_any_other_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVED_TASKS, "retrieval,code")
    monkeypatch.setenv(SERVED_REVISIONS, "one,two")

    async def embeds_code(scope: Any, receive: Any, send: Any) -> None:
        current().task = "code"
        await application(scope, receive, send)

    for app, task, revision in ((application, b"retrieval, code", b"one, two"), (embeds_code, b"code", b"two")):
        headers = dict(request("/v1/embeddings", "POST", app=app)[0]["headers"])
        assert (headers[b"x-jina-v4-task"], headers[b"x-jina-v4-revision"]) == (task, revision)


@pytest.mark.parametrize(("path", "method"), ROUTES.items(), ids=str)
def test_a_route_answers_with_its_task_and_an_id(path: str, method: str) -> None:
    start, body = request(path, method)
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
    "path",
    ["/pooling", "/v1/embed", "/score", "/rerank", "/v1/rerank/", "/tokenize", "/invocations", "/v1/embeddings/", "/"],
)
def test_another_route_of_vllm_does_not_exist(path: str) -> None:
    start, body = request(path, "POST")
    assert start["status"] == 404
    assert orjson.loads(body["body"])["error"]["code"] == "NOT_FOUND"


def test_another_method_is_refused() -> None:
    start, body = request("/v1/embeddings", "GET")
    assert (start["status"], orjson.loads(body["body"])["error"]["message"]) == (405, "/v1/embeddings accepts POST")


@pytest.mark.parametrize(("sent", "kept"), [("abc-1.2_3", True), ("a b", False), ("x" * 129, False), ("", False)])
def test_a_sane_request_id_is_kept(sent: str, kept: bool) -> None:
    start, _ = request("/health", x_request_id=sent)
    assert (dict(start["headers"])[b"x-request-id"] == sent.encode()) is kept


@pytest.mark.parametrize("given", ["", "Bearer wrong", "Bearer secre", "Bearer secrets", "secret"])
def test_without_the_key_only_the_probes_answer(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JINA_V4_API_KEY", "secret")
    for path, method in ROUTES.items():
        start, body = request(path, method, authorization=given)
        assert start["status"] == (200 if path in OPEN else 401)
        if path not in OPEN:
            content = orjson.loads(body["body"])
            assert "secret" not in body["body"].decode()
            if path in (COHERE, COHERE_RERANK):
                assert content.keys() == {"id", "message"}
                continue
            assert content["code"] == content["error"]["code"] == "UNAUTHORIZED"
            assert isinstance(content["detail"], str)


def test_the_key_opens_every_route(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "key").write_text("from a file\n")
    monkeypatch.setenv("JINA_V4_API_KEY_FILE", str(tmp_path / "key"))
    for path, method in ROUTES.items():
        start, _ = request(path, method, authorization="Bearer from a file")
        assert start["status"] == 200


@pytest.mark.parametrize("written", ["secret\n", " secret", "secret\r\n", "\tsecret \n\n"], ids=repr)
@pytest.mark.parametrize("place", ["JINA_V4_API_KEY", "JINA_V4_API_KEY_FILE"])
def test_white_space_around_a_key_is_no_part_of_it(
    place: str, written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_bytes(written.encode())
    monkeypatch.setenv(place, f"{tmp_path / 'key'}\n" if place.endswith("FILE") else written)
    start, _ = request("/version", authorization="Bearer secret")
    assert start["status"] == 200


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("JINA_V4_MAX_ITEMS", "many", "JINA_V4_MAX_ITEMS=many is not offered"),
        ("JINA_V4_MAX_ITEMS", "٣", "whole number above 0"),
        ("JINA_V4_MAX_BODY_BYTES", "-1", "whole number above 0"),
        ("JINA_V4_BODY_TIMEOUT_S", "0", "whole number above 0"),
        ("JINA_V4_API_KEY_FILE", "/nowhere/key", "cannot read /nowhere/key"),
        ("JINA_V4_API_KEY_FILE", "/dev/null", "is empty"),
        ("JINA_V4_API_KEY_FILE", "/", "cannot read /"),
        ("JINA_V4_API_KEY", " \n", "JINA_V4_API_KEY is empty"),
        ("JINA_V4_API_KEY", "one\ntwo", "has a key that no header can hold"),
        ("JINA_V4_API_KEY", "schlüssel", "has a key that no header can hold"),
        ("JINA_V4_API_KEY", "\ufeffsecret", "has a key that no header can hold"),
        ("JINA_V4_LOG", "JSON", "choose plain or json"),
        *(
            ("JINA_V4_IMAGE_HOSTS", value, "is not a host; write names or addresses")
            for value in (
                "minio:9000", "http://minio", "minio/", "10.0.0.0/8", "*", "*.internal", ".internal", "minio.",
                "10.0.0", "cafe:9000", "[::1]:80", "a b", "a;b", "good,bücher.example",
            )
        ),
        *(
            ("JINA_V4_ALLOWED_ORIGINS", value, "is not an origin; write origins")
            for value in ("app.example", "https://app.example/", "https://", "null", "https://*.example", "a b")
        ),
    ],
)  # fmt: skip
def test_a_bad_setting_stops_the_server(name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(OptionError, match=message):
        Keys(read_settings())


def test_settings_are_read_as_they_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JINA_V4_IMAGE_HOSTS", " Minio, 10.0.0.5,[0:0::1],, my_store.internal \n")
    monkeypatch.setenv("JINA_V4_ALLOWED_ORIGINS", "HTTPS://App.example:443, http://localhost:5173,http://[::1]:80")
    monkeypatch.setenv("JINA_V4_MAX_ITEMS", "12\n")
    settings = read_settings()
    assert settings.image_hosts == {"minio", "10.0.0.5", "::1", "my_store.internal"}
    assert settings.allowed_origins == {"https://app.example", "http://localhost:5173", "http://[::1]"}
    assert settings.max_items == 12


def test_what_is_set_to_nothing_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEY", "API_KEY_FILE", "IMAGE_HOSTS", "ALLOWED_ORIGINS", "MAX_ITEMS", "LOG"):
        monkeypatch.setenv(f"JINA_V4_{name}", "")
    settings = read_settings()
    assert (Keys(settings).open, settings.image_hosts, settings.max_items) == (True, frozenset(), 2048)


def test_a_budget_refuses_what_does_not_fit_beside_the_rest() -> None:
    budget = TokenBudget(100)
    with budget.spend(70):
        with pytest.raises(ApiError) as caught, budget.spend(40):
            pass
        assert caught.value.status == 429
        assert caught.value.headers() == {"retry-after": "30"}  # nothing was ever finished: no rate is known
        with budget.spend(30), pytest.raises(ApiError):
            budget.check()
        budget.check()
    with budget.spend(1000):  # a request may be larger than the budget
        with pytest.raises(ApiError) as caught:
            budget.check()
        assert 1 <= int(caught.value.headers()["retry-after"]) <= 30


def test_a_large_request_needs_half_of_the_budget() -> None:
    budget = TokenBudget(100)
    for priority in (0, 999):
        refused = pytest.raises(ApiError, match=r"has 1012 tokens in flight, .* try again later$")
        with budget.spend(12), budget.spend(1000, priority), refused, budget.spend(1, 999):
            pass
        with budget.spend(51), pytest.raises(ApiError) as caught, budget.spend(1000, priority):
            pass
        assert caught.value.message.endswith("send fewer items in one request: this one has about 1000 tokens")
        with budget.spend(50), budget.spend(60, priority):
            pass


def test_a_budget_forgets_what_was_finished_long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    budget = TokenBudget(100)
    for _ in range(1000):
        now += 1
        with budget.spend(1):
            pass
    assert len(budget._done) == 31


def test_a_failed_request_gives_its_tokens_back() -> None:
    budget = TokenBudget(100)
    with pytest.raises(ZeroDivisionError), budget.spend(50):
        raise ZeroDivisionError
    with budget.spend(50), budget.spend(50):
        pass


def test_bulk_work_is_refused_first() -> None:
    budget = TokenBudget(100)
    with budget.spend(90, 999):
        budget.check()  # a live query is taken in
        with budget.spend(100, 0):  # it does not count what is computed after it
            with pytest.raises(ApiError, match="has 190 tokens in flight"), budget.spend(1, 999):
                pass
            with pytest.raises(ApiError, match="has 100 tokens in flight"):
                budget.check()
        with pytest.raises(ApiError, match="has 90 tokens in flight"), budget.spend(11, 999):
            pass
        with pytest.raises(ApiError, match="has 90 tokens in flight"), budget.spend(11, 5):
            pass
        with budget.spend(10, 5), pytest.raises(ApiError), budget.spend(1, 6):
            pass
