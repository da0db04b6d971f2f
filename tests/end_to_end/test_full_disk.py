"""Temporary files, caches and the log on a disk that is full while the server runs: it goes on answering."""

import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import numpy as np
import pytest
from conftest import Figure
from near import largest_difference
from servers import BIN, Server, engines_of, free_port, started
from small_disk import DISK, fill, needs_namespaces, on_small_disk
from wire import IMAGES_BASE64

TASK = "retrieval"
DISK_BYTES = 2**26
GOOD = {"/health": 200, "/ready": 200, "/v1/models": 200, "/version": 200, "/metrics": 200, "/nothing": 404}

pytestmark = [needs_namespaces, pytest.mark.slow]  # four minutes


@contextmanager
def server_on_small_disk(checkpoint: Path, folder: Path, *options: str) -> Iterator[tuple[Server, Path]]:
    """Run a server with all that it writes on a small disk; give it and the disk as seen from here."""
    port = free_port()
    places = {name: str(DISK) for name in ("TMPDIR", "HOME", "XDG_CACHE_HOME", "VLLM_CACHE_ROOT", "VLLM_RPC_BASE_PATH")}
    own = ["--checkpoint", checkpoint, "--port", port, "--dtype", "float32", "--", *options]
    command = ["sh", "-c", 'exec "$@" > log 2>&1', "sh", BIN / "jina-v4-serve", TASK, *own]
    with started([str(part) for part in on_small_disk(DISK_BYTES, command)], port, folder / "log", **places) as server:
        disk = Path(f"/proc/{server.process.pid}/root{DISK}")
        try:
            server.wait_ready()
            yield server, disk
        finally:
            if (disk / "log").exists():
                print((disk / "log").read_text(errors="replace")[-6000:])


def ask(server: Server, outcomes: Counter[str]) -> np.ndarray:
    """Send requests of every kind, good and bad; return the vectors of a text and of an image."""
    good = {"input": [{"text": "a text"}, {"image": IMAGES_BASE64[0]}]}
    bodies = [
        (good, 200),
        ({"input": ["one", "two"], "late_chunking": True}, 200),
        ({"input": "a text", "return_multivector": True}, 200),
        ({"input": []}, 422),
        ({"input": 5}, 422),
        ({"input": {"image": "http://10.0.0.1/x.png"}}, 422),
        ({"input": "a text", "model": "other"}, 404),
    ]
    with httpx2.Client(base_url=server.base_url, timeout=60) as http:  # a connection of its own: some API process's
        for body, status in bodies:
            answer = http.post("/v1/embeddings", json=body)
            outcomes[f"{answer.status_code}, as expected" if answer.status_code == status else answer.text] += 1
            if body is good:
                vectors = np.array([item["embedding"] for item in answer.json()["data"]], np.float32)
        for path, status in GOOD.items():
            answer = http.get(path)
            outcomes[f"{answer.status_code}, as expected" if answer.status_code == status else answer.text] += 1
    return vectors


@pytest.mark.parametrize("n_processes", [1, 2], ids=["one API process", "two API processes"])
def test_callers_do_not_notice_a_full_disk(
    n_processes: int, folded: Callable[[str], Path], tmp_path: Path, figure: Figure
) -> None:
    checkpoint = folded("float32") / f"jina-embeddings-v4-{TASK}"
    with server_on_small_disk(checkpoint, tmp_path, f"--api-server-count={n_processes}") as (server, disk):
        (engine,) = engines_of(server.process.pid)
        filling = fill(disk)
        assert shutil.disk_usage(disk).free == 0
        outcomes = Counter[str]()
        begin = time.monotonic()
        full = [ask(server, outcomes) for _ in range(20)]
        figure(f"disk full for {time.monotonic() - begin:.0f} s: {dict(outcomes)}")
        assert all(outcome.endswith("as expected") for outcome in outcomes)
        assert engines_of(server.process.pid) == [engine]
        assert shutil.disk_usage(disk).free == 0
        filling.unlink()
        after = ask(server, outcomes)
        assert largest_difference(full, [after] * 20) <= 1e-5


def test_a_server_that_fails_on_a_full_disk_comes_back_once_there_is_room(
    folded: Callable[[str], Path], tmp_path: Path, figure: Figure
) -> None:
    checkpoint = folded("float32") / f"jina-embeddings-v4-{TASK}"
    with server_on_small_disk(checkpoint, tmp_path) as (server, disk):
        outcomes = Counter[str]()
        before = ask(server, outcomes)
        (engine,) = engines_of(server.process.pid)
        filling = fill(disk)
        os.kill(engine, signal.SIGKILL)
        begin = time.monotonic()
        while engine in engines_of(server.process.pid):
            assert time.monotonic() - begin < 120
            time.sleep(0.1)
        filling.unlink()
        while not set(engines_of(server.process.pid)) - {engine}:
            assert time.monotonic() - begin < 240
            time.sleep(0.1)
        server.wait_ready()
        figure(f"engine killed on a full disk: back after {time.monotonic() - begin:.0f} s")
        assert np.abs(ask(server, outcomes) - before).max() <= 1e-5
        assert all(outcome.endswith("as expected") for outcome in outcomes)
