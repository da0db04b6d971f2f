"""What bfloat16, the dtype that people serve, costs against the published float32 vectors: a cosine for every row."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TASKS, Figure, Golden
from jina_v4_client import EmbeddingsClient
from servers import engine_server

BOUND = 0.999


@pytest.mark.parametrize("task", TASKS)
def test_every_row_keeps_its_direction(
    task: str,
    golden: Golden,
    folded: Callable[[str], Path],
    tmp_path: Path,
    figure: Figure,
) -> None:
    checkpoint = folded("bfloat16") / f"jina-embeddings-v4-{task}"
    with engine_server(task, checkpoint, tmp_path / "log", dtype="bfloat16") as server:
        server.wait_ready()
        with EmbeddingsClient(base_url=server.base_url) as client:
            found = {}
            for prompt_name in ("query", "passage"):
                vectors = client.encode_text(golden.texts, task=task, prompt_name=prompt_name)
                found |= {f"{prompt_name}/{i}/dense": vector for i, vector in enumerate(vectors)}
            found["query/0/dense128"] = client.encode_text(golden.texts[0], task=task, truncate_dim=128)
            found["query/3/max16"] = client.encode_text(golden.texts[3], task=task, max_length=16)
            vectors = client.encode_image(golden.images, task=task)
            found |= {f"image/{i}/dense": vector for i, vector in enumerate(vectors)}
    cosines = {name: float(vector @ golden.rows[f"{task}/{name}"]) for name, vector in found.items()}
    for name, cosine in cosines.items():
        figure(f"{name:<18} cosine {cosine:.6f}")
    assert min(cosines.values()) >= BOUND
