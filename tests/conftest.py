"""The golden checkpoint and what is folded from it, for every test."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from servers import BIN

TASKS = ("retrieval", "text-matching", "code")
GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Golden:
    """What the published code computes for a small random checkpoint; `golden/README.md` describes the rows."""

    checkpoint: Path
    texts: list[str]
    images: list[Path]
    rows: dict[str, NDArray[np.float32]]


@pytest.fixture(scope="session")
def golden() -> Golden:
    with np.load(GOLDEN / "reference.npz") as reference:
        rows = {name: reference[name] for name in reference.files}
    texts = json.loads((GOLDEN / "texts.json").read_text())
    return Golden(GOLDEN / "checkpoint", texts, sorted((GOLDEN / "img").glob("*.png")), rows)


@pytest.fixture(scope="session")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the three golden checkpoints, folded by the real command, by dtype."""
    done: dict[str, Path] = {}

    def fold(dtype: str) -> Path:
        if dtype not in done:
            out = tmp_path_factory.mktemp(f"folded-{dtype}")
            command = [BIN / "jina-v4-merge", "fold", "--base", GOLDEN / "checkpoint", "--out", out, "--dtype", dtype]
            subprocess.run(command, check=True, capture_output=True)
            done[dtype] = out
        return done[dtype]

    return fold
