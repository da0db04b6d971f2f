"""Bases to be spoilt, a stand-in, and the command itself, for the tests of merge."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, TASKS
from jina_v4_merge.fold import fold
from jina_v4_merge.standin.weights import standin
from safetensors.torch import load_file, save_file
from servers import BIN

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the golden base that a test may change."""
    return Path(shutil.copytree(GOLDEN / "checkpoint", tmp_path / "base"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where a test may fold to; not there yet."""
    return tmp_path / "out"


@pytest.fixture(scope="session")
def edit_json() -> Callable[..., None]:
    """Set some keys of a JSON file; None takes a key away."""

    def edit(path: Path, **changes: Any) -> None:
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return edit


@pytest.fixture(scope="session")
def edit_adapters() -> Callable[[Path, Callable[[Tensors], object]], None]:
    """Change the tensors of a base's adapter file."""

    def edit(base: Path, change: Callable[[Tensors], object]) -> None:
        path = base / "adapters" / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


@pytest.fixture(scope="session")
def edit_weights() -> Callable[[Path, Callable[[Tensors], object]], None]:
    """Change the tensors of a base, and its index with them; new ones go into the last shard."""

    def edit(base: Path, change: Callable[[Tensors], object]) -> None:
        index = base / "model.safetensors.index.json"
        home = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(home.values()))
        tensors = {name: tensor for shard in shards for name, tensor in load_file(base / shard).items()}
        change(tensors)
        weight_map = {name: home.get(name, shards[-1]) for name in tensors}
        for shard in shards:
            save_file({name: t for name, t in tensors.items() if weight_map[name] == shard}, base / shard)
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return edit


@pytest.fixture(scope="session")
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the installed command, as a user would."""

    def run_command(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / "jina-v4-merge"), *map(str, arguments)]
        return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=False)

    return run_command


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny stand-in."""
    folder = tmp_path_factory.mktemp("standin") / "tiny"
    standin(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny stand-in's three checkpoints in float32, by task."""
    made = fold(str(tiny), tmp_path_factory.mktemp("tiny-folded"), TASKS, "float32")
    return {checkpoint.task: checkpoint.folder for checkpoint in made}
