"""A real Prometheus scrapes real servers through the files of deploy/monitoring; their logs and traces are read too.

Two servers: the one of all tests of the wire, and one of its own with two API processes, a key, JSON lines in a log at
level DEBUG and traces, behind a gateway that also offers a task whose server is not there.
"""

import json
import math
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
from conftest import Figure
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from servers import Server, engine_server, free_port, gateway_server, started
from wire import IMAGES, IMAGES_BASE64, TASK, Wire, opened_site

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[3]
MONITORING = ROOT / "deploy/monitoring"
DASHBOARD = json.loads((MONITORING / "grafana-dashboard.json").read_text())
KEY = "SECRET-key"
TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TIMEOUT_S = 120


@dataclass
class Collector:
    """What takes the place of an OpenTelemetry collector: OTLP over HTTP in, spans out."""

    url: str = ""
    spans: list[Any] = field(default_factory=list)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    found = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["content-length"]))
            for resource in ExportTraceServiceRequest.FromString(content).resource_spans:
                found.spans += [span for scope in resource.scope_spans for span in scope.spans]
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{httpd.server_port}/v1/traces"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield found
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture(scope="module")
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as changed:
        for name in ("JINA_V4_API_KEY_FILE", "JINA_V4_MAX_TOKENS_IN_FLIGHT"):
            changed.delenv(name, raising=False)
        changed.setenv("JINA_V4_API_KEY", KEY)
        changed.setenv("JINA_V4_LOG", "json")
        changed.setenv("JINA_V4_IMAGE_HOSTS", "127.0.0.1")
        changed.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
        changed.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
        yield


@pytest.fixture(scope="module")
def watched(
    environment: None,
    collector: Collector,
    folded: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    checkpoint = folded("float32") / f"jina-embeddings-v4-{TASK}"
    options = ("--max-model-len=2048", "--api-server-count=2", f"--otlp-traces-endpoint={collector.url}")
    with engine_server(TASK, checkpoint, tmp_path_factory.mktemp("watched") / "log", *options) as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def gateway(watched: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    urls = {TASK: watched.base_url, "code": f"http://127.0.0.1:{free_port()}"}
    with gateway_server(urls, tmp_path_factory.mktemp("gateway") / "log") as server:
        yield server


@dataclass
class Prometheus:
    """A Prometheus that scrapes each second; the tests ask it in its own language."""

    server: Server

    def get(self, path: str, **parameters: str) -> Any:
        url = f"{self.server.base_url}/api/v1/{path}"
        answer = httpx2.get(url, params=parameters, timeout=TIMEOUT_S, trust_env=False)
        content = answer.json()
        assert content["status"] == "success", content
        return content["data"]

    def ask(self, query: str) -> list[tuple[dict[str, str], float]]:
        result = self.get("query", query=query)["result"]
        return [(sample["metric"], float(sample["value"][1])) for sample in result]

    def wait(self, ready: Callable[[], object], seen: Callable[[], object] = lambda: None) -> None:
        """Wait until something is so, as it is when all have been scraped again; else fail with what was seen."""
        deadline = time.monotonic() + TIMEOUT_S
        while not ready():
            assert time.monotonic() < deadline, seen()
            time.sleep(0.3)


@pytest.fixture(scope="module")
def prometheus(
    watched: Server, wire_server: Server, gateway: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    fetched = ROOT / ".prometheus/prometheus"
    program = fetched if fetched.exists() else shutil.which("prometheus")
    if program is None:
        pytest.skip("there is no Prometheus: `make .prometheus` fetches it on Debian")
    folder = tmp_path_factory.mktemp("prometheus")
    shutil.copy(MONITORING / "alerts.yaml", folder)
    (folder / "api-key").write_text(KEY)
    settings = (MONITORING / "prometheus.yaml").read_text()
    settings = re.sub(r"# (authorization:|  credentials_file)", r"\1", settings).replace("15s", "1s")
    addresses = [server.base_url.removeprefix("http://") for server in (watched, wire_server, gateway)]
    for ours, address in zip(("127.0.0.1:8001", "127.0.0.1:8002", "127.0.0.1:8000"), addresses, strict=True):
        settings = settings.replace(ours, address)
    (folder / "prometheus.yaml").write_text(settings.replace(', "127.0.0.1:8003"', ""))
    port = free_port()
    flags = {
        "config.file": str(folder / "prometheus.yaml"),
        "storage.tsdb.path": str(folder / "data"),
        "web.listen-address": f"127.0.0.1:{port}",
    }
    with started([program, *(f"--{name}={value}" for name, value in flags.items())], port, folder / "log") as server:
        found = Prometheus(server)

        def answers() -> bool:
            assert server.process.poll() is None, server.tail()
            try:
                return len(found.ask("up")) == len(addresses)
            except (httpx2.TransportError, json.JSONDecodeError):  # it says "Service Unavailable" while it starts
                return False

        found.wait(answers)
        yield found


@dataclass
class Traffic:
    """What was sent to the server with two API processes, all of it through the gateway."""

    texts: int = 0
    images: int = 0
    tokens: int = 0
    refused: int = 0
    request_ids: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def picture_url() -> Iterator[str]:
    name = f"{IMAGES[0].name}?token=SECRET-token"
    with opened_site({name: IMAGES[0].read_bytes()}) as site:
        yield f"{site.url}/{name}"


@pytest.fixture(scope="module")
def traffic(gateway: Server, wire: Wire, picture_url: str, prometheus: Prometheus) -> Traffic:
    """Good and bad requests, with secrets wherever one can be; after Prometheus has seen that all begins at 0."""
    sent = Traffic()
    picture = {"image": IMAGES_BASE64[0]}

    def post(body: object, status: int, **headers: str) -> Any:
        sent.request_ids.append(f"id-{len(sent.request_ids)}")
        headers = {"authorization": f"Bearer {KEY}", "x-request-id": sent.request_ids[-1]} | headers
        # A connection each, so that both API processes get some.
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        url = f"{gateway.base_url}/v1/embeddings"
        answer = httpx2.post(url, content=content, headers=headers, timeout=TIMEOUT_S, trust_env=False)
        assert answer.status_code == status, answer.text
        return answer.json()

    for items in (
        ["SECRET-text"],
        ["SECRET-text", picture],
        [{"image": picture_url}],
        [picture] * 3,
        ["SECRET " * 100] * 4,
    ):
        for _ in range(3):
            headers = {"traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01"}
            answer = post({"task": TASK, "input": items, "dimensions": 128}, 200, **headers)
            sent.tokens += answer["usage"]["total_tokens"]
            sent.images += sum(isinstance(item, dict) for item in items)
            sent.texts += sum(isinstance(item, str) for item in items)
    address = picture_url.removeprefix("http://")
    refusals: list[tuple[object, int]] = [
        ({"task": TASK, "input": {"image": f"http://user:SECRET-password@{address}-no"}}, 422),
        ({"task": TASK, "input": {"image": "http://10.0.0.1/?token=SECRET-token"}}, 422),
        ({"task": TASK, "input": {"image": "SECRET-image"}}, 422),
        ({"task": TASK, "input": "SECRET " * 5000}, 400),
        ({"task": TASK, "input": "SECRET-text", "dimensions": 0}, 422),
    ]
    for body, status in refusals:
        post(body, status)
    sent.refused = len(refusals)
    post({"task": "SECRET-task", "input": "SECRET-text"}, 422)
    post(b'{"input": "SECRET-text', 400)
    post({"task": "code", "input": "SECRET-text"}, 503)
    post({"task": TASK, "input": "SECRET-text"}, 401, authorization="Bearer SECRET-wrong")
    wire.ask({"input": ["a text", picture, {"image": picture_url}]})
    assert wire.post({"input": []}).status_code == 422
    return sent


def own(watched: Server) -> str:
    """The label by which the server with two API processes is told from the other."""
    return f'instance="{watched.base_url.removeprefix("http://")}"'


def test_both_servers_and_the_gateway_are_scraped(prometheus: Prometheus, traffic: Traffic, figure: Figure) -> None:
    def targets() -> list[dict[str, Any]]:
        return prometheus.get("targets", state="active")["activeTargets"]

    def seen() -> list[tuple[str, str, str]]:
        return [(target["scrapePool"], target["health"], target["lastError"]) for target in targets()]

    expected = [(f"jina-v4-{pool}", "up", "") for pool in ("gateway", "server", "server")]
    prometheus.wait(lambda: seen() == expected, seen)  # a scrape may take too long on a busy machine
    for target in targets():
        figure(f"Prometheus scraped {target['scrapePool']} in {target['lastScrapeDuration'] * 1e3:.0f} ms")


def test_what_prometheus_adds_up_over_two_processes_is_what_was_sent(
    prometheus: Prometheus, watched: Server, traffic: Traffic
) -> None:
    instance = own(watched)
    sums = {
        f'sum(jina_v4_items_total{{{instance},kind="text",outcome="ok"}})': traffic.texts,
        f'sum(jina_v4_items_total{{{instance},kind="image",outcome="ok"}})': traffic.images,
        f"sum(jina_v4_tokens_total{{{instance}}})": traffic.tokens,
        f"sum(jina_v4_request_seconds_count{{{instance}}})": 15,
        f'sum(jina_v4_requests_total{{{instance},outcome="refused"}})': traffic.refused,
        f"sum(jina_v4_refused_requests_total{{{instance}}})": traffic.refused,
        f'sum(jina_v4_image_fetches_total{{{instance},outcome="ok"}})': 3,
        f"sum(jina_v4_image_fetch_bytes_total{{{instance}}})": 3 * IMAGES[0].stat().st_size,
        f"jina_v4_in_flight_tokens{{{instance}}}": 0,
        'sum(jina_v4_gateway_answers_total{task="none"})': 3,
        "sum(jina_v4_gateway_answers_total)": len(traffic.request_ids),
        'count({__name__=~"jina_v4_.*",pid!=""}) or vector(0)': 0,  # one value of a gauge, and not one a process
    }

    found: dict[str, float] = {}

    def agree() -> bool:
        found.update({query: value for query in sums for _, value in prometheus.ask(query)})
        return found == sums

    prometheus.wait(agree, lambda: found)


def test_the_stages_make_up_the_time_of_the_requests(prometheus: Prometheus, traffic: Traffic, figure: Figure) -> None:
    stages = {labels["stage"]: value for labels, value in prometheus.ask("sum by (stage) (jina_v4_stage_seconds_sum)")}
    ((_, total_s),) = prometheus.ask("sum(jina_v4_request_seconds_sum)")
    assert all(seconds > 0 for seconds in stages.values())
    assert set(stages) == {"body", "fetch", "preprocessing", "engine", "serialising"}
    figure(f"the stages of all requests make up {sum(stages.values()) / total_s:.1%} of their time")
    assert total_s / 2 < sum(stages.values()) <= total_s


def is_data(samples: list[tuple[dict[str, str], float]]) -> bool:
    return not all(math.isnan(value) for _, value in samples)


def dashboard_queries() -> list[str]:
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    return [query.replace("$__rate_interval", "2m").replace("$task", ".*") for query in found]


def test_every_query_of_the_dashboard_finds_data(prometheus: Prometheus, traffic: Traffic, figure: Figure) -> None:
    queries = dashboard_queries()

    def without() -> list[str]:
        return [query for query in queries if not is_data(prometheus.ask(query))]

    prometheus.wait(lambda: not without(), without)
    figure(f"{len(queries)} queries of the dashboard, all with data")
    tasks = prometheus.get("label/task/values", **{"match[]": "jina_v4_requests_total"})
    assert TASK in tasks, "what the dashboard's list of tasks is made of"


def test_every_rule_is_evaluated_finds_data_and_fires_only_for_what_is_wrong(
    prometheus: Prometheus, traffic: Traffic
) -> None:
    def rules() -> list[dict[str, Any]]:
        return [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]

    prometheus.wait(lambda: all(rule["health"] == "ok" for rule in rules()))
    for rule in rules():
        if not rule["query"].startswith("absent("):
            assert is_data(prometheus.ask(re.sub(r" (?:>|<|==|!=) [\d.]+", "", rule["query"]))), rule["query"]

    # The task whose server is not there; nothing has lasted for long enough to fire.
    def pending() -> set[str]:
        return {rule["name"] for rule in rules() if rule["state"] == "pending"}

    prometheus.wait(lambda: pending() and pending() <= {"JinaV4TaskNotReady", "JinaV4GatewayRequestsFail"}, pending)
    assert not [rule["name"] for rule in rules() if rule["state"] == "firing"]


def test_both_logs_have_a_line_a_request_and_nothing_of_what_was_sent(
    watched: Server, gateway: Server, traffic: Traffic
) -> None:
    programs: dict[str, list[str]] = {}
    for server in (watched, gateway):
        text = server.log.read_text()
        assert "SECRET" not in text, re.findall(".*SECRET.*", text)[0]
        for line in text.splitlines():
            if line.startswith("{"):
                entry = json.loads(line)
                if entry["message"] == "request":
                    programs.setdefault(entry["program"], []).append(entry["request_id"])
    assert programs["gateway"] == traffic.request_ids
    # Each of two processes writes a line after its reply.
    assert sorted(programs["server"]) == sorted(traffic.request_ids[: 15 + traffic.refused])
    assert "DEBUG" in watched.log.read_text()


def test_a_callers_trace_has_a_span_for_each_text_and_image(collector: Collector, traffic: Traffic) -> None:
    def spans() -> list[Any]:
        return [span for span in collector.spans if span.trace_id.hex() == TRACE_ID]

    deadline = time.monotonic() + TIMEOUT_S
    while len(spans()) < traffic.texts + traffic.images:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert len(spans()) == traffic.texts + traffic.images
    assert {(span.name, span.parent_span_id.hex()) for span in spans()} == {("llm_request", SPAN_ID)}
    attributes = [{item.key: item.value for item in span.attributes} for span in spans()]
    assert sum(span["gen_ai.usage.prompt_tokens"].int_value for span in attributes) == traffic.tokens
    assert "SECRET" not in str(collector.spans)
