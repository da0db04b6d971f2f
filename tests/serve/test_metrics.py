"""What is counted, logged and alerted on: by the routes with applications and engines that do what a test says."""

import asyncio
import contextlib
import gc
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from api_limits import limits
from jina_v4_serve.api import metrics, record
from jina_v4_serve.api.door import EMBEDDINGS, Door
from jina_v4_serve.api.errors import ApiError, invalid
from jina_v4_serve.api.guard import Guard
from jina_v4_serve.api.images import ImageLoader
from jina_v4_serve.api.log import LOGGER, JsonFormatter
from jina_v4_serve.api.record import Record, current, recording
from jina_v4_serve.api.routes import embed
from jina_v4_serve.errors import OptionError
from jina_v4_serve.gateway.metrics import GatewayMetrics
from jina_v4_serve.settings import SERVED_TASKS, Settings, read_settings
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from servers import PATIENCE_S
from small_disk import needs_namespaces, on_small_disk
from starlette.requests import Request
from wire import IMAGES, opened_site

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "deploy/monitoring"
RULES = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((MONITORING / "grafana-dashboard.json").read_text())
PAGE = (ROOT / "docs/monitoring.md").read_text()
SOURCE = ROOT / "serve/src/jina_v4_serve"
TASK = "text-matching"


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


# --- one request


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [100.0]
    monkeypatch.setattr(record.time, "perf_counter", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def test_a_moment_counts_for_one_stage_and_the_stages_make_up_the_time(clock: Callable[[float], None]) -> None:
    asked = Record("id")
    with asked.stage("body"):
        clock(1)
    with asked.stage("preprocessing"):
        clock(2)
        with asked.stage("fetch"):  # two at once
            clock(4)
            with asked.stage("fetch"):
                clock(8)
            clock(16)
        clock(32)
    with asked.stage("engine"):
        with asked.stage("preprocessing"):  # of a second picture, while the first is in the engine
            clock(64)
        clock(128)
    asked.answered(200)
    assert asked.stages_s == {"body": 1, "preprocessing": 98, "fetch": 28, "engine": 128}
    assert asked.duration_s == sum(asked.stages_s.values())


def test_where_no_request_is_served_nothing_is_written_down() -> None:
    with current().stage("engine"):
        current().task = "code"
    assert current().task == record.NO_TASK


def serve(application: Callable[..., Any], path: str = EMBEDDINGS, **headers: str) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    given = [(name.encode(), text.encode()) for name, text in headers.items()]
    loaded = SimpleNamespace(state=SimpleNamespace(jina_v4=object()))
    scope = {"type": "http", "path": path, "method": "POST", "headers": given, "app": loaded}
    asyncio.run(Guard(application)(scope, None, send))
    return sent


def answering(status: int, code: str | None = None) -> Callable[..., Any]:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        asked = current()
        asked.request_bytes, asked.n_items = 7, {"text": 2, "image": 1}
        asked.code = code
        if status == 200:
            asked.n_tokens = {"text": 20, "image": 60}
            with asked.stage("engine"):
                pass
        await send({"type": "http.response.start", "status": status})
        await send({"type": "http.response.body", "body": b"abc", "more_body": True})
        await send({"type": "http.response.body", "body": b"de"})

    return application


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVED_TASKS, TASK)
    for name in ("JINA_V4_API_KEY", "JINA_V4_API_KEY_FILE", "JINA_V4_LOG"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("status", "code", "outcome"),
    [
        (200, None, "ok"),
        (422, "VALIDATION_ERROR", "refused"),
        (429, "OVERLOADED", "refused"),
        (503, "ENGINE_DOWN", "failed"),
        (499, None, "cancelled"),
    ],
)
@pytest.mark.usefixtures("served")
def test_a_request_is_counted_by_what_became_of_it(status: int, code: str | None, outcome: str) -> None:
    names = {
        "requests": {"name": "jina_v4_requests_total", "task": TASK, "outcome": outcome},
        "texts": {"name": "jina_v4_items_total", "task": TASK, "kind": "text", "outcome": outcome},
        "images": {"name": "jina_v4_items_total", "task": TASK, "kind": "image", "outcome": outcome},
        "text tokens": {"name": "jina_v4_tokens_total", "task": TASK, "kind": "text"},
        "image tokens": {"name": "jina_v4_tokens_total", "task": TASK, "kind": "image"},
        "bytes in": {"name": "jina_v4_request_bytes_total", "task": TASK},
        "bytes out": {"name": "jina_v4_response_bytes_total", "task": TASK},
        "latencies": {"name": "jina_v4_request_seconds_count", "task": TASK},
        "engine": {"name": "jina_v4_stage_seconds_count", "task": TASK, "stage": "engine"},
        "refused": {"name": "jina_v4_refused_requests_total", "code": code or ""},
    }
    before = {key: value(**labels) for key, labels in names.items()}
    serve(answering(status, code))
    ok = status == 200
    assert {key: value(**labels) - before[key] for key, labels in names.items()} == {
        "requests": 1,
        "texts": 2,
        "images": 1,
        "text tokens": 20 if ok else 0,
        "image tokens": 60 if ok else 0,
        "bytes in": 7,
        "bytes out": 5,
        "latencies": ok,
        "engine": ok,
        "refused": code is not None,
    }


@pytest.mark.usefixtures("served")
def test_requests_that_never_reach_a_route_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError

    failed = value("jina_v4_requests_total", task=TASK, outcome="failed")
    serve(broken)
    assert value("jina_v4_requests_total", task=TASK, outcome="failed") == failed + 1
    monkeypatch.setenv("JINA_V4_API_KEY", "key")
    refused = value("jina_v4_refused_requests_total", code="UNAUTHORIZED")
    serve(answering(200))
    serve(answering(200), "/metrics")  # no embedding request
    assert value("jina_v4_refused_requests_total", code="UNAUTHORIZED") == refused + 1


def test_what_is_served_begins_at_zero() -> None:
    metrics.prepare(["code"], {"code": "of-code"})
    for outcome in metrics.OUTCOMES:
        assert REGISTRY.get_sample_value("jina_v4_requests_total", {"task": "code", "outcome": outcome}) is not None
    assert value("jina_v4_served_info", task="code", revision="of-code") == 1
    assert value("jina_v4_start_timestamp_seconds") > 1.7e9


def test_each_image_url_is_counted_once_by_how_it_went() -> None:
    limits = Settings(max_image_bytes=2**20, fetch_timeout_s=3, image_hosts=frozenset({"127.0.0.1"}))

    def outcomes() -> dict[str, float]:
        (family,) = metrics.IMAGE_FETCHES.collect()
        return {sample.labels["outcome"]: sample.value for sample in family.samples if sample.name.endswith("_total")}

    async def load(url: str) -> None:
        asked = Record("id")
        with recording(asked), contextlib.suppress(ApiError):
            async with ImageLoader(limits).opened(url, "input"):
                pass
        assert asked.stages_s.keys() == {"fetch"}

    with opened_site({IMAGES[0].name: IMAGES[0].read_bytes()}) as site:
        for path, outcome in (
            (f"/{IMAGES[0].name}", "ok"),
            (f"/hops/2/{IMAGES[0].name}", "ok"),
            ("/status/500", "status"),
            ("/to/http://10.0.0.1/x.png", "private"),
            ("/to/ftp://10.0.0.1/x.png", "unreachable"),
            ("/loop", "redirects"),
            ("/endless", "too_large"),
            ("/slow", "timeout"),
        ):
            before, n_bytes = outcomes(), value("jina_v4_image_fetch_bytes_total")
            asyncio.run(load(site.url + path))
            after = outcomes()
            assert {name for name in after if after[name] != before.get(name, 0)} == {outcome}, path
            assert after[outcome] == before.get(outcome, 0) + 1
            fetched = value("jina_v4_image_fetch_bytes_total") - n_bytes
            assert fetched == (IMAGES[0].stat().st_size if outcome == "ok" else 0)


# --- the log


@pytest.fixture
def json_log(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[[], list[Any]]]:
    """Have the loggers write JSON for one test; give the lines."""
    monkeypatch.setenv("JINA_V4_LOG", "json")
    logger = logging.getLogger(LOGGER)
    before = logger.handlers[:], logger.level, logger.propagate
    yield lambda: [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.mark.usefixtures("served")
def test_a_request_has_one_line_that_says_all_but_what_was_sent(json_log: Callable[[], list[Any]]) -> None:
    for _ in range(2):  # a second server in the process does not double the lines
        serve(answering(200), **{"x-request-id": "mine-1"})
    first, _ = json_log()
    assert first.pop("time")[:2] == "20"
    assert first.pop("duration_s") >= first["stages_s"].pop("engine") >= 0
    assert first == {
        "level": "info",
        "logger": "jina_v4_serve.request",
        "message": "request",
        "program": "server",
        "request_id": "mine-1",
        "task": TASK,
        "status": 200,
        "outcome": "ok",
        "key": None,
        "code": None,
        "param": None,
        "n_texts": 2,
        "n_images": 1,
        "n_tokens": 80,
        "request_bytes": 7,
        "response_bytes": 5,
        "stages_s": {},
    }
    serve(answering(422, "VALIDATION_ERROR"))
    assert [(line["status"], line["code"], line["outcome"]) for line in json_log()] == [
        (422, "VALIDATION_ERROR", "refused")
    ]


@pytest.mark.usefixtures("served")
def test_nothing_is_logged_of_a_request_unless_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    serve(answering(200))
    serve(answering(422, "VALIDATION_ERROR"))
    assert capfd.readouterr().err == ""


async def test_nothing_is_logged_of_a_request_that_fails_as_its_client_leaves(
    caplog: pytest.LogCaptureFixture,
) -> None:
    begun = asyncio.Event()

    async def fail(*_: object) -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise invalid("input", "what was sent") from None

    async def receive() -> dict[str, Any]:
        if not received:
            received.append(b'{"input": "x"}')
            return {"type": "http.request", "body": received[0]}
        await begun.wait()
        return {"type": "http.disconnect"}

    received: list[bytes] = []
    budget, engine = SimpleNamespace(check=lambda: None), SimpleNamespace(dead=False)
    service = SimpleNamespace(budget=budget, door=Door(Settings()), limits=limits(TASK), embed=fail, engine=engine)
    app = SimpleNamespace(state=SimpleNamespace(jina_v4=service))
    scope = {"type": "http", "path": EMBEDDINGS, "headers": [], "app": app, "state": {"request_id": "id"}}
    assert (await embed(Request(scope, receive))).status_code == record.CLOSED_REQUEST
    gc.collect()
    assert caplog.records == []


def test_a_failure_is_one_line_too() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        entry = logging.getLogger().makeRecord("x", 40, "", 1, "request %s failed", ("a",), (ValueError, error, None))
    line = JsonFormatter().format(entry)
    assert "\n" not in line
    found = json.loads(line)
    assert (found["level"], found["message"]) == ("error", "request a failed")
    assert found["exception"].startswith("ValueError: two")


def test_another_way_of_logging_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JINA_V4_LOG", "yaml")
    with pytest.raises(OptionError, match="JINA_V4_LOG=yaml is not offered; choose plain or json"):
        read_settings()


# --- the page, the rules, the dashboard


def registered(registry: CollectorRegistry) -> dict[str, tuple[str, ...]]:
    """Our metrics by name, as Prometheus shows it, and their labels."""
    found = {}
    for metric in set(registry._collector_to_names):
        if isinstance(metric, MetricWrapperBase) and metric._name.startswith("jina_v4_"):
            found[metric._name + ("_total" if metric._type == "counter" else "")] = metric._labelnames
    return found


def documented(heading: str) -> dict[str, tuple[str, ...]]:
    section = PAGE.split(f"## {heading}\n")[1].partition("\n## ")[0]
    rows = re.findall(r"^\| `(jina_v4_\w+)` \| (.*?) \|", section, re.MULTILINE)
    return {name: tuple(re.findall(r"`(\w+)`", labels)) for name, labels in rows}


def test_the_page_lists_the_metrics_that_there_are() -> None:
    makers = {path.relative_to(SOURCE) for path in SOURCE.rglob("*.py") if "prometheus_client" in path.read_text()}
    assert makers == {Path("api/metrics.py"), Path("gateway/metrics.py")}
    assert documented("Metrics of the servers") == registered(REGISTRY)
    assert documented("Metrics of the gateway") == registered(GatewayMetrics().registry)


def test_the_page_lists_the_alerts_that_there_are() -> None:
    assert re.findall(r"^\| `(\w+)` \| (critical|warning) \|", PAGE, re.MULTILINE) == [
        (rule["alert"], rule["labels"]["severity"]) for rule in RULES
    ]


def queries() -> Iterator[str]:
    yield from (rule["expr"] for rule in RULES)
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    yield from (note["expr"] for note in DASHBOARD["annotations"]["list"])


@pytest.mark.parametrize("query", sorted(set(queries())))
def test_a_query_names_metrics_and_labels_that_there_are(query: str) -> None:
    there = registered(REGISTRY) | registered(GatewayMetrics().registry)
    used = re.findall(r"\b(jina_v4_\w+)(?:\{([^}]*)\})?", query)
    assert used or "vllm:" in query or "process_" in query or "up{" in query
    for name, selected in used:
        labels = there[re.sub(r"_(bucket|sum|count)$", "", name)]
        assert set(re.findall(r"(\w+)(?:=~|!=|=)", selected)) <= {*labels, "job", "instance"}


def test_every_alert_says_what_is_wrong_how_badly_and_what_to_do() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning")
        words = re.sub(r"(?<!^)(?=[A-Z])", "-", rule["alert"].removeprefix("JinaV4")).lower()
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{words}"
        assert rule["annotations"]["summary"]


def test_every_alert_is_tested_both_ways() -> None:
    tests = yaml.safe_load((MONITORING / "alerts.test.yaml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    names = {rule["alert"] for rule in RULES}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == names
    assert {case["alertname"] for case in tests[0]["alert_rule_test"] if not case["exp_alerts"]} == names


def test_promtool_takes_the_files_and_sees_each_alert_fire() -> None:
    promtool = ROOT / ".prometheus/promtool"
    program = promtool if promtool.exists() else shutil.which("promtool")
    if program is None:
        pytest.skip("there is no promtool: `make .prometheus` fetches it on Debian")
    for arguments in (
        ["check", "config", "prometheus.yaml"],
        ["check", "rules", "alerts.yaml"],
        ["test", "rules", "alerts.test.yaml"],
    ):
        done = subprocess.run([program, *arguments], cwd=MONITORING, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_is_whole() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        references = [target["refId"] for target in panel.get("targets", ())]
        assert len(set(references)) == len(references)
        for part in (panel, *panel.get("targets", ())):
            if part["type"] != "row" if "type" in part else True:
                assert part["datasource"]["uid"] == "${datasource}"
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", " ".join(queries()))) - {"__rate_interval", "labels", "value"}
    assert used <= variables


def on_full_disk(*lines: str) -> subprocess.CompletedProcess[str]:
    """Run a program with an API process's metrics on a small disk, which `fill(Path())` fills."""
    begin = [
        "import os",
        "from pathlib import Path",
        "os.environ['PROMETHEUS_MULTIPROC_DIR'] = '.'",
        "from jina_v4_serve.api import metric_files, metrics",
        "from prometheus_client import CollectorRegistry, Summary",
        "from prometheus_client.multiprocess import MultiProcessCollector",
        "from small_disk import fill",
    ]
    command = on_small_disk(2**22, [sys.executable, "-c", "\n".join([*begin, *lines])])
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(map(str, command), env=environment, capture_output=True, text=True, timeout=PATIENCE_S)


@needs_namespaces
@pytest.mark.parametrize("reserved", [True, False])
def test_a_full_disk_does_not_end_an_api_process_that_counts(reserved: bool) -> None:
    """Without the reservation it does: else nobody needs it any more."""
    done = on_full_disk(
        "metrics.prepare(['code'], {})",
        f"{reserved} and metric_files.reserve()",
        "fill(Path())",
        "Summary('late', 'Made with the first request').observe(2)",
        "for i in range(300): metrics.REFUSED.labels(f'CODE_{i}').inc()",
        "registry = CollectorRegistry()",
        "MultiProcessCollector(registry)",
        "assert registry.get_sample_value('late_sum') == 2",
        "assert registry.get_sample_value('jina_v4_refused_requests_total', {'code': 'CODE_299'}) == 1",
    )
    assert done.returncode == (0 if reserved else -signal.SIGBUS), done.stderr


@needs_namespaces
def test_an_api_process_does_not_start_on_a_disk_without_room_for_its_metrics() -> None:
    done = on_full_disk("fill(Path())", "metric_files.reserve()")
    assert done.returncode == 1
    assert "no space for the metrics in .: [Errno 28] No space left on device; free some, or set TMPDIR" in done.stderr
