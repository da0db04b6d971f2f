"""When an engine counts as hung: the rule on a clock of the test's own, and the heartbeat between real processes."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from jina_v4_serve import heartbeat
from jina_v4_serve.api.liveness import CEILING_S, FLOOR_S, Liveness, bound_s
from jina_v4_serve.heartbeat import Heartbeat

SET_S = 30


@pytest.fixture
def beating(monkeypatch: pytest.MonkeyPatch) -> Iterator[Heartbeat]:
    """A heartbeat that has beaten once."""
    with monkeypatch.context() as environment:
        environment.setenv(heartbeat.HEARTBEAT, "")
        heartbeat.create()
        found = heartbeat.find()
        assert found is not None
        assert (found.last, found.hung) == (0, False)
        found.beat()
        yield found


class Process:
    """An API process: its watch, on a clock that the test moves."""

    def __init__(self, beating: Heartbeat | None) -> None:
        self.heartbeat = beating
        self.n_waiting = 0
        self.watch = Liveness(beating, lambda: self.n_waiting)
        self.now_s = self.watch._seen_at

        async def embed(_: str) -> Sequence[Any]:
            return [SimpleNamespace(n_tokens=120)]

        async def start() -> None:
            await self.watch.start(embed, 2048, SET_S)

        asyncio.run(start())

    def tick(self, n_seconds: int, *, waiting: int, step: float = 1.0) -> None:
        self.n_waiting = waiting
        for _ in range(n_seconds):
            self.now_s += step
            assert self.heartbeat is not None
            self.watch.look(self.heartbeat, self.now_s)


@pytest.mark.parametrize(
    ("ms_a_token", "step_tokens", "expected_s"),
    [
        pytest.param(0.2, 16384, FLOOR_S, id="a GPU"),
        pytest.param(0.3, 2048, FLOOR_S, id="the stand-in on a CPU"),
        pytest.param(75, 2048, 1536, id="two slow cores"),
        pytest.param(400, 2048, CEILING_S, id="slower than any that is known"),
    ],
)
def test_the_bound_is_ten_full_steps_of_this_machine(ms_a_token: float, step_tokens: int, expected_s: float) -> None:
    assert bound_s(ms_a_token / 1000, step_tokens) == pytest.approx(expected_s)


def test_an_engine_that_finishes_no_step_of_its_work_is_hung(beating: Heartbeat) -> None:
    process = Process(beating)
    process.tick(SET_S, waiting=1)
    assert process.watch.failure is None
    process.tick(2, waiting=1)
    assert process.watch.failure == "the engine has work, and has finished no step of it for 30 s"


def test_an_idle_engine_is_alive(beating: Heartbeat) -> None:
    process = Process(beating)
    process.tick(10_000, waiting=0)
    assert process.watch.failure is None


def test_hours_of_work_are_no_hang_while_steps_are_finished(beating: Heartbeat) -> None:
    """A prompt of 32,768 tokens, a batch of pictures, or another process's requests before this one's."""
    process = Process(beating)
    for _ in range(400):
        process.tick(SET_S, waiting=1)
        beating.beat()
    assert process.watch.failure is None


@pytest.mark.parametrize("late_s", [5.0, 3600.0], ids=["overloaded", "suspended"])
def test_time_in_which_the_watch_itself_did_not_run_hardly_counts(beating: Heartbeat, late_s: float) -> None:
    process = Process(beating)
    process.tick(2, waiting=1)
    process.tick(SET_S // 2 - 1, waiting=1, step=late_s)
    assert process.watch.failure is None


def test_clients_that_give_up_do_not_hide_a_hang(beating: Heartbeat) -> None:
    process = Process(beating)
    for _ in range(SET_S):
        process.tick(1, waiting=1)
        process.tick(20, waiting=0)
    assert process.watch.failure is None
    process.tick(2, waiting=1)
    assert process.watch.failure is not None


def test_every_api_process_knows_the_verdict_of_one_and_a_beat_takes_it_back(beating: Heartbeat) -> None:
    busy, idle = Process(beating), Process(heartbeat.find())
    busy.tick(SET_S + 2, waiting=1)
    idle.tick(SET_S + 2, waiting=0)
    assert None not in (busy.watch.failure, idle.watch.failure)
    beating.beat()
    for process in (busy, idle):
        process.tick(1, waiting=1)
        assert process.watch.failure is None


def test_an_engine_that_never_beat_is_not_watched() -> None:
    process = Process(None)
    assert process.watch.failure is None
    assert process.watch._task is None


def test_a_machine_whose_speed_is_not_known_gets_the_longest_bound(beating: Heartbeat) -> None:
    async def fails(_: str) -> Sequence[Any]:
        raise RuntimeError("not finite")

    watch = Liveness(beating, lambda: 0)
    asyncio.run(watch.start(fails, 2048, None))
    assert watch.bound_s == CEILING_S


def test_a_beat_in_another_process_is_seen_in_this_one(beating: Heartbeat) -> None:
    before = beating.last
    program = "from jina_v4_serve import heartbeat; heartbeat.find().beat()"
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ)
    assert beating.last > before


def test_without_the_launcher_there_is_no_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(heartbeat.HEARTBEAT, raising=False)
    assert heartbeat.find() is None
    monkeypatch.setenv(heartbeat.HEARTBEAT, "/proc/0/fd/0")
    assert heartbeat.find() is None
