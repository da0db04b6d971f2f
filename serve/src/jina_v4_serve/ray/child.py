"""`jina-v4-serve` as a child process, on a free port of 127.0.0.1. It ends with the process that started it.

`python -m jina_v4_serve.ray.child TASK ARGUMENT...` is for programs that do not import this package, such as
`jina-v4-embed --ray`. It prints the server's address when it is ready, and ends with the server or with standard input.
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
        url: its address, without a path.
    """

    def __init__(self, task: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the server; `wait_ready` waits until it answers.

        Args:
            task: of the server.
            arguments: of `jina-v4-serve`, except the address.
            environment: all variables of the process.

        Raises:
            ServeError: the arguments are for HTTPS.
        """
        if says_tls(arguments):
            raise ServeError("--ssl-* is not offered under Ray: only this program calls the server, by HTTP")
        port = free_port()
        self.url = f"http://{LOCAL}:{port}"
        self._task = task
        program = (sys.executable, "-P", "-m", "jina_v4_serve.cli")
        command = [*program, task, "--host", LOCAL, "--port", str(port), "--supervised", "--verbose", *arguments]
        # Its standard input ends when this process ends for any reason, and then the server ends too.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=sys.stderr, env=dict(environment))

    def wait_ready(self) -> None:
        """Wait until the server is ready, without a time limit.

        Raises:
            ServeError: the server ended.
        """
        while not self._answers():
            if (code := self._process.poll()) is not None:
                raise ServeError(
                    f"the {self._task} server ended with exit code {code} before it was ready; see its log"
                )
            time.sleep(_POLL_S)

    def wait(self) -> None:
        """Wait until the server has ended."""
        self._process.wait()

    def stop(self) -> None:
        """Stop the server and wait until it has ended, so that its GPU memory is free."""
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
        vllm_option = f"--api-server-count={api_processes(int(settings.num_cpus), 1)}"
    else:
        vllm_option = f"--distributed-executor-backend={ONE_PROCESS}"
    return [*options, "--", vllm_option, *settings.vllm_options]


def environment(settings: ServerSettings, task: Task) -> dict[str, str]:
    """Return the variables of a replica's server, which computes on the cores that Ray assigned to it."""
    variables = {**os.environ, "VLLM_LOGGING_PREFIX": f"[{task}] "}
    if settings.num_gpus:
        return variables
    return variables | {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(max(1, int(settings.num_cpus))),
        "OMP_WAIT_POLICY": "passive",  # waiting threads do not block the other replicas of the node
    }


def main() -> None:
    """Run a server for another program, as described above."""
    task, *server_arguments = sys.argv[1:]
    variables = dict(os.environ)
    if not variables.get("CUDA_VISIBLE_DEVICES"):
        # Ray sets it to the cores of an actor, 1; the server chooses a better number for its machine.
        variables.pop("OMP_NUM_THREADS", None)
        variables.setdefault("OMP_WAIT_POLICY", "passive")  # as above
    try:
        child = Child(task, server_arguments, variables)
        when_stdin_ends(child.stop)
        child.wait_ready()
    except ServeError as error:
        sys.exit(f"error: {error}")
    print(child.url, flush=True)  # noqa: T201 - the other program reads it
    child.wait()


if __name__ == "__main__":
    main()
