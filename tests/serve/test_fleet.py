"""Several servers and the gateway as one program, with servers that hold no model."""

import asyncio
import json
import signal
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import TASKS
from jina_v4_serve.errors import OptionError, PortError
from jina_v4_serve.gateway import GatewaySettings
from jina_v4_serve.launch.fleet import choose_port, serve_fleet
from jina_v4_serve.launch.server import ServerSettings
from jina_v4_serve.launch.supervisor import Policy
from servers import BIN, PATIENCE_S, free_port, lives, wait_until

pytestmark = pytest.mark.proof

FAKE = Path(__file__).parents[1] / "fake_server.py"
PROGRAM = """
    import asyncio, sys, time
    from pathlib import Path
    from jina_v4_serve.launch.fleet import run_fleet
    from jina_v4_serve.gateway import GatewaySettings
    from jina_v4_serve.launch.supervisor import Policy, Supervisor

    folder, (port, *ports), tasks = Path(sys.argv[1]), map(int, sys.argv[2].split(",")), sys.argv[3:]
    starting, servers, urls = asyncio.Lock(), {}, {}
    for described in tasks:
        (folder / described.split(":")[0]).mkdir()
    for own, described in zip(ports, tasks, strict=True):
        task, *traits = described.split(":")
        urls[task] = f"http://127.0.0.1:{own}"
        command = [sys.executable, FAKE, str(own), str(folder / task), *traits]
        policy = Policy(max_restarts=1, first_pause_s=0.1)
        servers[task] = Supervisor(task, command, urls[task], policy=policy, starting=starting)
    sys.exit(asyncio.run(run_fleet(servers, GatewaySettings(urls, port=port), time.monotonic())))
"""


class Running:
    """The program above as a process; `port` is the gateway's."""

    def __init__(self, folder: Path, *tasks: str, together: bool = False) -> None:
        self.folder = folder
        self.port, *ports = (free_port() for _ in range(1 + len(tasks)))
        program = textwrap.dedent(PROGRAM).replace("FAKE", repr(str(FAKE)))
        program = program.replace("asyncio.Lock()", "None") if together else program
        command = [sys.executable, "-c", program, str(folder), ",".join(map(str, [self.port, *ports])), *tasks]
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stderr=log)

    def ready(self) -> dict[str, str]:
        """What the gateway says of each task; nothing while it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=5) as answer:
                return json.load(answer)["tasks"]
        except urllib.error.HTTPError as error:
            with error:
                return json.load(error)["tasks"]
        except OSError:
            return {}

    def wait_for(self, wanted: dict[str, str]) -> None:
        def is_so() -> bool:
            assert self.process.poll() is None, self.end()
            return self.ready() == wanted

        wait_until(is_so, self.ready)

    def start(self, task: str) -> tuple[float, int]:
        moment, pid, *_ = (self.folder / task / "start-1").read_text().split()
        return float(moment), int(pid)

    def end(self) -> str:
        """Wait for the end; return what it wrote."""
        self.process.wait(PATIENCE_S)
        return self.log.read_text()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Start the program with servers for these tasks; the test's end is its end too, also where the test fails."""
    programs: list[Running] = []

    def start(*tasks: str, together: bool = False) -> Running:
        programs.append(Running(tmp_path, *tasks, together=together))
        return programs[-1]

    yield start
    for each in programs:
        each.process.kill()
        each.process.wait()


def test_servers_start_one_after_the_other_then_the_gateway_and_all_end_together(
    run: Callable[..., Running], tmp_path: Path
) -> None:
    running = run("retrieval:slow", "text-matching:slow", "code")
    running.wait_for(dict.fromkeys(TASKS, "ready"))
    starts = [running.start(task) for task in TASKS]
    moments = [moment for moment, _ in starts]
    assert moments[1] - moments[0] >= 1
    assert moments[2] - moments[1] >= 1
    running.process.send_signal(signal.SIGTERM)
    told = running.end()
    assert running.process.returncode == 0
    assert "the gateway answers on" in told
    ready, example = told.splitlines()[1:3]
    assert ready.startswith(f"ready on http://127.0.0.1:{running.port}/v1 after ")
    assert ready.endswith(" s")
    assert example.startswith(f"try: curl http://127.0.0.1:{running.port}/v1/embeddings ")
    assert not any(lives(pid) for _, pid in starts)
    assert all((tmp_path / task / f"signal-{int(signal.SIGTERM)}").exists() for task in TASKS)


def test_without_a_lock_all_servers_start_together(run: Callable[..., Running]) -> None:
    running = run("retrieval:waits", "text-matching:waits", "code:waits", together=True)
    running.wait_for(dict.fromkeys(TASKS, "ready"))
    running.process.send_signal(signal.SIGTERM)
    running.end()
    assert running.process.returncode == 0


def test_one_that_fails_ends_those_that_start_with_it(run: Callable[..., Running]) -> None:
    running = run("retrieval:slow", "code:broken", together=True)
    assert "error: the code server did not start; stopping the others" in running.end()
    assert running.process.returncode == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_ctrl_c_and_a_closed_terminal_end_all(
    run: Callable[..., Running], tmp_path: Path, number: signal.Signals
) -> None:
    running = run("code")
    running.wait_for({"code": "ready"})
    running.process.send_signal(number)
    running.end()
    assert running.process.returncode == 128 + number
    assert (tmp_path / "code" / f"signal-{int(signal.SIGTERM)}").exists()


def test_nohup_keeps_it_running(run: Callable[..., Running]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        running = run("code")
    finally:
        signal.signal(signal.SIGHUP, before)
    running.wait_for({"code": "ready"})
    running.process.send_signal(signal.SIGHUP)
    running.process.send_signal(signal.SIGTERM)
    running.end()
    assert running.process.returncode == 0


def test_a_server_that_does_not_start_ends_all(run: Callable[..., Running]) -> None:
    running = run("retrieval", "code:broken")
    told = running.end()
    assert running.process.returncode == 3
    assert "error: the code server did not start; stopping the others" in told
    assert not lives(running.start("retrieval")[1])


def test_a_stop_while_servers_start_ends_all(run: Callable[..., Running], tmp_path: Path) -> None:
    running = run("retrieval", "code:slow")
    wait_until((tmp_path / "code" / "start-1").exists)
    running.process.send_signal(signal.SIGTERM)
    running.end()
    assert running.process.returncode == 0
    assert not any(lives(running.start(task)[1]) for task in ("retrieval", "code"))


def test_a_server_that_cannot_be_kept_takes_only_its_own_task_away(run: Callable[..., Running]) -> None:
    running = run("retrieval", "code:mortal")
    wait_until(lambda: "error: the code server ended unexpectedly 2 times" in running.log.read_text())
    running.wait_for({"retrieval": "ready", "code": "down"})
    running.process.send_signal(signal.SIGTERM)
    running.end()
    assert running.process.returncode == 0


def test_when_no_server_can_be_kept_the_program_ends(run: Callable[..., Running]) -> None:
    running = run("code:mortal")
    assert "giving up" in running.end()
    assert running.process.returncode == 5


def test_a_second_signal_waits_for_nothing(run: Callable[..., Running], tmp_path: Path) -> None:
    running = run("code:deaf")
    running.wait_for({"code": "ready"})
    running.process.send_signal(signal.SIGTERM)
    wait_until((tmp_path / "code" / f"signal-{int(signal.SIGTERM)}").exists)
    running.process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    running.end()
    assert running.process.returncode == 0
    assert time.monotonic() - begin < Policy().stop_s / 2


def test_a_server_has_its_own_port_or_else_a_free_one() -> None:
    port = free_port()
    assert choose_port(port, set()) == port
    assert choose_port(port, {port}) != port


def test_a_port_in_use_is_told_before_anything_is_started(tmp_path: Path) -> None:
    with pytest.raises(PortError, match=r"127\.0\.0\.1:0: a port is 1 to 65535"):
        asyncio.run(serve_fleet(ServerSettings("", tmp_path), GatewaySettings(port=0)))


def test_tls_is_not_the_servers_where_a_gateway_stands_before_them(tmp_path: Path) -> None:
    common = ServerSettings("", tmp_path, vllm_options=("--ssl_certfile=c.pem", "--ssl-keyfile=k.pem"))
    with pytest.raises(OptionError, match="Put an HTTPS proxy in front of it"):
        asyncio.run(serve_fleet(common, GatewaySettings(port=free_port())))


def test_missing_checkpoints_are_named(tmp_path: Path) -> None:
    command = [BIN / "jina-v4-serve", "all", "--checkpoints", tmp_path, "--port", str(free_port())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: no such folder: {tmp_path}/jina-embeddings-v4-retrieval.")


def test_the_help_lists_every_command() -> None:
    done = subprocess.run([BIN / "jina-v4-serve", "-h"], capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    for name in (*TASKS, "all", "gateway"):
        assert f" {name} " in done.stdout
