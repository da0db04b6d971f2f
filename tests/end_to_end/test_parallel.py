"""One server spread over two workers, as over two GPUs: every answer is a golden row. On a CPU, under V1."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Figure, Golden
from jina_v4_client import AsyncEmbeddingsClient
from servers import engine_server
from wire import TASK, golden_difference_of

BOUND = 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "workers"),
    [
        pytest.param("--tensor-parallel-size=2", ("Worker_TP0", "Worker_TP1"), id="tensor parallel"),
        pytest.param("--data-parallel-size=2", ("EngineCore_DP0", "EngineCore_DP1"), id="data parallel"),
    ],
)
def test_two_workers_give_the_published_vectors(
    option: str,
    workers: tuple[str, str],
    golden: Golden,
    folded: Callable[[str], Path],
    tmp_path: Path,
    figure: Figure,
) -> None:
    texts = [f"{prompt_name}/{i}" for prompt_name in ("query", "passage") for i in range(len(golden.texts))]
    names = texts + [f"image/{i}" for i in range(len(golden.images))]
    checkpoint = folded("float32") / f"jina-embeddings-v4-{TASK}"
    with engine_server(TASK, checkpoint, tmp_path / "log", option) as server:
        server.wait_ready()

        async def embed() -> list[float]:
            async with AsyncEmbeddingsClient(base_url=server.base_url) as client:
                return await asyncio.gather(*(golden_difference_of(client, golden, name) for name in names * 2))

        differences = asyncio.run(embed())
        log = server.log.read_text()
        assert [worker for worker in workers if f"({worker} pid=" in log] == list(workers)
    figure(f"largest difference {max(differences):.1e}")
    assert max(differences) <= BOUND
