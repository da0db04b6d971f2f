"""Ray Serve with the golden checkpoint on CPUs: load, scaling, a killed replica, an update. One Ray for all of it."""

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
import pytest
import yaml
from conftest import Figure, Golden
from doors import BODIES, JAVA, ORIGIN, PAGES, ROUTES, Case, check, post
from jina_v4_client import EmbeddingsClient, ServerError, WrongServerError
from jina_v4_serve.ray.child import arguments
from jina_v4_serve.ray.settings import IngressSettings, RaySettings, ServerSettings
from near import largest_difference
from servers import free_port
from starlette.requests import Request

pytestmark = pytest.mark.long

TASK = "retrieval"
TIMEOUT_S = 240.0
N_CALLERS, PAUSE_S = 8, 0.25  # a load that leaves the cores free to start a server
DRIVER = Path(__file__).with_name("ray_driver.py")
CASES = {
    **BODIES,
    **ROUTES,
    **PAGES,
    "Java's HttpClient": Case(post(more=JAVA), 400, "BODY_LOST"),
}
del CASES["Expect: 100-continue of what is refused"]  # Ray's proxy asks for every body


@pytest.mark.parametrize("prefix", ["", "/embeddings/v4"])
@pytest.mark.parametrize(
    ("path", "status", "keys"),
    [
        ("/health", 200, {"status"}),
        ("/v1/embeddings", 405, {"error", "detail"}),
        ("/v2/embed", 405, {"id", "message"}),
    ],
)
def test_the_routes_are_below_the_prefix_of_the_application(
    prefix: str, path: str, status: int, keys: set[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's, of what it does with pydantic
        from jina_v4_serve.ray.ingress import Ingress

    scope = {"type": "http", "method": "GET", "path": prefix + path, "root_path": prefix, "headers": []}
    request = Request(scope | {"query_string": b"", "scheme": "http", "server": ("127.0.0.1", 8000)})
    reply = asyncio.run(Ingress(IngressSettings(), {})(request))
    assert (reply.status_code, json.loads(reply.body).keys()) == (status, keys)


@dataclass
class Cluster:
    """The driver of a deployment, and what it runs on this machine."""

    driver: subprocess.Popen[str]
    url: str
    settings: dict[str, Any]

    def tell(self, line: str) -> str:
        assert self.driver.stdin is not None
        assert self.driver.stdout is not None
        self.driver.stdin.write(line + "\n")
        self.driver.stdin.flush()
        for said in self.driver.stdout:
            if said.startswith("> "):
                return said.removeprefix("> ").strip()
        raise AssertionError("the driver has ended")

    def deploy(self, **settings: object) -> None:
        self.settings |= settings
        assert self.tell(json.dumps(self.settings)) == "deployed"

    def n_running(self) -> int:
        """How many replicas of the task take requests."""
        states = json.loads(self.tell("status"))[TASK]
        return int(states.get("RUNNING", 0)) if set(states) == {"RUNNING"} else 0

    def wait_for(self, n_replicas: int) -> float:
        """Wait until so many replicas run and none is on its way; say how long it took."""
        start = time.monotonic()
        while self.n_running() != n_replicas:
            assert time.monotonic() - start < TIMEOUT_S, self.tell("status")
            time.sleep(0.2)
        return time.monotonic() - start

    def replicas(self) -> list[psutil.Process]:
        return [one for one in self._processes() if f"ServeReplica:default:{TASK}" in "".join(one.cmdline())]

    def servers(self) -> list[psutil.Process]:
        """The `jina-v4-serve` of each replica."""
        return [one for one in self._processes() if "--supervised" in one.cmdline()]

    def _processes(self) -> list[psutil.Process]:
        found = []
        for one in psutil.Process(self.driver.pid).children(recursive=True):
            try:
                one.cmdline()
                found.append(one)
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                pass
        return found


@pytest.fixture(scope="module")
def cluster(folded: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JINA_V4_")}
    environment |= {"JINA_V4_ALLOWED_ORIGINS": ORIGIN, "JINA_V4_BODY_TIMEOUT_S": "5"}
    with (
        (tmp_path_factory.mktemp("ray") / "log").open("wb") as log,
        subprocess.Popen(
            [sys.executable, DRIVER, str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            start_new_session=True,
        ) as driver,
    ):
        settings = {
            "checkpoints": str(folded("float32")),
            "tasks": [TASK],
            "dtype": "float32",
            "max_replicas": 2,
            "target_ongoing_requests": 0.4,
            "upscale_delay_s": 1,
            "downscale_delay_s": 10,
        }
        cluster = Cluster(driver, f"http://127.0.0.1:{port}", settings)
        try:
            cluster.deploy()
            yield cluster
        finally:
            everything = psutil.Process(driver.pid).children(recursive=True)
            servers = cluster.servers()
            assert driver.stdin is not None
            driver.stdin.close()
            try:
                code = driver.wait(60)
            finally:
                outlived = [one for one in everything if one.is_running()]
                for one in (*outlived, driver):
                    one.kill()
    assert code == 0
    assert servers
    assert [one for one in servers if one in outlived] == []


@dataclass
class Load:
    """Callers that embed golden texts one after the other, and never twice: what fails is counted."""

    url: str
    golden: Golden
    answers: list[tuple[float, float]] = field(default_factory=list)  # when, and the largest difference
    failures: list[tuple[float, int | None]] = field(default_factory=list)  # when, and the status
    n_begun_anew: int = 0  # for a client goes on with one revision only

    def __enter__(self) -> "Load":
        self._ends = threading.Event()
        self._callers = [threading.Thread(target=self._call, args=(first,)) for first in range(N_CALLERS)]
        for caller in self._callers:
            caller.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        for caller in self._callers:
            caller.join()

    def _call(self, first: int) -> None:
        numbers = itertools.count(first)
        while not self._ends.is_set():
            with EmbeddingsClient(self.url, task=TASK, max_retries=0, timeout_s=60) as client:
                self._call_with(client, numbers)

    def _call_with(self, client: EmbeddingsClient, numbers: Iterator[int]) -> None:
        while not self._ends.is_set():
            place = next(numbers) % len(self.golden.texts)
            try:
                vector = client.encode_text(self.golden.texts[place], prompt_name="query")
            except WrongServerError:
                self.n_begun_anew += 1
                return
            except ServerError as error:
                self.failures.append((time.monotonic(), error.status_code))
            else:
                expected = self.golden.rows[f"{TASK}/query/{place}/dense"]
                self.answers.append((time.monotonic(), largest_difference([vector], [expected])))
            self._ends.wait(PAUSE_S)

    def worst(self) -> float:
        return max(difference for _, difference in self.answers)


@pytest.fixture
def load(cluster: Cluster, golden: Golden) -> Load:
    return Load(cluster.url, golden)


def n_served(server: psutil.Process) -> int:
    """How many requests a server says that it has answered."""
    arguments = server.cmdline()
    port = arguments[arguments.index("--port") + 1]
    page = httpx2.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
    lines = [line for line in page.splitlines() if line.startswith("vllm:request_success_total")]
    return round(sum(float(line.rpartition(" ")[2]) for line in lines))


@pytest.mark.slow
def test_one_address_answers_as_the_gateway_does(cluster: Cluster, golden: Golden) -> None:
    with httpx2.Client(base_url=cluster.url, trust_env=False, timeout=60) as http:
        assert http.get("/ready").json() == {"ready": True, "tasks": {TASK: "ready"}}
        models = http.get("/v1/models")
        assert [card["id"] for card in models.json()["data"]] == [f"jina-embeddings-v4-{TASK}"]
        assert (models.headers["x-jina-v4-task"], models.headers["x-jina-v4-pooling"]) == (TASK, "engine")
        answer = http.post("/v1/embeddings", json={"input": golden.texts[0], "task": TASK, "prompt_name": "query"})
        assert answer.headers["x-jina-v4-revision"] == models.headers["x-jina-v4-revision"]
        assert len(answer.headers.get_list("x-request-id")) == len(answer.headers.get_list("date")) == 1
        (item,) = answer.json()["data"]
        assert np.abs(np.array(item["embedding"]) - golden.rows[f"{TASK}/query/0/dense"]).max() < 1e-5

        refused = http.post("/v1/embeddings", json={"input": "x", "task": "code"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (422, "task")
        refused = http.post("/v1/embeddings", json={"input": "x", "task": TASK, "dimensions": 0})
        assert (refused.status_code, refused.json()["error"]["param"]) == (422, "dimensions")
        body = {"texts": golden.texts[:1], "model": f"jina-embeddings-v4-{TASK}", "input_type": "search_query"}
        (row,) = http.post("/v2/embed", json=body).json()["embeddings"]["float"]
        assert np.abs(np.array(row) - golden.rows[f"{TASK}/query/0/dense"]).max() < 1e-5
        refused = http.post("/v2/embed", json={**body, "model": "embed-v4.0"})
        assert (refused.status_code, refused.json().keys()) == (404, {"id", "message"})
        query, document = (golden.rows[f"{TASK}/{name}/multi"] for name in ("query/0", "passage/1"))
        score = (query @ document.T).max(axis=1).mean()
        ranking = {"query": golden.texts[0], "documents": golden.texts[1:2], "task": TASK}
        for path in ("/v1/rerank", "/v2/rerank"):
            (result,) = http.post(path, json=ranking).json()["results"]
            assert abs(result["relevance_score"] - score) < 1e-5
        pair = {"text_1": golden.texts[0], "text_2": golden.texts[1], "task": TASK}
        assert abs(http.post("/v1/score", json=pair).json()["data"][0]["score"] - score) < 1e-5
        assert http.get("/v1/embeddings").status_code == 405
        assert http.get("/docs").status_code == 404


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_ingress_says_what_the_other_doors_say(case: Case, cluster: Cluster) -> None:
    check(case, cluster.url)


@pytest.mark.slow
def test_large_answers_come_whole(cluster: Cluster, golden: Golden) -> None:
    with EmbeddingsClient(cluster.url, task=TASK) as client:
        rows = client.encode_text(["many words " * 50] * 24, batch_size=24, return_multivector=True)
    assert sum(part.nbytes for part in rows) > 2 * 2**20  # several pieces
    assert largest_difference(rows, [rows[0]] * len(rows)) < 1e-5


@pytest.mark.slow
def test_load_brings_a_second_replica_and_both_serve(cluster: Cluster, load: Load, figure: Figure) -> None:
    assert cluster.n_running() == 1
    with load:
        scaled_s = cluster.wait_for(2)
        before = {server.pid: n_served(server) for server in cluster.servers()}
        time.sleep(2)
        shares = [n_served(server) - before[server.pid] for server in cluster.servers()]
    assert len(shares) == 2
    assert min(shares) > 0
    assert load.failures == []
    assert load.worst() < 1e-5
    figure(
        f"Ray Serve: a second replica took requests {scaled_s:.0f} s after the load came; in 2 s they answered"
        f" {shares[0]} and {shares[1]}; {len(load.answers):,} answers, no failure, none off by over {load.worst():.1e}"
    )


@pytest.mark.slow
def test_a_killed_replica_gives_no_wrong_vector_and_comes_back(cluster: Cluster, load: Load, figure: Figure) -> None:
    with load:
        cluster.wait_for(2)
        time.sleep(1)
        victim = cluster.replicas()[0]
        servers = cluster.servers()
        (orphan,) = [server for server in servers if server.ppid() == victim.pid]
        victim.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        orphan.wait(30)
        orphan_s = time.monotonic() - killed
        while cluster.n_running() == 2:  # until it is noticed
            time.sleep(0.05)
        cluster.wait_for(2)
        back_s = time.monotonic() - killed
    assert orphan_s < 30
    assert load.worst() < 1e-5
    after = [when for when, _ in load.answers if when > killed]
    assert len(after) > 50  # the other replica went on
    statuses = Counter(status for _, status in load.failures)
    assert set(statuses) <= {None, 502, 503}
    assert sum(statuses.values()) <= 2 * N_CALLERS
    last_s = max((when - killed for when, _ in load.failures), default=0.0)
    figure(
        f"Ray Serve, kill -9 of one of two replicas under {N_CALLERS} callers: {sum(statuses.values())} requests failed"
        f" {dict(statuses)}, the last {last_s:.1f} s after; {len(after):,} answers meanwhile, none wrong"
        f" ({load.worst():.1e}); two replicas again after {back_s:.0f} s, the server of the killed one gone"
        f" after {orphan_s:.1f} s"
    )


@pytest.mark.slow
def test_without_load_one_replica_is_left(cluster: Cluster, figure: Figure) -> None:
    figure(f"Ray Serve: down to one replica {cluster.wait_for(1):.0f} s after the load ended")
    assert len(cluster.servers()) == 1


@pytest.mark.slow
def test_an_update_loses_no_request(cluster: Cluster, load: Load, figure: Figure) -> None:
    def revision() -> str:
        with EmbeddingsClient(cluster.url, task=TASK) as client:
            return str(client.revision())

    before = revision()
    start = time.monotonic()
    with load:
        cluster.deploy(max_pixels=301056, max_replicas=1)  # another revision
        cluster.wait_for(1)
        took_s = time.monotonic() - start
    assert revision() != before
    assert load.n_begun_anew >= N_CALLERS
    assert load.failures == []
    assert load.worst() < 1e-5
    figure(
        f"Ray Serve: an update under load took {took_s:.0f} s; {len(load.answers):,} answers, no request failed;"
        f" {N_CALLERS} callers were told {load.n_begun_anew} times that the revision is another"
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own, as it is imported
def test_the_config_file_is_what_ray_and_the_application_read(root: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    content = yaml.safe_load((root / "deploy/ray/config.yaml").read_text())
    config = ServeDeploySchema.model_validate(content)
    (application,) = config.applications
    assert application.import_path == "serve_app:app"
    settings = RaySettings.model_validate(application.args)
    assert settings.max_replicas > settings.min_replicas
    assert config.http_options.host == "127.0.0.1"


def test_replicas_share_a_node_by_what_ray_has_counted_out() -> None:
    def options(**shares: float) -> list[str]:
        return arguments(ServerSettings(checkpoints=Path("/models"), **shares), TASK)

    assert "--distributed-executor-backend=vllm.v1.executor.uniproc_executor.UniProcExecutor" in options()
    shared = options(num_gpus=0.3, num_cpus=8)
    assert shared[-1] == "--api-server-count=2"
    assert options(num_gpus=1)[-1] == "--api-server-count=1"
