"""benchmarks/soak.py: what it computes, and a quarter of a minute of it against a real server."""

import argparse
import asyncio
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from servers import Server
from wire import TASK

pytestmark = pytest.mark.long


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of benchmarks/, which is a folder of scripts."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
    return importlib.import_module


def test_a_line_has_its_slope_an_hour(module: Any) -> None:
    line = module("soak").fit([0.0, 60.0, 120.0, 180.0], [5.0, 6.0, 7.0, 8.0])
    assert line.per_h == pytest.approx(60)
    assert line.error_per_h == pytest.approx(0, abs=1e-9)
    scattered = module("soak").fit([0.0, 60.0, 120.0, 180.0], [5.0, 7.0, 6.0, 8.0])
    assert (scattered.per_h, scattered.error_per_h) == (pytest.approx(48), pytest.approx(60 * (1.8 / 2 / 5) ** 0.5))


@pytest.mark.parametrize("times", [[], [1.0, 2.0], [3.0, 3.0, 3.0]])
def test_no_slope_is_given_for_too_few_points(module: Any, times: list[float]) -> None:
    assert module("soak").fit(times, times) is None


@pytest.mark.parametrize(
    ("kind", "outcome", "expected"),
    [
        ("text 16", "200", True),
        ("text 16", "429", True),
        ("text 16", "422", False),
        ("text 16", "503", False),
        ("text 16", "no answer", False),
        ("bad", "422", True),
        ("bad", "200", False),
        ("bad", "500", False),
        ("hung up", "left", True),
        ("hung up", "500", False),
    ],
)
def test_what_may_come_of_a_request_is_known(module: Any, kind: str, outcome: str, expected: bool) -> None:
    assert module("_traffic")._is_expected(kind, outcome) == expected


def test_a_real_server_takes_the_mixed_load(
    module: Any, wire_server: Server, folded: Callable[[str], Path], tmp_path: Path
) -> None:
    options = argparse.Namespace(minutes=0.25, warm_up=0.1, rate=4.0, share=None, seed=1, results=tmp_path)
    checkpoint = folded("float32") / f"jina-embeddings-v4-{TASK}"
    soak = module("soak").soak(wire_server.base_url, wire_server.process.pid, checkpoint, options, {})
    measured = asyncio.run(soak)
    assert measured["unexpected"] == {}, measured["messages"]
    assert measured["n_vectors_wrong"] == 0
    assert measured["n_vectors_compared"] > 20
    assert measured["largest_difference"] <= 1e-5
    roles = {row["role"]: row for row in measured["processes"]}
    assert {f"{TASK} API server", f"{TASK} engine", "supervisor and gateway"} <= roles.keys()
    assert roles[f"{TASK} engine"]["anonymous_mib"]["last"] > 100
