"""When a rate counts as held, and which rate is the goodput: what benchmarks/goodput.py decides, without a server."""

import importlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def goodput(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("goodput")


def test_one_slow_request_of_a_hundred_is_allowed_and_two_are_not(goodput: Any) -> None:
    assert goodput.is_held([900.0] + [10.0] * 99, n_failed=0, bound_ms=50)
    assert not goodput.is_held([900.0] * 2 + [10.0] * 98, n_failed=0, bound_ms=50)


def test_of_few_requests_the_slowest_decides(goodput: Any) -> None:
    assert goodput.is_held([10.0, 50.0, 20.0], n_failed=0, bound_ms=50)
    assert not goodput.is_held([10.0, 50.1, 20.0], n_failed=0, bound_ms=50)


def test_one_failure_is_too_many_however_fast_the_others_were(goodput: Any) -> None:
    assert not goodput.is_held([1.0] * 10_000, n_failed=1, bound_ms=50)


def test_a_rate_at_which_nothing_was_answered_is_not_held(goodput: Any) -> None:
    assert not goodput.is_held([], n_failed=0, bound_ms=50)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([(30.0, True), (50.0, True), (70.0, False)], 50.0),
        ([(70.0, False), (30.0, True), (50.0, True)], 50.0),
        ([(30.0, True), (50.0, False), (70.0, True)], 30.0),
        ([(30.0, True), (50.0, True), (50.0, False)], 30.0),
        ([(30.0, True), (50.0, True)], 50.0),
        ([(30.0, False), (50.0, True)], None),
        ([], None),
    ],
    ids=["the-highest", "any-order", "luck-above", "twice-the-worse-counts", "all", "not-even-the-lowest", "no-rates"],
)
def test_the_goodput_is_the_highest_rate_below_the_first_that_was_not_held(
    goodput: Any, rates: list[tuple[float, bool]], expected: float | None
) -> None:
    assert goodput.goodput(rates) == expected


def test_arrivals_have_the_rate_that_was_asked_for_and_come_in_clusters(goodput: Any) -> None:
    times = goodput.arrival_times(200, 10, seed=1)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert len(times) == 2000
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] <= 10
    # Of exponential gaps 1 - 1/e are shorter than their mean; of even ones none or all.
    assert sum(gap < 10 / 2000 for gap in gaps) / len(gaps) == pytest.approx(0.632, abs=0.04)


def test_arrivals_are_the_same_for_the_same_seed_alone(goodput: Any) -> None:
    assert goodput.arrival_times(50, 2, seed=3) == goodput.arrival_times(50, 2, seed=3)
    assert goodput.arrival_times(50, 2, seed=3) != goodput.arrival_times(50, 2, seed=4)


def test_the_slowest_server_is_still_asked_once(goodput: Any) -> None:
    assert len(goodput.arrival_times(0.01, 2, seed=0)) == 1
