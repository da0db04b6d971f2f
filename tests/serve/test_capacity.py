"""How much a server takes in before 429: so many seconds of work, of so many engines, among so many processes."""

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from jina_v4_serve.vllm_side.capacity import Capacity

LONGEST = 32768


@pytest.mark.parametrize(
    ("step", "rate", "expected"),
    [
        pytest.param(2048, 700, 65_536, id="never less than two of the longest texts"),
        pytest.param(8192, 25_000, 250_000, id="ten seconds of work"),
        pytest.param(8192, 64_000, 262_144, id="at most 32 steps"),
        pytest.param(16384, 11_700, 117_000, id="a step that is too long for the card"),
        pytest.param(8192, float("inf"), 262_144, id="a rate that nobody could measure"),
    ],
)
def test_a_server_takes_in_ten_seconds_of_work(step: int, rate: float, expected: int) -> None:
    assert Capacity(step, LONGEST).budget(rate) == expected
    assert Capacity(step, LONGEST, n_engines=8).budget(8 * rate) == 8 * expected
    assert Capacity(step, LONGEST, n_processes=4).budget(rate) == expected // 4


def test_a_rate_that_cannot_matter_is_not_measured() -> None:
    assert Capacity(2048, LONGEST).is_fixed
    assert not Capacity(4096, LONGEST).is_fixed


def test_the_second_of_two_steps_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    moments = iter((10.0, 12.0))
    monkeypatch.setattr("jina_v4_serve.vllm_side.capacity.time", SimpleNamespace(monotonic=lambda: next(moments)))

    async def embed(n_texts: int, n_tokens: int) -> None:
        asked.append((n_texts, n_tokens))

    assert asyncio.run(Capacity(4096, LONGEST, n_engines=2).measure(embed)) == 2 * 4096 / 2
    assert asked == [(16, 512)] * 2


def test_an_engine_that_fails_while_it_is_measured_gives_no_limit(caplog: pytest.LogCaptureFixture) -> None:
    async def embed(n_texts: int, n_tokens: int) -> None:
        raise RuntimeError("no")

    with caplog.at_level(logging.WARNING):
        assert asyncio.run(Capacity(4096, LONGEST).measure(embed)) == float("inf")
    assert "could not be embedded" in caplog.text


@pytest.mark.filterwarnings("ignore")  # vLLM's imports are not ours to mend
@pytest.mark.parametrize(
    ("parallel", "n_engines"),
    [
        ({}, 1),
        ({"data_parallel_size": 8}, 8),
        ({"data_parallel_size": 8, "data_parallel_external_lb": True}, 1),
        ({"data_parallel_size": 8, "data_parallel_size_local": 4, "data_parallel_hybrid_lb": True}, 4),
    ],
    ids=["one", "eight", "one of eight, behind another's balancer", "four of eight"],
)
def test_all_engines_that_a_server_feeds_count(parallel: dict[str, Any], n_engines: int) -> None:
    from jina_v4_serve.vllm_side.endpoints import capacity_of
    from vllm.config import ParallelConfig

    config = ParallelConfig()
    for name, value in parallel.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    vllm_config = SimpleNamespace(parallel_config=config, scheduler_config=SimpleNamespace(max_num_batched_tokens=8192))
    found = capacity_of(vllm_config, LONGEST, 4)
    assert (found.n_engines, found.n_processes, found.step_tokens) == (n_engines, 4, 8192)
