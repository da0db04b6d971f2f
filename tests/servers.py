"""Real servers for the tests: each a process of its own on 127.0.0.1, ended by pid when its block ends."""

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
# The limit for what a test waits for: it ends by itself, also where the machine is busy with something else.
PATIENCE_S = 120.0
_PROCESS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_N_PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_PORTS = itertools.cycle(range(20_000 + os.getpid() % 1000 * _N_PROCESSES + _PROCESS, 30_000, _N_PROCESSES))


@dataclass
class Server:
    """A server that answers, or is about to."""

    base_url: str
    process: subprocess.Popen[bytes]
    log: Path

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.tail()}")
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{self.base_url}/health", timeout=5).close()  # noqa: S310 - our own address
                return
            time.sleep(0.5)
        raise TimeoutError(f"no answer within {START_TIMEOUT_S} s:\n{self.tail()}")

    def wait_until_said(self, text: str) -> None:
        """Wait until a text is in the log of the running server."""

        def said() -> bool:
            assert self.process.poll() is None, self.tail()
            return text in self.log.read_text(errors="replace")

        wait_until(said, self.tail, START_TIMEOUT_S)

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])


def free_port() -> int:
    """Return a port that is still free when a server listens there, half a minute later perhaps.

    It is below the ports that the kernel chooses by itself, and each process of a test run takes others.
    """
    for port in _PORTS:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("every port is in use")


def wait_until(
    condition: Callable[[], object], said: Callable[[], object] = lambda: None, timeout_s: float = PATIENCE_S
) -> None:
    """Wait until something is so; at the end of the time limit fail with what `said` returns."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, said()
        time.sleep(0.02)


def lives(pid: int) -> bool:
    """Whether a process still runs; one that is dead, and not reaped by its new parent yet, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


def group_is_alive(group: int) -> bool:
    """Whether any process of a process group still runs."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, 0)
        return True
    return False


def engines_of(program: int, checkpoint: str = "") -> list[int]:
    """The process ids of the engines of `jina-v4-serve`: children of its workers, or of the one of a checkpoint."""
    commands: dict[int, bytes] = {}
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            commands[int(folder.name)] = (folder / "cmdline").read_bytes()
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(") ")[2].split()[1])
    workers = [pid for pid, parent in parents.items() if parent == program and checkpoint.encode() in commands[pid]]
    return [pid for pid, parent in parents.items() if parent in workers and b"EngineCore" in commands[pid]]


@contextlib.contextmanager
def started(command: Sequence[str | os.PathLike[str]], port: int, log: Path, **env: str) -> Iterator[Server]:
    """Start a server in a process group of its own; end the whole group afterwards, asked for or not."""
    # Tests read vLLM's log with ours; JINA_V4_LOG="plain" has it in a file beside `log`.
    places = {"JINA_V4_LOG": "verbose", "JINA_V4_LOG_DIR": str(log.parent)}
    environment = {**places, **os.environ, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", **env}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        yield Server(f"http://127.0.0.1:{port}", process, log)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        if group_is_alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def engine_server(
    task: str, checkpoint: Path, log: Path, *options: str, dtype: str = "auto", own: Sequence[str] = (), **env: str
) -> Iterator[Server]:
    """Run `jina-v4-serve`; `own` are further options of ours, `options` are vLLM's."""
    port = free_port()
    address = ("--checkpoint", checkpoint, "--port", str(port), "--dtype", dtype)
    command = [BIN / "jina-v4-serve", task, *address, *own, "--", *options]
    with started(command, port, log, **env) as server:
        yield server


@contextlib.contextmanager
def gateway_server(urls: Mapping[str, str], log: Path, **env: str) -> Iterator[Server]:
    """Run `jina-v4-serve gateway` before servers, whose addresses it gets by task."""
    port = free_port()
    options = (f"--port={port}", *(f"--server={task}={url}" for task, url in urls.items()))
    with started([BIN / "jina-v4-serve", "gateway", *options], port, log, **env) as server:
        server.wait_ready()
        yield server


@contextlib.contextmanager
def one_base_server(exported: Path, log: Path, **env: str) -> Iterator[Server]:
    """Run `jina-v4-serve all --one-base` on what `export-adapters` has made."""
    port = free_port()
    own = ("--one-base", "--checkpoints", exported, "--dtype", "float32", "--port", str(port))
    with started([BIN / "jina-v4-serve", "all", *own], port, log, **env) as server:
        server.wait_ready()
        yield server


@contextlib.contextmanager
def stock_server(checkpoint: Path, log: Path) -> Iterator[Server]:
    """Run vLLM's own server with its own model class and all-token pooling; our plugin is not loaded."""
    port = free_port()
    options = {
        "model": str(checkpoint),
        "host": "127.0.0.1",
        "port": str(port),
        "dtype": "float32",
        "runner": "pooling",
        "convert": "embed",
        "pooler-config": '{"task": "token_embed", "use_activation": false}',
        "max-model-len": "4096",
        "max-num-batched-tokens": "4096",
        "limit-mm-per-prompt": '{"image": 1, "video": 0}',
    }
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
    flags = ["--enforce-eager", "--no-enable-prefix-caching", "--trust-request-mm-kwargs"]
    command += [*(f"--{k}={v}" for k, v in options.items()), *flags]
    # It would take nine tenths of the machine's memory for keys and values.
    with started(command, port, log, VLLM_PLUGINS="", VLLM_CPU_KVCACHE_SPACE="1") as server:
        yield server
