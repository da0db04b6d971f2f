"""Servers that are measured: each in a process group of its own on 127.0.0.1, ended when its block ends."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from jina_v4_serve.launch.cpu import MAX_TOKENS_A_STEP

BIN = Path(sys.executable).parent
START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 60.0
TASK = "retrieval"
QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def end_on_sigterm() -> None:
    """Let SIGTERM end this program as an exception does, so that what it has started ends too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None, *, pipes: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program for the length of a block.

    Args:
        command: of the program.
        log: file for what it prints; with `pipes` for its standard error alone.
        environment: variables beside ours.
        pipes: whether its standard input and output are pipes of ours.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
            stdout=subprocess.PIPE if pipes else output,
            stderr=output if pipes else subprocess.STDOUT,
            env={**os.environ, **QUIET, **(environment or {})},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):  # what it has left behind
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def tail(log: Path) -> str:
    """Return the end of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])


def until_ready(url: str, process: subprocess.Popen[bytes], log: Path, path: str = "/ready") -> None:
    """Wait for the first good answer; end this program, with the end of the log, where there is none."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy leads to 127.0.0.1
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError):
            direct.open(f"{url}{path}", timeout=10).close()
            return
        time.sleep(0.1)
    sys.exit(f"{url} does not answer; the end of its log:\n{tail(log)}")


def serve_command(checkpoint: Path, port: int, options: Sequence[str] = ()) -> list[str]:
    """Return the command of our server; `options` are vLLM's."""
    program = [str(BIN / "jina-v4-serve"), TASK, "--checkpoint", str(checkpoint), "--port", str(port), "--verbose"]
    return [*program, "--", *options] if options else program


@contextlib.contextmanager
def serving(checkpoint: Path, log: Path, options: Sequence[str] = ()) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run our server for the length of a block; yield its address, once it is ready, and its process."""
    port = free_port()
    with running(serve_command(checkpoint, port, options), log) as process:
        url = f"http://127.0.0.1:{port}"
        until_ready(url, process, log)
        yield url, process


def stock_command(checkpoint: Path, port: int, on_cpu: bool, options: Sequence[str] = ()) -> list[str]:
    """Return the command of vLLM's own server with its own model class and all-token pooling, as docs/serve.md has it.

    Token budget and sequence limit are those of our launcher: what is compared is the way, not two settings.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    longest = min(32768, int(config.get("text_config", config)["max_position_embeddings"]))
    settings = {
        "model": str(checkpoint),
        "served-model-name": f"jina-embeddings-v4-{TASK}",
        "host": "127.0.0.1",
        "port": str(port),
        "runner": "pooling",
        "convert": "embed",
        "pooler-config": '{"task": "token_embed", "use_activation": false}',
        "max-model-len": str(longest),
        "max-num-batched-tokens": str(MAX_TOKENS_A_STEP if on_cpu else 16384),
        "limit-mm-per-prompt": '{"image": 1, "video": 0}',
    }
    # vLLM's `serve` without its command line, which does not work where the CPU build is installed.
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    flags = ["--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
    if on_cpu:
        flags.append("--enforce-eager")
    return [*program, *(f"--{name}={value}" for name, value in settings.items()), *flags, *options]


def stock_environment(on_cpu: bool) -> dict[str, str]:
    """Return the variables of a stock server: no plugin of ours; of a CPU's memory no more than it needs."""
    return {"VLLM_PLUGINS": "", **({"VLLM_CPU_KVCACHE_SPACE": "1"} if on_cpu else {})}
