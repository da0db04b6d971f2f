"""What bfloat16, the dtype that people serve, costs against the published float32 vectors: a cosine for every row.

Each task is served as if on another processor, as vLLM's kernels for older ones round less well.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TASKS, Figure, Golden
from jina_v4_client import EmbeddingsClient
from processors import disguise
from servers import engine_server

pytestmark = pytest.mark.long

BOUND = 0.999
# The newest instructions of the processor that each task is served as if on; None: this one.
INSTRUCTIONS = ("avx2", "avx512", None)


@pytest.mark.parametrize(
    ("task", "instructions"),
    list(zip(TASKS, INSTRUCTIONS, strict=True)),
    ids=[f"{task}, {instructions or 'this processor'}" for task, instructions in zip(TASKS, INSTRUCTIONS, strict=True)],
)
def test_every_row_keeps_its_direction(
    task: str,
    instructions: str | None,
    golden: Golden,
    folded: Callable[[str], Path],
    tmp_path: Path,
    figure: Figure,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = folded("bfloat16") / f"jina-embeddings-v4-{task}"
    for name, value in disguise(instructions).items() if instructions else ():
        monkeypatch.setenv(name, value)
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
