"""Requests that vLLM preempts or drops half-way, under both of its model runners: every answer is a golden row.

vLLM preempts when the blocks for keys and values run out: it frees a request's blocks and later computes its prompt
anew. Here 48 prompts grow side by side, 64 tokens a step, in blocks that hold the longest one twice.
"""

import asyncio
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from conftest import Figure, Golden
from jina_v4_client import AsyncEmbeddingsClient
from runners import RUNNERS, runner_of
from servers import PATIENCE_S, Server, engine_server
from wire import TASK, Wire, golden_difference_of

pytestmark = pytest.mark.long

BOUND = 1e-5
OPTIONS = (
    "--max-model-len=1024",
    "--block-size=32",
    "--num-gpu-blocks-override=48",
    "--max-num-batched-tokens=3072",
    "--long-prefill-token-threshold=64",
    "--max-num-seqs=48",
)
KINDS = {"V1": (), "V2": (), "V2, asynchronous scheduling": ("--async-scheduling",)}
# 48 prompts, most of them long: 747, 459 and 402 tokens.
NAMES = ("image/2", "query/3", "query/1", "passage/3", "image/1", "passage/4") * 8


@pytest.fixture(scope="module", params=KINDS)
def server(
    request: pytest.FixtureRequest, folded: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    runner = request.param[:2]
    log = tmp_path_factory.mktemp("preemption") / "log"
    checkpoint = folded("float32") / f"jina-embeddings-v4-{TASK}"
    environment = {"JINA_V4_MAX_TOKENS_IN_FLIGHT": "100000", "VLLM_LOGGING_LEVEL": "DEBUG", **RUNNERS[runner]}
    with engine_server(TASK, checkpoint, log, *OPTIONS, *KINDS[request.param], **environment) as server:
        server.wait_ready()
        assert runner_of(log) == runner
        assert ("Batch queue is enabled with size 2" in log.read_text()) == ("asynchronous" in request.param)
        yield server


def counted(server: Server, metric: str) -> int:
    page = httpx2.get(f"{server.base_url}/metrics", timeout=PATIENCE_S).text
    return round(sum(map(float, re.findall(rf"^{metric}\{{.*\}} (\S+)$", page, re.MULTILINE))))


def test_a_mixed_batch_in_small_steps_gives_the_published_vectors(
    server: Server, golden: Golden, figure: Figure
) -> None:
    with httpx2.Client(base_url=server.base_url, timeout=120, trust_env=False) as http:
        difference = Wire(server.base_url, http).golden_difference(golden)
    figure(f"largest difference {difference:.1e}")
    assert difference <= BOUND


def test_requests_that_are_given_up_do_not_disturb_the_others(server: Server, golden: Golden, figure: Figure) -> None:
    """Every second client leaves at the first answer, when most prompts are half-way."""

    async def embed() -> list[float]:
        async with AsyncEmbeddingsClient(base_url=server.base_url) as client:
            tasks = [asyncio.create_task(golden_difference_of(client, golden, name)) for name in NAMES]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks[::2]:
                task.cancel()
            await asyncio.wait(tasks)
            return [task.result() for task in tasks if not task.cancelled()]

    finished = "vllm:request_success_total"
    before = counted(server, finished)
    differences = asyncio.run(embed())
    deadline = time.monotonic() + PATIENCE_S
    while counted(server, "vllm:num_requests_(?:running|waiting)") and time.monotonic() < deadline:
        time.sleep(0.1)
    n_computed = counted(server, finished) - before
    figure(f"{n_computed} of {len(NAMES)} prompts computed to their end; largest difference {max(differences):.1e}")
    assert len(differences) >= len(NAMES) // 2
    assert n_computed < len(NAMES)  # the engine heard of it
    assert max(differences) <= BOUND


def test_live_queries_go_before_a_corpus(server: Server, golden: Golden, figure: Figure) -> None:
    """A corpus of long texts and images is preempted by them, begins anew, and ends with its golden rows."""
    live, corpus = ("passage/0", "query/2") * 12 + NAMES[:24], NAMES

    async def embed() -> tuple[list[str], list[float]]:
        order: list[str] = []

        async def one(client: AsyncEmbeddingsClient, kind: str, name: str) -> float:
            difference = await golden_difference_of(client, golden, name)
            order.append(kind)
            return difference

        async with (
            AsyncEmbeddingsClient(base_url=server.base_url) as live_client,
            AsyncEmbeddingsClient(base_url=server.base_url, priority=999) as corpus_client,
        ):
            tasks = [asyncio.create_task(one(corpus_client, "corpus", name)) for name in corpus]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)  # so the rest has begun
            tasks += [asyncio.create_task(one(live_client, "live", name)) for name in live]
            return order, await asyncio.gather(*tasks)

    before = counted(server, "vllm:num_preemptions_total")
    order, differences = asyncio.run(embed())
    n_preemptions = counted(server, "vllm:num_preemptions_total") - before
    last_live = len(order) - order[::-1].index("live")
    n_before = order[:last_live].count("corpus")
    figure(f"{n_before} of {len(corpus)} before the last of {len(live)} queries, {n_preemptions} preemptions")
    assert max(differences) <= BOUND
    assert n_preemptions > 10
    assert n_before < 0.8 * len(corpus)  # in the order of arrival all of them end before the last query


def test_preempted_requests_begin_anew(server: Server, golden: Golden, figure: Figure) -> None:
    async def embed() -> list[float]:
        async with AsyncEmbeddingsClient(base_url=server.base_url) as client:
            return await asyncio.gather(*(golden_difference_of(client, golden, name) for name in NAMES))

    before = counted(server, "vllm:num_preemptions_total")
    differences: list[float] = []
    n_preemptions = 0
    while n_preemptions <= 50 and len(differences) < 5 * len(NAMES):  # it depends on their order
        differences += asyncio.run(embed())
        n_preemptions = counted(server, "vllm:num_preemptions_total") - before
    figure(f"{len(differences)} prompts, {n_preemptions} preemptions: largest difference {max(differences):.1e}")
    assert n_preemptions > 50
    assert max(differences) <= BOUND
