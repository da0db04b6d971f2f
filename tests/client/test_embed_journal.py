"""The journal of `jina-v4-embed` where a step to the disk fails: what is kept later is what it says it is."""

import errno
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jina_v4_client.embed.errors import StoppedError
from jina_v4_client.embed.journal import Journal, Settled
from numpy.typing import NDArray

WIDTH = 8


class FullAfter:
    """A file on a disk that is full once some bytes are written."""

    def __init__(self, file: Any, n_bytes: int) -> None:
        self._file, self._left = file, n_bytes

    def write(self, content: memoryview) -> int:
        if not self._left:
            raise OSError(errno.ENOSPC, "No space left on device")
        n_written: int = self._file.write(content[: self._left])
        self._left -= n_written
        return n_written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path, "float32") as made:
        yield made


def vector(value: float) -> NDArray[np.float32]:
    return np.full(WIDTH, value, np.float32)


def record(journal: Journal, number: int) -> None:
    digest = bytes([number])
    journal.record({digest: vector(number)}, [Settled(number, f"row {number}", digest)])


def kept(journal: Journal) -> dict[int, NDArray[np.generic]]:
    return {row.number: journal.vectors([row.span])[0] for row in journal.recorded() if row.span is not None}


def check(journal: Journal, *numbers: int) -> None:
    found = kept(journal)
    assert list(found) == list(numbers)
    for number in numbers:
        np.testing.assert_array_equal(found[number], vector(number))


@pytest.mark.parametrize("n_bytes", [0, 5, WIDTH * 4 - 1])
def test_what_comes_after_an_append_that_broke_off_is_in_its_place(
    n_bytes: int, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the disk is full, and the batches in flight, which are kept all the same, are smaller."""
    record(journal, 1)
    with monkeypatch.context() as patch:
        patch.setattr(journal, "_file", FullAfter(journal._file, n_bytes))
        with pytest.raises(StoppedError, match="No space left on device"):
            record(journal, 2)
    record(journal, 3)
    check(journal, 1, 3)


def test_what_comes_after_a_transaction_that_failed_is_in_its_place(journal: Journal, tmp_path: Path) -> None:
    record(journal, 1)
    before = journal._database

    class Failing:
        def __getattr__(self, name: str) -> Any:
            return getattr(before, name)

        def __enter__(self) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        def __exit__(self, *_: object) -> None:
            pass

    journal._database = Failing()  # type: ignore[assignment]
    with pytest.raises(StoppedError, match="disk is full"):
        record(journal, 2)
    journal._database = before
    record(journal, 3)
    check(journal, 1, 3)


def test_what_a_killed_run_left_behind_the_last_vector_is_cut_off(tmp_path: Path) -> None:
    with Journal(tmp_path, "float32") as journal:
        record(journal, 1)
    with (tmp_path / "vectors.bin").open("ab") as file:
        file.write(b"half of a vector")
    with Journal(tmp_path, "float32") as journal:
        assert (tmp_path / "vectors.bin").stat().st_size == WIDTH * 4
        record(journal, 2)
        check(journal, 1, 2)
