"""`jina-v4-serve` on the node of a worker: a child process on a free port of 127.0.0.1, which ends with the worker."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jina_v4_client.embed.errors import StoppedError

_HOST = "127.0.0.1"
_COMMAND = "jina-v4-serve"
_POLL_S = 0.25
_PROBE_TIMEOUT_S = 10.0
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy leads to 127.0.0.1


@dataclass(frozen=True)
class ServerSettings:
    """What a worker's server is started with.

    Attributes:
        checkpoint: the folder of the merged checkpoint, on every node.
        arguments: of `jina-v4-serve`, the user's.
        on_gpu: whether it has a GPU of its own.
    """

    task: str
    checkpoint: str
    arguments: Sequence[str] = ()
    on_gpu: bool = False


class Server:
    """A server that answers.

    Attributes:
        url: where, without a path.

    Raises:
        StoppedError: it cannot be started here.
    """

    def __init__(self, settings: ServerSettings) -> None:
        port = _free_port()
        self._is_stopping = False
        self.url = f"http://{_HOST}:{port}"
        # Its standard input ends with this process, however that ends, and it ends with its standard input.
        self._process = subprocess.Popen(
            _command(settings, port), stdin=subprocess.PIPE, stdout=sys.stderr, env=_environment(settings)
        )
        while not self._answers():
            if (code := self._process.poll()) is not None:
                raise StoppedError(
                    f"{_COMMAND} {settings.task} ended with exit code {code} on the node {socket.gethostname()} before"
                    " it was ready; the log of its worker, below Ray's folder for this session, says why"
                )
            time.sleep(_POLL_S)

    def when_ended(self, act: Callable[[], None]) -> None:
        """Have a function called, by another thread, as soon as the server has ended by itself."""

        def watch() -> None:
            self._process.wait()
            if not self._is_stopping:
                act()

        threading.Thread(target=watch, name="server-watch", daemon=True).start()

    def stop(self) -> None:
        """Let it end."""
        self._is_stopping = True
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()

    def _answers(self) -> bool:
        try:
            with _DIRECT.open(f"{self.url}/ready", timeout=_PROBE_TIMEOUT_S) as answer:
                return bool(answer.status == 200)
        except OSError:  # refused, reset, no answer in time, 503
            return False


def _command(settings: ServerSettings, port: int) -> list[str]:
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = shutil.which(_COMMAND, path=places)
    if program is None:
        raise StoppedError(
            f"{_COMMAND} is not installed on the node {socket.gethostname()}: every node that may get a worker needs"
            " jina-v4-serve[vllm] beside jina-v4-client[embed,ray]"
        )
    own = ["--checkpoint", settings.checkpoint, "--host", _HOST, "--port", str(port), "--supervised"]
    return [program, settings.task, *own, *settings.arguments]


def _environment(settings: ServerSettings) -> dict[str, str]:
    found = dict(os.environ)
    if not settings.on_gpu:
        # Ray sets it to what it counts out to an actor, 1; the server knows better what its machine has.
        found.pop("OMP_NUM_THREADS", None)
        # Threads that wait must leave the cores to the other servers of the node.
        found.setdefault("OMP_WAIT_POLICY", "passive")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])
