"""The published vectors under Model Runner V2, which vLLM runs on every GPU; the other tests run V1, as a CPU does.

Small steps, preemption, aborted requests and asynchronous scheduling under V2 are in `test_preemption`.
"""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from conftest import TASKS, Figure, Golden
from jina_v4_client import AsyncEmbeddingsClient
from runners import RUNNERS, runner_of
from servers import Server, engine_server, one_base_server
from wire import TASK, Wire, golden_difference_of

pytestmark = pytest.mark.long

BOUND = 1e-5


@pytest.fixture(scope="module")
def folded_server(folded: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("folded") / "log"
    checkpoint = folded("float32") / f"jina-embeddings-v4-{TASK}"
    with engine_server(TASK, checkpoint, log, **RUNNERS["V2"]) as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def one_base(one_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with one_base_server(one_export, tmp_path_factory.mktemp("one-base") / "log", **RUNNERS["V2"]) as server:
        yield server


def test_runner_v2_gives_the_published_vectors(folded_server: Server, golden: Golden, figure: Figure) -> None:
    """Texts with both prompts and images, each dense and as a multi-vector, from one batch."""
    assert runner_of(folded_server.log) == "V2"
    with httpx2.Client(base_url=folded_server.base_url, timeout=120, trust_env=False) as http:
        difference = Wire(folded_server.base_url, http).golden_difference(golden)
    figure(f"largest difference {difference:.1e}")
    assert difference <= BOUND


def test_runner_v2_gives_the_published_vectors_of_one_base_with_tasks_mixed(
    one_base: Server, golden: Golden, figure: Figure
) -> None:
    """Every input of every task at once, the tasks in turn, each dense and as a multi-vector."""
    assert runner_of(one_base.log) == "V2"
    texts = [f"{prompt_name}/{i}" for prompt_name in ("query", "passage") for i in range(len(golden.texts))]
    names = texts + [f"image/{i}" for i in range(len(golden.images))]

    async def embed() -> list[float]:
        async with AsyncEmbeddingsClient(base_url=one_base.base_url) as client:
            return await asyncio.gather(
                *(golden_difference_of(client, golden, name, task) for name in names for task in TASKS)
            )

    differences = asyncio.run(embed())
    figure(f"largest difference of {len(differences)} inputs of three tasks {max(differences):.1e}")
    assert max(differences) <= BOUND
