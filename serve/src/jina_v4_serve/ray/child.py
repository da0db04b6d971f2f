"""`jina-v4-serve` as a child process: on a free port of 127.0.0.1, ended with whoever started it."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from http import HTTPStatus

from jina_v4_serve.cpu import EXECUTOR
from jina_v4_serve.errors import ServeError
from jina_v4_serve.launcher import api_processes
from jina_v4_serve.ray.settings import ServerSettings, Task

_HOST = "127.0.0.1"
_COMMAND = "jina-v4-serve"
_POLL_S = 0.25
_PROBE_TIMEOUT_S = 10.0
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy leads to 127.0.0.1
_USABLE = 0.9  # of a share of a GPU's memory


class Child:
    """A server of one task.

    Attributes:
        url: where it answers, without a path.
    """

    def __init__(self, settings: ServerSettings, task: Task) -> None:
        """Start it; it answers later, see `wait_ready`."""
        port = _free_port()
        self.url = f"http://{_HOST}:{port}"
        self._task = task
        # Its standard input ends with this process, however that ends, and it ends with its standard input.
        self._process = subprocess.Popen(
            command(settings, task, port), stdin=subprocess.PIPE, env={**os.environ, **environment(settings, task)}
        )

    def wait_ready(self) -> None:
        """Wait until it serves, however long it takes to load.

        Raises:
            ServeError: it ended instead.
        """
        while not self._answers():
            if (code := self._process.poll()) is not None:
                raise ServeError(
                    f"the {self._task} server ended with exit code {code} before it was ready; see its log"
                )
            time.sleep(_POLL_S)

    def when_ended(self, act: Callable[[], None]) -> None:
        """Have a function called, by another thread, as soon as the server has ended."""

        def watch() -> None:
            self._process.wait()
            act()

        threading.Thread(target=watch, name="child-watch", daemon=True).start()

    def stop(self) -> None:
        """Let it end, and wait: what it held (a GPU's memory) is free then."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()

    def _answers(self) -> bool:
        try:
            with _DIRECT.open(f"{self.url}/ready", timeout=_PROBE_TIMEOUT_S) as answer:
                return bool(answer.status == HTTPStatus.OK)
        except OSError:  # refused, reset, no answer in time, 503
            return False


def command(settings: ServerSettings, task: Task, port: int) -> list[str]:
    """Return the command of a server.

    Raises:
        ServeError: it is not installed on this node.
    """
    places = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])  # noqa: PTH120 - a list
    program = shutil.which(_COMMAND, path=places)
    if program is None:
        raise ServeError(f"{_COMMAND} is not installed on this node: every node needs jina-v4-serve[vllm,ray]")
    checkpoint = settings.checkpoints / f"jina-embeddings-v4-{task}"
    options = ["--checkpoint", str(checkpoint), "--host", _HOST, "--port", str(port), "--dtype", settings.dtype]
    if settings.max_pixels is not None:
        options += ["--max-pixels", str(settings.max_pixels)]
    return [program, task, *options, "--supervised", "--", *_shared(settings), *settings.vllm_options]


def environment(settings: ServerSettings, task: Task) -> dict[str, str]:
    """Return the variables of a server beside our own: it computes with the cores that Ray has counted out to it."""
    wanted = {"VLLM_LOGGING_PREFIX": f"[{task}] "}
    if settings.num_gpus == 0:
        n_threads = max(1, int(settings.num_cpus))
        # Threads that wait must leave the cores to the other replicas of the node.
        wanted |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(n_threads),
            "OMP_WAIT_POLICY": "passive",
        }
    return wanted


def _shared(settings: ServerSettings) -> list[str]:
    """Return the options of vLLM by which several replicas fit one node."""
    if settings.num_gpus == 0:
        return [f"--distributed-executor-backend={EXECUTOR}"]
    options = [f"--api-server-count={api_processes(int(settings.num_cpus), 1)}"]
    if settings.num_gpus < 1:
        options.append(f"--gpu-memory-utilization={_USABLE * settings.num_gpus:.3f}")
    return options


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])
