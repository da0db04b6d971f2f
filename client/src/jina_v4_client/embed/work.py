"""The work: rows are read, equal content is found, batches are embedded by several requests at once, results are kept.

One thread reads rows and writes the journal; the workers only ask the server. Whatever is finished is in the journal
before the worker that finished it gets more to do: a kill costs what the requests in flight hold and nothing else.
"""

import queue
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from jina_v4_client.embed.content import Content, Kind, Row
from jina_v4_client.embed.encoder import Encode, Vector
from jina_v4_client.embed.errors import RowError, StoppedError
from jina_v4_client.embed.journal import Journal, Settled
from jina_v4_client.errors import ArgumentError, JinaV4Error, ServerError, ServerFailedError, ServerRefusedError

_LOOKED_UP = 1024  # rows of which it is asked at once whether they are done
_SETTLED = 1024  # rows without new vectors (copies, failures) that are kept at once
_REFUSALS = (400, 413, 415, 422)  # what a server answers because of an item
_INTERNAL = 500
_PLACE = re.compile(r"^(texts|images|input)\[0\]( \([^)]*\))?: ")  # in a message about a request of one item


@dataclass(frozen=True)
class Settings:
    """How the work is shared out.

    Attributes:
        workers: requests in flight.
        batch_sizes: items a request, by kind.
        skip: whether rows that cannot be embedded are passed over.
    """

    workers: int
    batch_sizes: dict[Kind, int]
    skip: bool

    @property
    def max_open(self) -> int:
        """How many rows may be read and not done: one that waits long must not let all others into memory."""
        return 4 * self.workers * max(self.batch_sizes.values()) + 1024


@dataclass
class _Open:
    """Content that is waiting or in flight, and the rows that have it."""

    content: Content
    rows: list[tuple[int, str]]


@dataclass(frozen=True)
class _Result:
    """What became of a batch: for each item vectors or an error, or what stops everything."""

    batch: list[_Open]
    vectors: list[Vector | JinaV4Error] = field(default_factory=list)
    fatal: BaseException | None = None


class Work:
    """Embeds the rows that are not in the journal yet, and puts them there.

    Args:
        compare: whether to compare the content of rows that are done with what it was then.
        on_progress: called with the number of rows that were done since the last call.
    """

    def __init__(
        self,
        encode: Encode,
        journal: Journal,
        settings: Settings,
        *,
        compare: bool = False,
        on_progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._encode, self._journal, self._settings = encode, journal, settings
        self._compare, self._on_progress = compare, on_progress
        self._open: dict[bytes, _Open] = {}
        self._pending: dict[Kind, list[_Open]] = {"text": [], "image": []}
        self._settled: list[Settled] = []
        self._n_open_rows = 0
        self._n_in_flight = 0
        self._tasks: queue.SimpleQueue[list[_Open] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[_Result] = queue.SimpleQueue()

    def run(self, rows: Iterable[Row]) -> int:
        """Embed what is not done yet.

        Returns:
            How many rows there are.

        Raises:
            StoppedError: a row failed and rows are not to be skipped, or the server is of no use. What was
                finished is in the journal.
            UsageError: an input cannot be read.
        """
        # Daemons: a run that is interrupted does not wait for the requests in flight.
        for _ in range(self._settings.workers):
            threading.Thread(target=self._serve, daemon=True).start()
        try:
            n_rows = self._read(rows)
            while self._n_open_rows:
                self._send_pending()
                self._collect()
        except JinaV4Error:
            self._keep_what_comes()
            raise
        finally:
            for _ in range(self._settings.workers):
                self._tasks.put(None)
        self._keep({})
        return n_rows

    def _read(self, rows: Iterable[Row]) -> int:
        last, done, n_rows = self._journal.last(), dict[int, bytes | None](), 0
        for number, row in enumerate(rows):
            n_rows = number + 1
            if number % _LOOKED_UP == 0 and number <= last:
                done = self._journal.done(number, number + _LOOKED_UP)
            if number in done:
                if self._compare:
                    self._check_unchanged(row, done[number])
                continue
            self._take(number, row)
            if len(self._settled) >= _SETTLED:
                self._keep({})
            while self._n_open_rows >= self._settings.max_open:
                if not self._n_in_flight:
                    self._send_pending()
                self._collect()
        if n_rows <= last:
            raise StoppedError(f"the input has {n_rows} rows, of which {last + 1} are done; start anew with --restart")
        return n_rows

    def _take(self, number: int, row: Row) -> None:
        try:
            content = row.read()
        except RowError as error:
            self._fail([(number, row.id)], None, str(error))
            return
        if self._journal.holds(content.digest):
            self._settled.append(Settled(number, row.id, content.digest))
            return
        self._n_open_rows += 1
        if content.digest in self._open:
            self._open[content.digest].rows.append((number, row.id))
            return
        opened = self._open[content.digest] = _Open(content, [(number, row.id)])
        pending = self._pending[content.kind]
        pending.append(opened)
        if len(pending) >= self._settings.batch_sizes[content.kind]:
            self._send(content.kind)

    def _send_pending(self) -> None:
        for kind, pending in self._pending.items():
            if pending:
                self._send(kind)

    def _send(self, kind: Kind) -> None:
        """Hand the waiting batch of a kind to the workers, once one is free."""
        while self._n_in_flight >= self._settings.workers:
            self._collect()
        self._tasks.put(self._pending[kind])
        self._pending[kind] = []
        self._n_in_flight += 1

    def _collect(self) -> None:
        """Wait for a result, and keep all that are there."""
        results = [self._results.get()]
        while not self._results.empty():
            results.append(self._results.get())
        self._n_in_flight -= len(results)
        vectors: dict[bytes, Vector] = {}
        stops = [self._take_result(result, vectors) for result in results]
        self._keep(vectors)
        for stop in stops:
            if stop is not None:
                raise stop

    def _take_result(self, result: _Result, vectors: dict[bytes, Vector]) -> BaseException | None:
        """Settle the rows of a result; give why the run must stop, if it must."""
        if result.fatal is not None:
            whole = f"{_named(result.batch)}: {result.fatal}"
            return StoppedError(whole) if isinstance(result.fatal, JinaV4Error) else result.fatal
        errors = [outcome for outcome in result.vectors if isinstance(outcome, ServerError)]
        if len(errors) == len(result.batch) and self._journal.n_vectors == 0 and not vectors:
            # Then it is not the rows that are wrong: a model that is not there, dimensions that it does not have.
            return StoppedError(f"{_named(result.batch)}, and nothing came through before: {errors[0]}")
        stop: BaseException | None = None
        for opened, outcome in zip(result.batch, result.vectors, strict=True):
            digest = opened.content.digest
            if not isinstance(outcome, JinaV4Error):
                vectors[digest] = outcome
                self._settled += [Settled(number, row_id, digest) for number, row_id in opened.rows]
            else:
                try:
                    self._fail(opened.rows, digest, _PLACE.sub("", str(outcome)))
                except StoppedError as error:
                    stop = stop or error
            del self._open[digest]
            self._n_open_rows -= len(opened.rows)
        return stop

    def _fail(self, rows: list[tuple[int, str]], digest: bytes | None, message: str) -> None:
        if not self._settings.skip:
            raise StoppedError(f"row {rows[0][1]}: {message}")
        self._settled += [Settled(number, row_id, digest, error=message) for number, row_id in rows]

    def _keep(self, vectors: dict[bytes, Vector]) -> None:
        if not vectors and not self._settled:
            return
        settled, self._settled = self._settled, []
        self._journal.record(vectors, settled)
        self._on_progress(len(settled))

    def _keep_what_comes(self) -> None:
        """Keep what the requests in flight bring; what else they meet is no news after what stopped the run."""
        vectors: dict[bytes, Vector] = {}
        while self._n_in_flight:
            result = self._results.get()
            self._n_in_flight -= 1
            for opened, outcome in zip(result.batch, result.vectors, strict=False):
                if not isinstance(outcome, JinaV4Error):
                    vectors[opened.content.digest] = outcome
                    self._settled += [Settled(number, row_id, opened.content.digest) for number, row_id in opened.rows]
        self._keep(vectors)

    def _check_unchanged(self, row: Row, digest: bytes | None) -> None:
        try:
            same = digest in (None, row.read().digest)
        except RowError:
            same = digest is None
        if not same:
            raise StoppedError(f"row {row.id} is not what it was when it was embedded; start anew with --restart")

    def _serve(self) -> None:
        """Do batches until there are no more: what a worker's thread runs."""
        while (batch := self._tasks.get()) is not None:
            try:
                result = _Result(batch, self._embed(batch))
            except BaseException as error:  # it must be seen by the other thread, whatever it is
                result = _Result(batch, fatal=error)
            self._results.put(result)

    def _embed(self, batch: list[_Open]) -> list[Vector | JinaV4Error]:
        kind = batch[0].content.kind
        try:
            return [*self._encode(kind, [opened.content.value for opened in batch])]
        except JinaV4Error as error:
            if not _is_of_a_row(error):
                raise
            if len(batch) == 1:
                if isinstance(error, ServerFailedError):
                    raise  # nothing else came through that would show that the server is well
                return [error]
        # One at a time, to find out which it is.
        outcomes: list[Vector | JinaV4Error] = []
        for opened in batch:
            try:
                outcomes += self._encode(kind, [opened.content.value])
            except JinaV4Error as error:
                failed_only = bool(outcomes) and all(isinstance(one, ServerFailedError) for one in outcomes)
                if not _is_of_a_row(error) or (failed_only and isinstance(error, ServerFailedError)):
                    raise
                outcomes.append(error)
        return outcomes


def _named(batch: list[_Open]) -> str:
    ids = [row_id for opened in batch for _, row_id in opened.rows]
    return f"row {ids[0]}" if len(ids) == 1 else f"rows {ids[0]} to {ids[-1]}"


def _is_of_a_row(error: JinaV4Error) -> bool:
    """Whether an error may be owed to one item of the request."""
    if isinstance(error, ServerRefusedError):
        return error.status_code in _REFUSALS
    if isinstance(error, ServerFailedError):
        return error.status_code == _INTERNAL
    return isinstance(error, ArgumentError)
