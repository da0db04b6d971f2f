"""Killed with SIGKILL at any moment, a fold leaves nothing that is not whole under a final name; the next succeeds."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import GOLDEN, TASKS, Figure
from damage import files_of
from jina_v4_merge.export.gguf import export_gguf
from jina_v4_merge.fold import fold

pytestmark = pytest.mark.proof

BASE = str(GOLDEN / "checkpoint")
NAMES = [f"jina-embeddings-v4-{task}" for task in sorted(TASKS)]
N_KILLS = 20


def killed_runs(kind: str, out: Path, *options: str) -> list[dict[str, Any]]:
    out.mkdir(exist_ok=True)
    program = [sys.executable, str(Path(__file__).with_name("killing.py"))]
    done = subprocess.run(
        [*program, kind, BASE, str(out), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert [run["wrongly_accepted"] for run in runs] == [[]] * len(runs)
    assert any(run["left"] > len(run["finals"]) for run in runs), "some remains that could have been accepted"
    return runs


def shares(runs: list[dict[str, Any]]) -> str:
    return f"{min(run['share'] for run in runs):.0%} to {max(run['share'] for run in runs):.0%}"


@dataclass(frozen=True)
class Work:
    """What is killed, how often, and what it makes once it is left alone."""

    n_kills: int
    makes: dict[str, str]
    make: Callable[[Path], object]


THREE = dict.fromkeys(NAMES, "bfloat16")
ONE = "jina-embeddings-v4-code"
WORK = {
    "bytes": Work(N_KILLS, THREE, lambda out: fold(BASE, out)),
    "int8": Work(5, THREE, lambda out: fold(BASE, out, quantized="int8")),
    "gguf": Work(N_KILLS, {ONE: "q8_0"}, lambda out: export_gguf(BASE, out / ONE, "code", "q8_0")),
}


@pytest.mark.parametrize("kind", WORK)
def test_killed_at_random_moments_nothing_has_a_final_name(
    kind: str, out: Path, tmp_path: Path, figure: Figure
) -> None:
    work = WORK[kind]
    *killed, last = killed_runs(kind, out, str(work.n_kills))
    assert [run["status"] for run in killed] == [signal.SIGKILL] * work.n_kills
    assert [run["finals"] for run in killed] == [{}] * work.n_kills
    assert (last["status"], last["finals"]) == (0, work.makes)
    work.make(tmp_path / "other")
    assert files_of(out) == files_of(tmp_path / "other")
    figure(f"{kind} killed {work.n_kills} times, {shares(killed)} of the bytes written: no final name, then all of it")


def test_killed_at_random_moments_of_a_replacement_the_old_ones_stay(out: Path, figure: Figure) -> None:
    fold(BASE, out, dtype="float16")
    *killed, last = killed_runs("bytes", out, str(N_KILLS), "--force")
    assert [run["status"] for run in killed] == [signal.SIGKILL] * N_KILLS
    assert [run["finals"] for run in killed] == [dict.fromkeys(NAMES, "float16")] * N_KILLS
    assert (last["status"], last["finals"]) == (0, dict.fromkeys(NAMES, "bfloat16"))
    figure(f"killed {N_KILLS} times while replacing, {shares(killed)} written: the old three whole, then the new three")


def test_killed_at_each_step_of_replacing_each_name_has_the_old_or_the_new(out: Path, figure: Figure) -> None:
    *killed, last = killed_runs("steps", out)
    assert {run["status"] for run in killed} == {signal.SIGKILL}
    assert all(list(run["finals"]) == NAMES and all(run["finals"].values()) for run in killed), killed
    assert any(len(set(run["finals"].values())) == 2 for run in killed), "some between the first and the last exchange"
    assert last["status"] == 0
    assert sorted(path.name for path in out.iterdir()) == NAMES, "no remains"
    figure(f"killed at each of {len(killed)} steps of replacing: whole checkpoints under all three names each time")
