"""A server whose vectors are not the canary's sends none; one whose vectors are serves."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from conftest import Figure
from jina_v4_merge.reading.weights import base_tensors
from servers import BIN, engine_server
from wire import Wire

SHARD = "model-00002-of-00002.safetensors"
BOUND = 1e-5


def test_the_right_weights_serve(wire: Wire, figure: Figure) -> None:
    answer = wire.http.get("/ready")
    assert (answer.status_code, answer.json()) == (200, {"ready": True})
    (distance,) = re.findall(r"^jina_v4_canary_distance\{.*\} (\S+)$", wire.http.get("/metrics").text, re.MULTILINE)
    figure(f"1 - cosine of the canary in float32: {float(distance):.1e}")
    assert abs(float(distance)) <= BOUND


def another_task(checkpoint: Path, other: Path) -> None:
    shutil.copy(other / SHARD, checkpoint / SHARD)


def a_block_of_the_vision_tower_without_effect(checkpoint: Path, other: Path) -> None:
    tensors = base_tensors(checkpoint)
    for name in ("visual.blocks.0.attn.proj.weight", "visual.blocks.0.mlp.down_proj.weight"):
        with tensors[name].path.open("r+b") as file:
            file.seek(tensors[name].offset)
            file.write(bytes(tensors[name].n_bytes))


@pytest.mark.long
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (another_task, "the canary's texts embed to other vectors"),
        (a_block_of_the_vision_tower_without_effect, "the canary's image embeds to other vectors"),
    ],
)
def test_wrong_weights_of_the_right_names_and_sizes_never_serve(
    spoil: Callable[[Path, Path], None], reason: str, folded: Callable[[str], Path], tmp_path: Path, figure: Figure
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(folded("float32") / "jina-embeddings-v4-code", checkpoint)
    subprocess.run([BIN / "jina-v4-merge", "verify", checkpoint, "--canary"], check=True, capture_output=True)
    spoil(checkpoint, folded("float32") / "jina-embeddings-v4-retrieval")  # nothing that the launcher looks at differs
    with engine_server("code", checkpoint, tmp_path / "log", "--max-model-len=2048") as server:
        server.wait_ready()
        with httpx2.Client(base_url=server.base_url, timeout=60, trust_env=False) as http:
            for _ in range(2):
                ready = http.get("/ready")
                assert ready.status_code == 503
                assert ready.json()["ready"] is False
                assert ready.json()["reason"].startswith(reason)
                for body in ({"input": "x"}, {"input": ["x"], "return_multivector": True}):
                    answer = http.post("/v1/embeddings", json=body)
                    assert answer.status_code == 503
                    assert answer.json()["error"]["code"] == "CANARY_FAILED"
                    assert "data" not in answer.json()
            (distance,) = re.findall(r"^jina_v4_canary_distance\{.*\} (\S+)$", http.get("/metrics").text, re.MULTILINE)
        assert server.process.poll() is None
        lines = [line for line in server.tail().splitlines() if "not serving: " in line]
    figure(f"1 - cosine of the canary with {spoil.__name__.replace('_', ' ')}: {float(distance):.2f}")
    assert float(distance) > 0.1
    assert len(lines) == 1
