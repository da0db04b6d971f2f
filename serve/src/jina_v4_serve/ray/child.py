"""`jina-v4-serve` as a child process: on a free port of 127.0.0.1, ended with whoever started it.

`python -m jina_v4_serve.ray.child TASK ARGUMENT...` is for programs that do not import this package, as `jina-v4-embed
--ray`: it prints the server's address once it serves, and ends with the server or with its standard input.
"""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from http import HTTPStatus

from jina_v4_serve.errors import ServeError
from jina_v4_serve.facts import model_name
from jina_v4_serve.launch.arguments import ONE_PROCESS, api_processes
from jina_v4_serve.launch.options import says_tls
from jina_v4_serve.launch.server import LOCAL, free_port
from jina_v4_serve.launch.stopping import when_stdin_ends
from jina_v4_serve.ray.settings import ServerSettings, Task

_POLL_S = 0.25
_PROBE_TIMEOUT_S = 10.0
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy leads to 127.0.0.1


class Child:
    """A server of one task.

    Attributes:
        url: where it answers, without a path.
    """

    def __init__(self, task: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start it; it answers later, see `wait_ready`.

        Args:
            task: that it serves.
            arguments: of `jina-v4-serve`, but for the address.
            environment: all of its variables.

        Raises:
            ServeError: it would not speak HTTP.
        """
        if says_tls(arguments):
            raise ServeError("--ssl-* is not offered under Ray: this program alone calls the server, by HTTP")
        port = free_port()
        self.url = f"http://{LOCAL}:{port}"
        self._task = task
        program = (sys.executable, "-P", "-m", "jina_v4_serve.cli")
        command = [*program, task, "--host", LOCAL, "--port", str(port), "--supervised", "--verbose", *arguments]
        # Its standard input ends with this process, however that ends, and it ends with its standard input.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=sys.stderr, env=dict(environment))

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

    def wait(self) -> None:
        """Wait until it has ended."""
        self._process.wait()

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


def arguments(settings: ServerSettings, task: Task) -> list[str]:
    """Return the arguments of a replica's server."""
    options = ["--checkpoint", str(settings.checkpoints / model_name(task)), "--dtype", settings.dtype]
    if settings.max_pixels is not None:
        options += ["--max-pixels", str(settings.max_pixels)]
    if settings.num_gpus:
        for_replica = f"--api-server-count={api_processes(int(settings.num_cpus), 1)}"
    else:
        for_replica = f"--distributed-executor-backend={ONE_PROCESS}"
    return [*options, "--", for_replica, *settings.vllm_options]


def environment(settings: ServerSettings, task: Task) -> dict[str, str]:
    """Return the variables of a replica's server: it computes with the cores that Ray assigned to it."""
    found = {**os.environ, "VLLM_LOGGING_PREFIX": f"[{task}] "}
    if settings.num_gpus:
        return found
    return found | {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(max(1, int(settings.num_cpus))),
        "OMP_WAIT_POLICY": "passive",  # threads that wait leave the cores to the other replicas of the node
    }


def main() -> None:
    """Run a server for another program, see above."""
    task, *its_arguments = sys.argv[1:]
    found = dict(os.environ)
    if not found.get("CUDA_VISIBLE_DEVICES"):
        # Ray sets it to what it counts out to an actor, 1; the server knows better what its machine has.
        found.pop("OMP_NUM_THREADS", None)
        found.setdefault("OMP_WAIT_POLICY", "passive")  # as above
    try:
        child = Child(task, its_arguments, found)
        when_stdin_ends(child.stop)
        child.wait_ready()
    except ServeError as error:
        sys.exit(f"error: {error}")
    print(child.url, flush=True)  # noqa: T201 - what the other program waits for
    child.wait()


if __name__ == "__main__":
    main()
