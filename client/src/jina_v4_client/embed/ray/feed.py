"""What waits to be embedded: an actor that keeps each call until it is answered, and the source that reads from it.

Calls are numbered. Whoever reads anew, because a machine was lost, gets every call under its number once more, but for
those that are answered: an empty one stands in their place. So nothing is lost, and what is answered is not done again.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow  # type: ignore[import-untyped] # it has no types
import ray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

_ANSWERED = b""


class Feed:
    """The calls that are not answered yet, as pickles; an asynchronous actor."""

    def __init__(self) -> None:
        self._calls: dict[int, bytes] = {}
        self._tries: Counter[int] = Counter()
        self._answered_to = 0  # all before this are answered
        self._answered: set[int] = set()  # and these beyond it
        self._ended = False
        self._changed = asyncio.Condition()

    async def put(self, number: int, call: bytes) -> None:
        """Take in a call."""
        async with self._changed:
            self._calls[number] = call
            self._changed.notify_all()

    async def begin(self, number: int) -> int:
        """Note that a worker begins with a call; give how many have."""
        self._tries[number] += 1
        return self._tries[number]

    async def answered(self, number: int) -> None:
        """Forget a call."""
        self._calls.pop(number, None)
        self._tries.pop(number, None)
        self._answered.add(number)
        while self._answered_to in self._answered:
            self._answered.remove(self._answered_to)
            self._answered_to += 1

    async def end(self) -> None:
        """There will be no more."""
        async with self._changed:
            self._ended = True
            self._changed.notify_all()

    async def take(self, number: int) -> bytes | None:
        """Give a call once it is there; what is answered is empty, behind the last is None."""

        def found() -> bool:
            return self._ended or number in self._calls or self._is_answered(number)

        async with self._changed:
            await self._changed.wait_for(found)
        if number in self._calls:
            return self._calls[number]
        return _ANSWERED if self._is_answered(number) else None

    def _is_answered(self, number: int) -> bool:
        return number < self._answered_to or number in self._answered


class Source(Datasource):
    """The calls of a feed as a dataset that ends with it: a block each."""

    def __init__(self, feed: Any) -> None:
        self._feed = feed

    def estimate_inmemory_data_size(self) -> int | None:
        """Nobody knows."""
        return None

    def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
        """Read in one task, as the order is that of the numbers."""
        feed = self._feed

        def read() -> Iterator[Any]:
            number = 0
            while (call := ray.get(feed.take.remote(number))) is not None:
                if call != _ANSWERED:
                    yield block({"number": number, "call": call})
                number += 1

        unknown = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [ReadTask(read, unknown)]


def block(row: Mapping[str, object]) -> Any:
    """Make a block of one row."""
    return pyarrow.table({name: [value] for name, value in row.items()})
