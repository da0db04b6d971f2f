"""Too much work, work nobody waits for any more, and vectors that are none: what a server does about them."""

import asyncio
import base64
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import numpy as np
import pytest
from conftest import Figure, Golden
from image_files import plain
from safetensors.numpy import load_file, save_file
from servers import PATIENCE_S, Server, engine_server

pytestmark = pytest.mark.long

BUDGET_TOKENS = 2000
TASK = "retrieval"


@pytest.fixture(scope="module")
def server(folded: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("JINA_V4_MAX_TOKENS_IN_FLIGHT", str(BUDGET_TOKENS))
        log = tmp_path_factory.mktemp("pressure") / "log"
        with engine_server(TASK, folded("float32") / f"jina-embeddings-v4-{TASK}", log) as server:
            server.wait_ready()
            yield server


def running_requests(server: Server) -> float:
    metrics = httpx2.get(f"{server.base_url}/metrics", timeout=PATIENCE_S).text.splitlines()
    names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    return sum(float(line.split()[-1]) for line in metrics if line.startswith(names))


def test_overload_is_refused_at_once_and_the_rest_is_right(server: Server, golden: Golden, figure: Figure) -> None:
    """Ten times the budget at once."""
    body = {"input": [golden.texts[3]] * 4, "task": TASK}  # 4 x 459 tokens
    expected = golden.rows[f"{TASK}/query/3/dense"]

    async def send(client: httpx2.AsyncClient) -> tuple[httpx2.Response, float]:
        begin = time.perf_counter()
        response = await client.post(f"{server.base_url}/v1/embeddings", json=body)
        return response, 1000 * (time.perf_counter() - begin)

    async def everything() -> list[tuple[httpx2.Response, float]]:
        limits = httpx2.Limits(max_connections=20)
        async with httpx2.AsyncClient(timeout=120, limits=limits) as client:
            await asyncio.gather(*(client.get(f"{server.base_url}/health") for _ in range(20)))  # connections are open
            return await asyncio.gather(*(send(client) for _ in range(20)))

    results = asyncio.run(everything())
    statuses = Counter(response.status_code for response, _ in results)
    refused_ms = sorted(ms for response, ms in results if response.status_code == 429)
    figure(f"overload: {dict(statuses)}; refused after {refused_ms[0]:.1f} to {refused_ms[-1]:.1f} ms")
    assert set(statuses) == {200, 429}
    for response, _ in results:
        if response.status_code == 200:
            for item in response.json()["data"]:
                assert np.abs(np.array(item["embedding"], np.float32) - expected).max() <= 1e-5
        else:
            assert 1 <= int(response.headers["retry-after"]) <= 30
            assert response.json()["error"]["code"] == "OVERLOADED"
    assert httpx2.get(f"{server.base_url}/ready", timeout=PATIENCE_S).status_code == 200


def test_work_that_nobody_waits_for_is_dropped(server: Server, golden: Golden, figure: Figure) -> None:
    body = {"input": ["The quick brown fox " * 5000] * 2, "truncate": True}  # minutes of work
    with pytest.raises(httpx2.TimeoutException):
        httpx2.post(f"{server.base_url}/v1/embeddings", json=body, timeout=2.0)
    begin = time.perf_counter()
    while running_requests(server) and time.perf_counter() - begin < 30:
        time.sleep(0.1)
    figure(f"workless {time.perf_counter() - begin:.1f} s after the client left")
    assert running_requests(server) == 0
    answer = httpx2.post(f"{server.base_url}/v1/embeddings", json={"input": golden.texts[0]}, timeout=PATIENCE_S).json()
    vector = np.array(answer["data"][0]["embedding"], np.float32)
    assert np.abs(vector - golden.rows[f"{TASK}/query/0/dense"]).max() <= 1e-5


def check_that_a_long_image_is_refused(server: Server) -> None:
    """Its tokens are known only when vLLM has scaled it; vLLM would fail on it, with a 500."""
    picture = plain((784, 728), "teal")  # 728 tokens
    form = {"input": [{"image": base64.b64encode(picture).decode()}]}
    answer = httpx2.post(f"{server.base_url}/v1/embeddings", json=form, timeout=PATIENCE_S)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "INPUT_TOKEN_LIMIT_EXCEEDED")
    assert re.fullmatch(
        r"an image has 7\d\d tokens; the limit is 512\. Send a smaller one, or max_pixels", error["message"]
    )
    answer = httpx2.post(f"{server.base_url}/v1/embeddings", json={**form, "max_pixels": 40_000}, timeout=PATIENCE_S)
    assert answer.json()["error"]["code"] == "NON_FINITE_VECTOR"  # so it was computed


def test_vectors_that_are_not_finite_are_never_sent(folded: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = shutil.copytree(folded("float32") / f"jina-embeddings-v4-{TASK}", tmp_path / "checkpoint")
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    shard = checkpoint / index["weight_map"]["model.norm.weight"]
    tensors = load_file(shard)
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
    size = shard.stat().st_size
    save_file(tensors, shard, {"format": "pt"})
    assert shard.stat().st_size == size  # the launcher compares sizes, and is not to notice
    with engine_server(TASK, checkpoint, tmp_path / "log", "--max-model-len=512") as server:
        server.wait_ready()
        assert httpx2.get(f"{server.base_url}/ready", timeout=PATIENCE_S).status_code == 503
        check_that_a_long_image_is_refused(server)
        for form in ({}, {"outputs": ["dense", "multivector"]}):
            answer = httpx2.post(f"{server.base_url}/v1/embeddings", json={"input": "x", **form}, timeout=PATIENCE_S)
            assert answer.status_code == 500
            assert answer.json()["error"]["code"] == "NON_FINITE_VECTOR"
            # The engine has just worked. It is not ready all the same.
            assert httpx2.get(f"{server.base_url}/ready", timeout=PATIENCE_S).status_code == 503
        metrics = httpx2.get(f"{server.base_url}/metrics", timeout=PATIENCE_S).text
        assert "jina_v4_non_finite_requests_total 3.0" in metrics
