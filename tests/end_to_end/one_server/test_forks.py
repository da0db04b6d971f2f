"""Forked workers of a real server and gateway: each vector is that of its own text."""

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Figure
from jina_v4_client import EmbeddingsClient
from near import largest_difference
from servers import Server, gateway_server
from wire import TASK

pytestmark = pytest.mark.long

WORKERS, CALLS = 8, 125
TEXTS = [f"sentence number {number} of the parent" for number in range(16)]


@pytest.fixture(params=["server", "gateway"])
def address(request: pytest.FixtureRequest, wire_server: Server, tmp_path: Path) -> Iterator[str]:
    if request.param == "server":
        yield wire_server.base_url
        return
    with gateway_server({TASK: wire_server.base_url}, tmp_path / "log") as gateway:
        yield gateway.base_url


def work(client: EmbeddingsClient, expected: Any, first: int, outcomes: Any) -> None:
    wrong, errors = 0, []
    for call in range(CALLS):
        place = (first + call) % len(TEXTS)
        try:
            wrong += largest_difference([client.encode_text(TEXTS[place])], [expected[place]]) > 1e-5
        except Exception as error:
            errors.append(repr(error))
    outcomes.put((wrong, errors))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # that is the point here
def test_a_thousand_calls_of_forked_workers_are_all_right(address: str, figure: Figure) -> None:
    """The parent has used the client before: with shared connections 16 of 108 vectors were another's."""
    context = multiprocessing.get_context("fork")
    outcomes = context.SimpleQueue()
    with EmbeddingsClient(address, task=TASK) as client:
        expected = client.encode_text(TEXTS, return_numpy=True)  # (n, dim)
        client.encode_text("the connection is warm")
        workers = [context.Process(target=work, args=(client, expected, n, outcomes)) for n in range(WORKERS)]
        for worker in workers:
            worker.start()
        found = [outcomes.get() for _ in workers]
        for worker in workers:
            worker.join(60)
        assert np.abs(client.encode_text(TEXTS[0]) - expected[0]).max() <= 1e-5
    assert found == [(0, [])] * WORKERS
    figure(f"{WORKERS * CALLS} calls of {WORKERS} forked workers, none wrong, no error")
