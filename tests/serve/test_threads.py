"""Short work of a request stays in the event loop; long work leaves it."""

import asyncio
import threading

import pytest
from jina_v4_serve.api.threads import SHORT_BYTES, run


@pytest.mark.parametrize(("n_bytes", "stays"), [(0, True), (SHORT_BYTES, True), (SHORT_BYTES + 1, False)])
def test_long_work_runs_in_a_thread(n_bytes: int, stays: bool) -> None:
    async def ident() -> bool:
        return await run(n_bytes, threading.get_ident) == threading.get_ident()

    assert asyncio.run(ident()) == stays


@pytest.mark.parametrize("n_bytes", [1, 2 * SHORT_BYTES])
def test_arguments_results_and_errors_pass_through(n_bytes: int) -> None:
    assert asyncio.run(run(n_bytes, divmod, 7, 2)) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(run(n_bytes, divmod, 7, 0))
