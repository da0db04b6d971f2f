"""Servers and the demo as processes: they end when told to, whole, and leave nothing behind."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from conftest import Figure, Golden
from jina_v4_client import EmbeddingsClient
from load import Load
from near import largest_difference
from servers import PATIENCE_S, START_TIMEOUT_S, Server, engine_server, engines_of, group_is_alive, wait_until

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]


def golden_texts_are_right(server: Server, golden: Golden) -> None:
    with EmbeddingsClient(base_url=server.base_url) as client:
        found = client.encode_text(golden.texts, task="retrieval", batch_size=1)
    expected = [golden.rows[f"retrieval/query/{i}/dense"] for i in range(len(golden.texts))]
    assert largest_difference(found, expected) <= 1e-5


def test_an_interrupted_server_leaves_no_process(golden: Golden, folded: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = folded("float32") / "jina-embeddings-v4-retrieval"
    with engine_server("retrieval", checkpoint, tmp_path / "log") as server:
        server.wait_ready()
        with EmbeddingsClient(base_url=server.base_url) as client:
            client.encode_text(golden.texts, task="retrieval")
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(PATIENCE_S) == 130
        wait_until(lambda: not group_is_alive(server.process.pid))


@pytest.fixture(scope="module")
def two_api_processes(folded: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two API processes, for two tests; the second one stops it."""
    checkpoint = folded("float32") / "jina-embeddings-v4-retrieval"
    log = tmp_path_factory.mktemp("two-api-processes") / "log"
    options = {"dtype": "float32", "JINA_V4_HUNG_AFTER_S": "10"}
    with engine_server("retrieval", checkpoint, log, "--api-server-count=2", **options) as server:
        server.wait_ready()
        wait_until(lambda: server.log.read_text().count("Application startup complete") == 2)
        yield server


def test_a_hung_engine_of_several_api_processes_is_started_anew(
    two_api_processes: Server, golden: Golden, figure: Figure
) -> None:
    """One process alone has work; whichever is asked says that the server is hung. The longest prompt is no hang.

    While one works on that, the other one is ready too.
    """
    server = two_api_processes
    longest = {"input": "The quick brown fox " * 8000, "truncate": True}
    begin = time.monotonic()
    with ThreadPoolExecutor() as pool:
        sent = pool.submit(httpx2.post, f"{server.base_url}/v1/embeddings", json=longest, timeout=400)
        ready = []
        while not sent.done():
            ready.append(httpx2.get(f"{server.base_url}/ready", timeout=30).status_code)
            time.sleep(0.5)
    n_tokens = sent.result().json()["usage"]["total_tokens"]
    figure(
        f"a first prompt of {n_tokens} tokens took {time.monotonic() - begin:.0f} s;"
        f" meanwhile /ready was 200 {ready.count(200)} of {len(ready)} times"
    )
    assert set(ready) == {200}
    (engine,) = engines_of(server.process.pid)
    os.kill(engine, signal.SIGSTOP)
    with pytest.raises(httpx2.TransportError) as failure:
        httpx2.post(f"{server.base_url}/v1/embeddings", json={"input": "a text"}, timeout=60)
    assert not isinstance(failure.value, httpx2.TimeoutException)
    assert "the retrieval server is hung, and is killed" in server.log.read_text()
    server.wait_ready()
    assert engine not in engines_of(server.process.pid)
    golden_texts_are_right(server, golden)


def test_several_api_processes_told_to_stop_answer_what_they_accepted(
    two_api_processes: Server, golden: Golden
) -> None:
    server = two_api_processes
    # Both listen again after the test before this one.
    wait_until(lambda: server.log.read_text().count("Application startup complete") in (2, 4))
    golden_texts_are_right(server, golden)
    with Load(server.base_url, "retrieval", golden.texts, n_clients=8) as load:
        time.sleep(3)
        told = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE_S) == 0
    print(f"in flight {dict(load.flying(told))}, in all {dict(load.outcomes())}")
    assert set(load.flying(told)) == {"200"}
    assert set(load.outcomes()) <= {"200", "ConnectError", "ReadError"}
    assert load.wrong == 0
    wait_until(lambda: not group_is_alive(server.process.pid))


@pytest.mark.parametrize("moment", ["starting vLLM", "EngineCore"])
def test_a_server_interrupted_while_it_starts_leaves_no_process(
    moment: str, folded: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = folded("float32") / "jina-embeddings-v4-retrieval"
    with engine_server("retrieval", checkpoint, tmp_path / "log") as server:
        server.wait_until_said(moment)
        time.sleep(1)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(PATIENCE_S) != 0
        print(server.tail())
        wait_until(lambda: not group_is_alive(server.process.pid))


def test_a_checkpoint_that_is_replaced_during_a_start_is_not_served(
    folded: Callable[[str], Path], tmp_path: Path
) -> None:
    """Replies would have the revision of one checkpoint and vectors of the other, or of a mixture."""
    first, second = (folded(dtype) / "jina-embeddings-v4-retrieval" for dtype in ("float32", "bfloat16"))
    link, new = tmp_path / "checkpoint", tmp_path / "new"
    link.symlink_to(first)
    new.symlink_to(second)
    with engine_server("retrieval", link, tmp_path / "log") as server:
        server.wait_until_said("Resolved architecture")
        new.rename(link)  # the revision has been read, the weights have not
        assert server.process.wait(START_TIMEOUT_S) == 1
        assert f"{link} was replaced by another checkpoint during the start" in server.log.read_text()


def test_an_unknown_option_of_vllm_is_named(folded: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = folded("float32") / "jina-embeddings-v4-retrieval"
    with engine_server("retrieval", checkpoint, tmp_path / "log", "--no-such-option") as server:
        assert server.process.wait(START_TIMEOUT_S) == 2
        assert "--no-such-option" in server.tail()


@pytest.fixture(scope="module")
def demo_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def make_demo(checkpoints: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["make", "--no-print-directory", "demo", f"CHECKPOINTS={checkpoints}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def processes_with(text: str) -> list[str]:
    """Command lines of running processes that hold a text."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found


def test_the_demo_shows_what_it_promises(demo_checkpoints: Path) -> None:
    demo = make_demo(demo_checkpoints)
    output, _ = demo.communicate(timeout=500)
    print(output)
    assert demo.returncode == 0
    assert re.search(r"one sunset in nine languages +9 x \(2048,\) +float32, norm 1\.000000 to 1\.000000", output)
    assert re.search(r"two pictures +2 x \(2048,\)", output)
    assert re.search(r"truncate_dim=128 +1 x \(128,\)", output)
    assert re.search(r"sunset, Korean +-?\d\.\d{3} +-?\d\.\d{3}", output)
    assert "RANDOM" in output
    assert re.search(r"the whole demo took \d+ s", output)
    assert processes_with(str(demo_checkpoints)) == []
    again = ["make", "--no-print-directory", "merge", "BASE=standin", f"CHECKPOINTS={demo_checkpoints}"]
    done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"{demo_checkpoints}/standin holds the merged checkpoints already\n"


@pytest.mark.parametrize("moment", ["while the server starts", "while it folds"])
def test_an_interrupted_demo_leaves_no_process(demo_checkpoints: Path, tmp_path: Path, moment: str) -> None:
    checkpoints = tmp_path if moment == "while it folds" else demo_checkpoints
    program = "jina-v4-merge" if moment == "while it folds" else "jina-v4-serve"
    demo = make_demo(checkpoints)
    try:
        wait_until(lambda: any(program in line for line in processes_with(str(checkpoints))))
        time.sleep(5 if program == "jina-v4-serve" else 0.5)
    finally:
        os.killpg(demo.pid, signal.SIGINT)  # what Ctrl-C does to the foreground
        output, _ = demo.communicate(timeout=PATIENCE_S)
        print(output)
    assert demo.returncode != 0
    assert "Traceback" not in output
    wait_until(lambda: processes_with(str(checkpoints)) == [])


def test_make_without_the_hub_names_the_ways_out(tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "--no-print-directory", "serve-code", f"CHECKPOINTS={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")},
    )
    print(done.stderr)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "standin" in done.stderr
    assert list(tmp_path.glob("*/jina-embeddings-v4-*")) == []
