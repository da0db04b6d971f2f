"""The command: what it says, how fast, and how it fails."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import GOLDEN, TASKS

pytestmark = pytest.mark.proof

Run = Callable[..., subprocess.CompletedProcess[str]]
BASE = GOLDEN / "checkpoint"


def test_fold_says_what_it_wrote_and_how_long_it_took(run: Run, out: Path) -> None:
    done = run("fold", "--base", BASE, "--out", out, "--task", "code", "--task", "retrieval", "--dtype", "float16")
    assert (done.returncode, done.stderr) == (0, "")
    first, second, last = done.stdout.splitlines()
    assert first == f"{out}/jina-embeddings-v4-code: 0.01 GB, float16"
    assert second == f"{out}/jina-embeddings-v4-retrieval: 0.01 GB, float16"
    assert re.fullmatch(r"done in \d+\.\d s", last)
    assert json.loads((out / "jina-embeddings-v4-code" / "manifest.json").read_text())["dtype"] == "float16"


def test_fold_makes_all_tasks_in_bfloat16_unless_told_otherwise(run: Run, out: Path) -> None:
    assert run("fold", "--base", BASE, "--out", out).returncode == 0
    manifests = [json.loads(path.read_text()) for path in sorted(out.glob("*/manifest.json"))]
    assert sorted(manifest["task"] for manifest in manifests) == sorted(TASKS)
    assert {manifest["dtype"] for manifest in manifests} == {"bfloat16"}


def test_standin_says_what_it_wrote(run: Run, tmp_path: Path) -> None:
    done = run("standin", tmp_path / "tiny", "--seed", "3")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"{tmp_path}/tiny: 0\.07 GB, random weights, in \d+\.\d s\n", done.stdout)
    assert json.loads((tmp_path / "tiny" / "config.json").read_text())["standin"] == {"seed": 3, "size": "tiny"}


def test_an_error_is_one_line_without_a_traceback(run: Run, base: Path, out: Path) -> None:
    (base / "model-00002-of-00002.safetensors").unlink()
    done = run("fold", "--base", base, "--out", out)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: .*model-00002-of-00002\.safetensors is not there.*\n", done.stderr)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--task", "clustering"], "'retrieval', 'text-matching', 'code'"),
        (["--dtype", "int8"], "'bfloat16', 'float16', 'float32'"),
        (["--size", "3"], "--size"),
    ],
)
def test_a_mistaken_option_names_what_is_allowed(arguments: list[str], named: str, run: Run, out: Path) -> None:
    done = run("fold", "--base", BASE, "--out", out, *arguments, COLUMNS="200")
    assert done.returncode == 2
    assert named in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["fold", "--help"], ["fold", "--base", "x"]])
def test_help_and_mistakes_do_not_wait_for_torch(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom jina_v4_merge.cli import app\n"
        "try:\n    app(sys.argv[1:])\n"
        "except SystemExit:\n    print({'torch', 'transformers', 'peft', 'huggingface_hub'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


def test_a_fold_needs_neither_peft_nor_transformers(out: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom jina_v4_merge.fold import fold\n"
        "fold(sys.argv[1], Path(sys.argv[2]))\nassert not {'peft', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program, str(BASE), str(out)], check=True)
