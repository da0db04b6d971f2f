"""What the throughput benchmark counts of a server: requests, bytes and refusals, and the vectors that it compares."""

import importlib
from pathlib import Path

import numpy as np
import pytest
from conftest import Golden
from servers import Server
from wire import BOUND, TASK, TEXTS


def test_requests_are_counted_and_vectors_kept(
    wire_server: Server, golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
    sides, data = importlib.import_module("_sides"), importlib.import_module("_data")
    side = sides.Server("served", wire_server.base_url, wire_server.process.pid, 0.0, Path("none"))
    side.load(data.Inputs("some", "text", TEXTS[:4], [1] * 4, [None] * 4))
    work = side.work("dense", items_a_request=2, concurrency=2)
    assert len(work.latencies_ms) == 2
    assert work.n_refused == 0
    assert work.received_bytes > 4 * 256 * 4  # four vectors of 256 float32
    found = side.vectors()["dense"]
    for i, vector in enumerate(found):
        assert np.abs(vector - golden.rows[f"{TASK}/query/{i}/dense"]).max() <= BOUND
