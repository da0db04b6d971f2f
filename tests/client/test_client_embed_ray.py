"""`jina-v4-embed --ray`: servers as workers of a Ray of its own, one of them killed in the middle."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import Figure, Golden
from jina_v4_client.embed.cli import app
from jina_v4_client.embed.ray.feed import Feed
from typer.testing import CliRunner

TASK = "retrieval"
N_ROWS = 20_000
N_BYTES = 256 * 4  # of a vector
TIMEOUT_S = 400.0
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("JINA_V4_")}


def write_corpus(path: Path, texts: list[str]) -> list[str]:
    """Write the golden texts and others between them, of which every tenth is a copy; give the text of each row."""
    chance = random.Random(1)  # noqa: S311
    rows = [f"text {number} of the corpus" for number in range(N_ROWS)]
    rows[9::10] = [chance.choice(rows[: place - 9]) if place > 9 else rows[0] for place in range(9, N_ROWS, 10)]
    for number in range(0, N_ROWS, 7):
        rows[number] = texts[number // 7 % len(texts)]
    lines = (json.dumps({"id": f"row-{number}", "text": text}) + "\n" for number, text in enumerate(rows))
    path.write_text("".join(lines))
    return rows


def processes(run: "subprocess.Popen[bytes]", having: str) -> list[psutil.Process]:
    found = []
    for one in psutil.Process(run.pid).children(recursive=True):
        try:
            if having in " ".join(one.cmdline()):
                found.append(one)
        except psutil.Error:  # it has ended meanwhile
            pass
    return found


@pytest.mark.slow
def test_a_killed_worker_loses_no_row_and_doubles_none(
    folded: Callable[[str], Path], golden: Golden, tmp_path: Path, figure: Figure
) -> None:
    rows = write_corpus(tmp_path / "corpus.jsonl", golden.texts)
    checkpoint = folded("float32") / f"jina-embeddings-v4-{TASK}"
    options = ["--ray", "local", "--checkpoint", checkpoint, "--workers", "2", "--server-args=--dtype float32"]
    command = [sys.executable, "-m", "jina_v4_client.embed", *options, "--task", TASK, "--prompt-name", "query"]
    command += ["--id-column", "id", "--batch-size", "16", "corpus.jsonl", "out.npy"]
    vectors = tmp_path / "out.npy.partial/vectors.bin"
    log = tmp_path / "log"
    with (
        log.open("wb") as said,
        subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stderr=said, start_new_session=True) as run,
    ):
        everything: list[psutil.Process] = []
        try:
            start = time.monotonic()
            while not vectors.exists() or vectors.stat().st_size < N_ROWS // 3 * N_BYTES:
                assert run.poll() is None, log.read_text()
                assert time.monotonic() - start < TIMEOUT_S, log.read_text()
                time.sleep(0.02)
            everything = processes(run, "")
            victim = processes(run, "MapWorker")[0]
            servers = processes(run, "--supervised")
            victim.send_signal(signal.SIGKILL)
            killed = time.monotonic()
            assert vectors.stat().st_size < N_ROWS // 2 * N_BYTES
            everything += processes(run, "")
            code = run.wait(TIMEOUT_S)
            took_s = time.monotonic() - killed
        finally:
            for one in psutil.wait_procs(everything, 20)[1]:
                one.kill()
            run.kill()
    assert code == 0, log.read_text()
    assert len(servers) == 2
    assert json.loads((tmp_path / "out.npy.ids.json").read_text()) == [f"row-{number}" for number in range(N_ROWS)]
    found = np.load(tmp_path / "out.npy")
    assert found.shape == (N_ROWS, 256)
    places = {text: place for place, text in enumerate(golden.texts)}
    known = [number for number, text in enumerate(rows) if text in places]
    expected = np.stack([golden.rows[f"{TASK}/query/{places[rows[number]]}/dense"] for number in known])
    worst = float(np.abs(found[known] - expected).max())
    assert len(known) > N_ROWS // 8
    assert worst < 1e-5
    # Each text has the vector of that text: equal ones the same, different ones another.
    first = {text: number for number, text in reversed(list(enumerate(rows)))}
    assert all((found[number] == found[first[text]]).all() for number, text in enumerate(rows))
    assert len(np.unique(found, axis=0)) == len(first)
    assert not (tmp_path / "out.npy.partial").exists()
    figure(
        f"jina-v4-embed --ray, two workers, kill -9 of one in the middle: {N_ROWS:,} rows, each once; the run ended"
        f" {took_s:.0f} s after, with the worker that Ray had started anew; no element off by over {worst:.1e}"
    )


def test_who_reads_anew_gets_every_call_that_is_not_answered_under_its_number() -> None:
    async def read() -> list[bytes | None]:
        feed = Feed()
        for number in (1, 0, 2, 3):  # threads come in any order
            await feed.put(number, f"call {number}".encode())
        await feed.answered(2)
        await feed.answered(0)
        await feed.end()
        return [await feed.take(number) for number in range(5)]

    assert asyncio.run(read()) == [b"", b"call 1", b"", b"call 3", None]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ray", "local"], "give it --checkpoint DIR"),
        (["--ray", "local", "--checkpoint", "x", "--base-url", "http://127.0.0.1:9"], "no --base-url"),
        (["--checkpoint", "x"], "go with --ray"),
        (["--server-args", "--dtype float32"], "go with --ray"),
    ],
    ids=["no checkpoint", "an address too", "a checkpoint alone", "arguments alone"],
)
def test_a_ray_and_an_address_exclude_one_another(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corpus.txt").write_text("a text\n")
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(app, [*options, "--task", TASK, "corpus.txt", "out.npy"])
    assert ended.exit_code == 2
    assert said in ended.stderr
