"""`jina-v4-embed` killed, stopped and resumed: every row once, nothing twice, the bytes of an undisturbed run."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet
from servers import PATIENCE_S

pytestmark = pytest.mark.proof

# Forks a run for each line of arguments and says how it ended: to import everything anew each time would take minutes.
FORKER = """
import json, os, sys
import pyarrow.parquet
import jina_v4_client.embed.cli
from jina_v4_client import EmbeddingsClient, ServerConnectionError
from jina_v4_client.embed import main
try:
    EmbeddingsClient("http://127.0.0.1:9", max_retries=0).encode_text("x", task="code")
except ServerConnectionError:
    pass

def exit_before_step(last):
    # To be killed right before the n-th step that reaches the disk.
    steps = iter(range(1, last))
    def counted(call):
        def step(*arguments, **keywords):
            next(steps, None) or os._exit(9)
            return call(*arguments, **keywords)
        return step
    for name in ("fsync", "replace", "rename", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))

print("ready", flush=True)
for line in sys.stdin:
    arguments, log, last_step = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        if last_step:
            exit_before_step(last_step)
        sys.argv[1:] = arguments
        main()
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
N_ROWS, N_KILLS, WORKERS, BATCH = 5000, 20, 4, 32


@dataclass
class Runs:
    """Runs of the command, one after the other."""

    url: str
    forker: subprocess.Popen[str]
    log: Path
    options: list[str] = field(default_factory=list)

    def start(self, *arguments: object, exit_before_step: int = 0) -> int:
        options = ["--base-url", self.url, "--task", "retrieval", "--max-retries", "0", *self.options]
        assert self.forker.stdin is not None
        line = [[*options, *map(str, arguments)], str(self.log), exit_before_step]
        self.forker.stdin.write(json.dumps(line) + "\n")
        self.forker.stdin.flush()
        return int(self._line())

    def end(self) -> int:
        """Wait for the end of the run; give its exit code, or minus the signal that ended it."""
        return int(self._line())

    def run(self, *arguments: object, exit_before_step: int = 0) -> int:
        self.start(*arguments, exit_before_step=exit_before_step)
        return self.end()

    def said(self) -> list[str]:
        return self.log.read_text().splitlines()

    def _line(self) -> str:
        assert self.forker.stdout is not None
        return self.forker.stdout.readline()


@pytest.fixture(scope="module")
def forker() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", FORKER]
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment.pop("JINA_V4_API_KEY", None)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(PATIENCE_S) == 0


@pytest.fixture
def runs(server: Any, forker: subprocess.Popen[str], tmp_path: Path) -> Runs:
    server.play_ours()
    return Runs(server.url, forker, tmp_path / "log")


class Counter:
    """Counts the texts that a played server has answered."""

    def __init__(self, server: Any, before: Callable[[], object] = lambda: None) -> None:
        self.texts: list[str] = []
        self._changed = threading.Condition()
        play = server.routes["/v1/embeddings"]

        def count(seen: Any) -> Any:
            before()
            answer = play(seen)
            with self._changed:
                self.texts += [item["text"] for item in seen.body["input"]]
                self._changed.notify_all()
            return answer

        server.routes["/v1/embeddings"] = count

    def wait(self, n_texts: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.texts) >= n_texts, timeout=PATIENCE_S)


def write_corpus(path: Path, n_rows: int) -> int:
    """Write rows of which every tenth is a copy of an earlier one; give how many different texts there are."""
    chance = random.Random(1)  # noqa: S311
    texts: list[str] = []
    with path.open("w") as file:
        for number in range(n_rows):
            text = chance.choice(texts) if number % 10 == 9 else f"text {number} of the corpus"
            texts.append(text)
            file.write(json.dumps({"id": f"row-{number}", "text": text}) + "\n")
    return len(set(texts))


def done_digests(folder: Path) -> set[bytes]:
    with sqlite3.connect(folder / "journal.sqlite") as database:
        digests = {digest for (digest,) in database.execute("SELECT digest FROM items")}
    database.close()
    return digests


def test_twenty_kills_at_random_moments_change_nothing(runs: Runs, server: Any, tmp_path: Path, figure: Any) -> None:
    corpus, undisturbed, out = (tmp_path / name for name in ("corpus.jsonl", "undisturbed.parquet", "out.parquet"))
    n_different = write_corpus(corpus, N_ROWS)
    runs.options += ["--id-column", "id", "--workers", str(WORKERS), "--batch-size", str(BATCH)]
    assert runs.run(corpus, undisturbed) == 0
    chance = random.Random(20)  # noqa: S311
    most, killed = 0, threading.Event()
    # However late a kill comes, most of the corpus is still to be done.
    counter = Counter(server, before=lambda: len(counter.texts) < most or killed.wait(PATIENCE_S))
    journal = tmp_path / "out.parquet.partial"
    n_done = 0
    for _ in range(N_KILLS):
        killed.clear()
        most = len(counter.texts) + chance.randrange(1, 150)
        pid = runs.start(corpus, out)
        counter.wait(most)
        time.sleep(chance.random() * 0.01)
        os.kill(pid, signal.SIGKILL)
        assert runs.end() == -signal.SIGKILL
        killed.set()
        with sqlite3.connect(journal / "journal.sqlite") as database:
            (n_now,) = database.execute("SELECT count(*) FROM items").fetchone()
        database.close()
        assert n_now >= n_done
        n_done = n_now
    assert 0 < n_done < n_different
    assert runs.run(corpus, out) == 0
    assert out.read_bytes() == undisturbed.read_bytes()
    assert not journal.exists()
    table = parquet.read_table(out)
    assert table["id"].to_pylist() == [f"row-{number}" for number in range(N_ROWS)]
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    vectors = np.stack(table["vector"].to_numpy())
    assert all((vectors[i] == server.vector("Passage: " + texts[i])).all() for i in range(0, N_ROWS, 7))
    # What was in flight at a kill is done again, and nothing else.
    assert n_different <= len(counter.texts) <= n_different + N_KILLS * WORKERS * BATCH
    again = len(counter.texts) - n_different
    figure(f"{N_KILLS} kills over {N_ROWS:,} rows: bytes as undisturbed; {again} texts in flight were sent again")


def test_a_kill_before_any_step_to_the_disk_changes_nothing(runs: Runs, server: Any, tmp_path: Path) -> None:
    corpus, undisturbed = tmp_path / "corpus.jsonl", tmp_path / "undisturbed.npy"
    write_corpus(corpus, 10)
    corpus.write_text(corpus.read_text() + '{"id": "bad"}\n')  # so that there is a file of errors
    runs.options += ["--workers", "1", "--batch-size", "8", "--on-error", "skip", "--id-column", "id"]
    assert runs.run(corpus, undisturbed) == 3
    n_steps = 0
    code = 9
    while code == 9:
        n_steps += 1
        out = tmp_path / f"out-{n_steps}.npy"
        code = runs.run(corpus, out, exit_before_step=n_steps)
        if code == 9 and runs.run(corpus, out) == 2:
            # The output was in its place, whole; only the removal of the work folder was not.
            assert runs.said() == [f"error: {out} is there already; use --force to replace it"]
        for beside in ("", ".errors.jsonl", ".ids.json"):
            found, expected = (Path(f"{place}{beside}").read_bytes() for place in (out, undisturbed))
            assert found == expected, f"step {n_steps}"
        assert list(tmp_path.glob(f"{out.name}.partial*")) == []
    assert code == 3
    assert n_steps > 14


def test_a_run_with_other_options_or_inputs_says_what_differs(runs: Runs, server: Any, tmp_path: Path) -> None:
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "out.parquet"
    write_corpus(corpus, 40)
    runs.options += ["--workers", "1", "--batch-size", "4"]
    counter = Counter(server)
    pid = runs.start("--dimensions", 256, corpus, out)
    counter.wait(12)
    os.kill(pid, signal.SIGKILL)
    assert runs.end() == -signal.SIGKILL

    def refused(*arguments: object) -> str:
        assert runs.run(*arguments, out) == 2
        (line,) = runs.said()
        assert line.startswith(f"error: {out}.partial holds the work of another run: ")
        assert "--restart" in line
        return line

    assert "--dimensions was 256 and is 512." in refused("--dimensions", 512, corpus)
    line = refused("--prompt-name", "query", corpus)
    assert "--prompt-name was passage and is query; --dimensions was 256 and is not given." in line
    assert f"the inputs were {corpus} and are {corpus} {corpus}." in refused("--dimensions", 256, corpus, corpus)
    content = corpus.read_bytes()
    os.utime(corpus, (1, 1))
    assert f"{corpus} was changed since." in refused("--dimensions", 256, corpus)
    corpus.write_bytes(content + b'{"text": "more"}\n')
    size = len(content)
    assert f"{corpus} had {size} bytes and has {size + 17}." in refused("--dimensions", 256, corpus)
    # How the work is shared out may change, and so may everything with --restart.
    assert runs.run("--restart", "--workers", 2, "--batch-size", 7, corpus, out) == 0
    assert parquet.read_metadata(out).num_rows == 41


def test_the_standard_input_is_resumed_if_it_is_the_same(runs: Runs, server: Any, tmp_path: Path) -> None:
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "out.npy"
    write_corpus(corpus, 40)
    command = [sys.executable, "-m", "jina_v4_client.embed", "--base-url", server.url, "--task", "retrieval"]
    command += ["--max-retries", "0", "--workers", "1", "--batch-size", "4", "-", str(out)]
    play = server.routes["/v1/embeddings"]
    answers = iter([True] * 5)
    server.routes["/v1/embeddings"] = lambda seen: play(seen) if next(answers, False) else server.json_answer({}, 503)

    def piped(content: bytes) -> tuple[int, str]:
        ran = subprocess.run(command, input=content, capture_output=True)
        return ran.returncode, ran.stderr.decode()

    content = corpus.read_bytes()
    assert piped(content)[0] == 1
    server.routes["/v1/embeddings"] = play
    code, said = piped(content.replace(b"text 3 ", b"text III "))
    assert (code, "row 4 is not what it was in an earlier run; feed the same rows again" in said) == (1, True)
    n_sent = len(server.bodies("/v1/embeddings"))
    code, said = piped(content)
    assert (code, said.splitlines()[0]) == (0, "resuming: 22 rows are done")
    assert len(server.bodies("/v1/embeddings")) - n_sent == 4
    texts = [json.loads(line)["text"] for line in content.splitlines()]
    assert (np.load(out) == np.stack([server.vector("Passage: " + text) for text in texts])).all()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_ctrl_c_and_sigterm_end_with_a_line_that_says_how_to_resume(
    number: signal.Signals, runs: Runs, server: Any, tmp_path: Path
) -> None:
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "out.parquet"
    write_corpus(corpus, 40)
    runs.options += ["--workers", "2", "--batch-size", "4"]
    hanging = threading.Event()
    counter = Counter(server, before=lambda: len(counter.texts) < 12 or hanging.wait(PATIENCE_S))
    pid = runs.start(corpus, out)
    counter.wait(12)
    while not Path(f"{out}.partial/vectors.bin").stat().st_size:
        time.sleep(0.01)
    start = time.monotonic()
    os.kill(pid, number)
    code = runs.end()
    elapsed_s = time.monotonic() - start
    hanging.set()
    assert code == 128 + number
    assert elapsed_s < PATIENCE_S / 2  # it did not wait for the requests that hang
    (line,) = runs.said()
    how = f"what is done is kept in {out}.partial: run the same command again to resume"
    assert line == f"{'interrupted' if number == signal.SIGINT else 'ended by SIGTERM'}; {how}"
    assert runs.run(corpus, out) == 0
    assert runs.said()[0].startswith("resuming: ")
    assert parquet.read_metadata(out).num_rows == 40


def test_two_runs_for_one_output_do_not_mix(runs: Runs, server: Any, tmp_path: Path) -> None:
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "out.npy"
    write_corpus(corpus, 40)
    hanging = threading.Event()
    counter = Counter(server, before=lambda: len(counter.texts) < 4 or hanging.wait(PATIENCE_S))
    command = [sys.executable, "-m", "jina_v4_client.embed", "--base-url", server.url, "--task", "retrieval"]
    command += ["--batch-size", "4", "--workers", "1", str(corpus), str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as first:
        counter.wait(4)
        assert runs.run("--batch-size", "4", "--workers", "1", corpus, out) == 2
        assert runs.said() == [f"error: {out}.partial cannot be used: another run is at work in it"]
        assert runs.run("--restart", corpus, out) == 2
        hanging.set()
        assert first.wait(PATIENCE_S) == 0
    assert np.load(out).shape == (40, 256)


def test_a_run_is_not_resumed_from_a_damaged_work_folder(runs: Runs, server: Any, tmp_path: Path) -> None:
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "out.npy"
    write_corpus(corpus, 40)
    runs.options += ["--workers", "1", "--batch-size", "4"]
    counter = Counter(server)
    pid = runs.start(corpus, out)
    counter.wait(20)
    os.kill(pid, signal.SIGKILL)
    assert runs.end() == -signal.SIGKILL
    # A kill between the file and the transaction leaves more in the file than is done.
    folder = tmp_path / "out.npy.partial"
    os.truncate(folder / "vectors.bin", len(done_digests(folder)) * 256 * 4 - 4)
    assert runs.run(corpus, out) == 2
    assert runs.said() == [
        f"error: {out}.partial is damaged: vectors are missing at the end; start anew with --restart"
    ]
    assert runs.run("--restart", corpus, out) == 0


def test_a_reader_that_goes_away_ends_a_pipe_quietly(server: Any) -> None:
    server.play_ours()
    command = [sys.executable, "-m", "jina_v4_client.embed", "--base-url", server.url, "--task", "retrieval", "-", "-"]
    lines = b"".join(b'{"text": "number %d"}\n' % number for number in range(2000))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(lines)
        process.stdin.close()
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(PATIENCE_S) == 128 + signal.SIGPIPE
