"""The supervisor, with real processes that answer /health and hold no model."""

import asyncio
import itertools
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jina_v4_serve.launch.server import Launch, server_url
from jina_v4_serve.launch.supervisor import Policy, Supervisor
from servers import PATIENCE_S, free_port, lives, wait_until

pytestmark = pytest.mark.long

FAKE = Path(__file__).parents[1] / "fake_server.py"
Make = Callable[..., Supervisor]
QUICK = Policy(max_restarts=2, first_pause_s=0.1, unhealthy_s=1.0, stop_s=2.0)
IMPATIENT = replace(QUICK, silent_s=2.0, answer_s=1.0)  # on a busy machine a live server is as slow


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make(*traits: str, policy: Policy = QUICK, starting: asyncio.Lock | None = None, name: str = "") -> Supervisor:
        port = free_port()
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        command = [sys.executable, str(FAKE), str(port), str(folder), *traits]
        return Supervisor("fake", command, f"http://127.0.0.1:{port}", policy=policy, starting=starting)

    return make


def starts(folder: Path) -> list[list[float]]:
    """When each start was, and the processes that it made."""
    return [[float(part) for part in path.read_text().split()] for path in sorted(folder.glob("start-*"))]


def all_gone(folder: Path) -> bool:
    pids = [int(pid) for _, *pids in starts(folder) for pid in pids]
    wait_until(lambda: not any(map(lives, pids)))
    return bool(pids)


async def started(supervisor: Supervisor) -> asyncio.Task[int]:
    task = asyncio.create_task(supervisor.run())
    await supervisor.ready.wait()
    return task


async def test_a_server_that_never_was_ready_is_not_started_again(make: Make, tmp_path: Path) -> None:
    assert await make("broken").run() == 3
    assert len(starts(tmp_path)) == 1


async def test_another_program_on_the_port_is_never_taken_for_the_server(
    make: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    supervisor = make("another")
    assert await supervisor.run() == 137
    assert not supervisor.ready.is_set()
    assert capfd.readouterr().err == (
        f"error: another program answers on {supervisor.url}, so the fake server ends. "
        "Stop that program, or choose another port with --port\n"
    )
    assert len(starts(tmp_path)) == 1
    assert all_gone(tmp_path)


async def test_a_command_that_is_killed_while_it_starts_gives_128_and_the_signal() -> None:
    command = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    assert await Supervisor("fake", command, f"http://127.0.0.1:{free_port()}").run() == 137


async def test_a_server_that_keeps_failing_is_started_again_a_few_times_and_then_given_up(
    make: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert await make("mortal").run() == 5
    assert len(starts(tmp_path)) == 3
    told = capfd.readouterr().err.splitlines()
    assert told[-1] == (
        "error: the fake server ended unexpectedly 3 times within 600 s, the last time with exit code 5: giving up"
    )
    assert [line.startswith("the fake server ended unexpectedly (exit code 5)") for line in told[:-1]] == [True, True]
    assert all_gone(tmp_path)


async def test_pauses_between_restarts_grow(make: Make, tmp_path: Path) -> None:
    supervisor = make("mortal", "broken-later", policy=Policy(max_restarts=3, first_pause_s=0.5))
    assert await supervisor.run() == 3
    moments = [moment for moment, *_ in starts(tmp_path)]
    pauses = [b - a for a, b in pairwise(moments[1:])]  # between starts that failed at once
    print(f"pauses: {pauses}")
    assert pauses[0] >= 1
    assert pauses[1] >= 2


async def test_restarts_long_ago_do_not_count(make: Make, tmp_path: Path) -> None:
    supervisor = make("mortal", policy=Policy(max_restarts=1, window_s=0.2, first_pause_s=0.1))

    task = asyncio.create_task(supervisor.run())
    while len(starts(tmp_path)) < 4:
        await asyncio.sleep(0.05)
    supervisor.stop()
    assert await task == 0


async def test_a_server_that_is_killed_comes_back_whole(make: Make, tmp_path: Path) -> None:
    supervisor = make()
    task = await started(supervisor)
    os.kill(int(starts(tmp_path)[0][1]), signal.SIGKILL)
    while supervisor.n_restarts == 0 or not supervisor.ready.is_set():
        await asyncio.sleep(0.02)
    first, second = starts(tmp_path)
    assert not lives(int(first[2]))  # what the first one had started is gone
    assert all(map(lives, map(int, second[1:])))
    supervisor.stop()
    assert await task == 0
    assert all_gone(tmp_path)


@pytest.mark.parametrize(
    ("trait", "reason"),
    [
        ("sick", "the fake server has only failed for 1 s, and is killed\n"),
        ("hung", "the fake server is hung, and is killed: no step for 9 s\n"),
        ("mute", "the fake server has not answered for 3 s, and is killed\n"),
    ],
)
async def test_a_server_that_does_not_work_any_more_is_started_again(
    make: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str], trait: str, reason: str
) -> None:
    assert await make(trait, policy=IMPATIENT if trait == "mute" else QUICK).run() == 137
    assert len(starts(tmp_path)) == 3
    assert capfd.readouterr().err.count(reason) == 3
    assert all_gone(tmp_path)


async def test_one_failure_after_the_machine_was_suspended_kills_no_server(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = make("sick-once")
    task = await started(supervisor)
    hours = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: 3600.0 * next(hours))
    monkeypatch.setattr("jina_v4_serve.launch.supervisor.time", clock)
    while not (tmp_path / "well").exists() and not supervisor.n_restarts:
        await asyncio.sleep(0.02)
    assert supervisor.n_restarts == 0
    supervisor.stop()
    assert await task == 0


async def test_a_server_is_not_killed_because_this_process_has_no_more_files(make: Make, tmp_path: Path) -> None:
    """As under `all`, whose gateway has a file for each connection."""
    supervisor = make()
    task = await started(supervisor)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # those that are open stay open
    try:
        await asyncio.sleep(3 * QUICK.unhealthy_s)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (supervisor.ready.is_set(), supervisor.n_restarts) == (True, 0)
    supervisor.stop()
    assert await task == 0
    assert len(starts(tmp_path)) == 1


async def test_a_ready_server_is_asked_to_finish_and_nothing_is_left(make: Make, tmp_path: Path) -> None:
    supervisor = make()
    task = await started(supervisor)
    supervisor.stop()
    assert await task == 0
    assert (tmp_path / f"signal-{int(signal.SIGTERM)}").exists()
    assert all_gone(tmp_path)


async def test_a_starting_server_is_ended_at_once(make: Make, tmp_path: Path) -> None:
    supervisor = make("slow")
    task = asyncio.create_task(supervisor.run())
    while not starts(tmp_path):
        await asyncio.sleep(0.02)
    supervisor.stop()
    assert await task == 0
    assert all_gone(tmp_path)


@pytest.mark.parametrize("times", [1, 2])
async def test_a_server_that_does_not_listen_is_killed(make: Make, tmp_path: Path, times: int) -> None:
    supervisor = make("deaf", policy=QUICK if times == 1 else Policy())
    task = await started(supervisor)
    for _ in range(times):
        supervisor.stop()
    assert await task == 0
    assert all_gone(tmp_path)


async def test_a_pause_ends_when_told_to_stop(make: Make) -> None:
    supervisor = make("mortal", policy=Policy(first_pause_s=600, longest_pause_s=600))
    task = await started(supervisor)
    await asyncio.sleep(1.5)
    supervisor.stop()
    assert await task == 0


async def test_servers_that_share_a_lock_start_one_after_the_other(make: Make, tmp_path: Path) -> None:
    starting = asyncio.Lock()
    supervisors = [make("slow", starting=starting, name=name) for name in ("one", "two")]
    both = asyncio.gather(*(supervisor.run() for supervisor in supervisors))
    await asyncio.gather(*(supervisor.ready.wait() for supervisor in supervisors))
    for supervisor in supervisors:
        supervisor.stop()
    assert max(await both) == 0
    (one,), (two,) = starts(tmp_path / "one"), starts(tmp_path / "two")
    assert two[0] - one[0] >= 1


async def test_a_restart_that_hangs_is_killed_and_holds_no_other_server_up(
    make: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    policy = replace(QUICK, max_restarts=1, start_s=2.0)

    starting = asyncio.Lock()
    hanging = make("mortal", "stuck-later", name="one", policy=policy, starting=starting)
    task = await started(hanging)
    while not hanging.n_restarts:
        await asyncio.sleep(0.02)
    other = make(name="two", starting=starting)
    await started(other)
    other.stop()
    assert await task == 137
    assert "the fake server is not ready 2 s after its start, and is killed\n" in capfd.readouterr().err
    assert all_gone(tmp_path / "one")


async def test_a_first_start_that_takes_long_is_told_once_and_goes_on(
    make: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    supervisor = make("slow", policy=replace(QUICK, start_s=0.1))
    task = await started(supervisor)
    supervisor.stop()
    assert await task == 0
    assert len(starts(tmp_path)) == 1
    assert capfd.readouterr().err.count("the fake server is not ready 0.1 s after its start; see its log") == 1


@pytest.mark.parametrize("was_ready", [True, False])
async def test_a_process_that_cannot_be_made_is_a_start_that_failed(
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    was_ready: bool,
) -> None:
    """The limit of processes is reached, or memory is short, for a while."""
    real, succeeds = asyncio.create_subprocess_exec, iter([True, False, True] if was_ready else [False])

    async def limited(*arguments: Any, **options: Any) -> asyncio.subprocess.Process:
        if next(succeeds):
            return await real(*arguments, **options)
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", limited)

    supervisor = make("mortal")
    task = asyncio.create_task(supervisor.run())
    if was_ready:
        while supervisor.n_restarts < 2:
            await asyncio.sleep(0.02)
        await supervisor.ready.wait()
        supervisor.stop()
    assert await task == (0 if was_ready else 1)
    message = (
        "error: the process of the fake server could not be started: [Errno 11] Resource temporarily unavailable\n"
    )
    assert capfd.readouterr().err.count(message) == 1


def test_nothing_outlives_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    port = free_port()
    program = f"""
        import asyncio, sys
        from jina_v4_serve.launch.supervisor import Supervisor
        command = [sys.executable, {str(FAKE)!r}, "{port}", {str(tmp_path)!r}]
        asyncio.run(Supervisor("fake", command, "http://127.0.0.1:{port}").run())
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)])
    wait_until(lambda: starts(tmp_path))
    parent.kill()
    parent.wait()
    begin = time.monotonic()
    assert all_gone(tmp_path)
    print(f"all gone after {time.monotonic() - begin:.2f} s")


def test_a_full_disk_under_the_log_stops_no_restart(tmp_path: Path) -> None:
    port = free_port()
    program = f"""
        import asyncio, sys
        from jina_v4_serve.launch.supervisor import Policy, Supervisor
        command = [sys.executable, {str(FAKE)!r}, "{port}", {str(tmp_path)!r}, "mortal"]
        policy = Policy(max_restarts=2, first_pause_s=0.1)
        sys.exit(asyncio.run(Supervisor("fake", command, "http://127.0.0.1:{port}", policy=policy).run()))
    """
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)], stdout=full, stderr=full, timeout=PATIENCE_S
        )
    assert len(starts(tmp_path)) == 3
    assert done.returncode != 0


@pytest.mark.parametrize(
    ("host", "options", "expected"),
    [
        ("127.0.0.1", (), "http://127.0.0.1:8001"),
        ("0.0.0.0", (), "http://127.0.0.1:8001"),  # noqa: S104 - nothing listens
        ("::", (), "http://[::1]:8001"),
        ("localhost", ("--ssl_certfile=x",), "https://localhost:8001"),
    ],
)
def test_a_server_is_watched_at_an_address_that_reaches_it(host: str, options: tuple[str, ...], expected: str) -> None:
    assert server_url(host, 8001, options) == expected


def test_a_module_in_the_working_folder_does_not_run_in_place_of_ours(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit(77)")
    command = Launch(("model",), ("--host=0.0.0.0",), {}, "", "").command
    environment = {**os.environ, "PATH": "/usr/bin:/bin"}
    done = subprocess.run([*command[:-2], "no json", "[]"], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 1
    assert b"JSONDecodeError" in done.stderr
