"""A checkpoint with int8 matrices on the real vLLM: near the published float32 vectors, and checked by its canary."""

import re
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, Figure, Golden
from jina_v4_client import EmbeddingsClient
from jina_v4_merge.fold import fold
from jina_v4_merge.verify.checks import verify
from jina_v4_merge.verify.reference import make_canary
from jina_v4_serve.launch.cpu import has_amx, int8_is_exact
from servers import engine_server

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not int8_is_exact(), reason="a processor without VNNI, where int8 is refused (test_launcher)"),
]

TASK = "retrieval"
# 1 - cosine, of dense vectors and of multi-vectors in the mean of their rows: 1.2e-3 was the largest.
BOUND = 5e-3


def test_int8_is_near_the_published_vectors(golden: Golden, tmp_path: Path, figure: Figure) -> None:
    (made,) = fold(str(GOLDEN / "checkpoint"), tmp_path / "folded", [TASK], quantized="int8")
    (checkpoint,) = verify([made.folder])
    make_canary(checkpoint)
    log = tmp_path / "log"
    # --verbose has vLLM's log on the screen, which is read below.
    dtype = "bfloat16" if has_amx() else "float32"
    with engine_server(TASK, made.folder, log, dtype=dtype, own=["--verbose"], JINA_V4_LOG="plain") as server:
        server.wait_ready()
        with EmbeddingsClient(base_url=server.base_url) as client:
            found: dict[str, np.ndarray] = {}
            for prompt_name in ("query", "passage"):
                for kind, multivector in (("dense", False), ("multi", True)):
                    vectors = client.encode_text(
                        golden.texts, task=TASK, prompt_name=prompt_name, return_multivector=multivector
                    )
                    found |= {f"{prompt_name}/{i}/{kind}": vector for i, vector in enumerate(vectors)}
            vectors = client.encode_image(golden.images, task=TASK)
            found |= {f"image/{i}/dense": vector for i, vector in enumerate(vectors)}
            revision = client.revision(TASK)
    distances = {
        name: 1 - float(np.sum(rows * golden.rows[f"{TASK}/{name}"]) / (rows.size / rows.shape[-1]))
        for name, rows in found.items()
    }
    for kind in ("dense", "multi"):
        largest = max(distance for name, distance in distances.items() if name.endswith(kind))
        figure(f"int8, {kind}: 1 - cosine {largest:.1e} at most")
    assert 1e-5 < max(distances.values()) < BOUND, "further off than float32, and near all the same"
    assert f"-{dtype}+int8-" in str(revision)
    said = log.read_text()
    assert "Selected CPUInt8ScaledMMLinearKernel" in said
    assert re.search(rf"the canary passes: 1 - cosine is \S+, at most 3e-02 is allowed in {dtype}\+int8", said)
