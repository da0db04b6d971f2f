"""The work: reads rows, finds equal content, has batches embedded by several requests at once, keeps the results.

One thread reads rows and writes the journal; the others only wait for the server. Results are in the journal before
more is sent: a kill loses what the requests in flight hold and nothing else. `encoder` finds out which items of a batch
are at fault.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from jina_v4_client.embed.content import Content, Kind, Row, escaped
from jina_v4_client.embed.encoder import Encode, Outcome
from jina_v4_client.embed.errors import ChangedError, RowError, StoppedError
from jina_v4_client.embed.journal import Journal, Settled
from jina_v4_client.errors import JinaV4Error
from jina_v4_client.results import Vector

_LOOKED_UP = 1024  # rows that are looked up in the journal at once
_SETTLED = 1024  # rows without new vectors (copies, failures) that are written to it at once
_NAMED = 10  # of many names, this many are printed


@dataclass(frozen=True)
class Settings:
    """How the work is split into requests.

    Attributes:
        workers: requests in flight.
        batch_sizes: items a request, by kind.
        skip: whether to leave out rows that cannot be embedded, instead of stopping at the first.
    """

    workers: int
    batch_sizes: dict[Kind, int]
    skip: bool

    @property
    def max_open(self) -> int:
        """How many rows may be read and not done yet: memory must not grow while one request takes long."""
        return 4 * self.workers * max(self.batch_sizes.values()) + 1024


@dataclass
class Names:
    """How many rows or files there are of some sort, and the names of the first."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.first) < _NAMED:
            self.first.append(name)

    def counted(self, one: str, many: str) -> str:
        """Return the count with the word for one or many."""
        return f"{self.count:,} {one if self.count == 1 else many}"

    def __str__(self) -> str:
        """Return the names, and how many more there are."""
        more = self.count - len(self.first)
        return ", ".join(self.first) + (f" and {more:,} more" if more else "")


@dataclass
class _Open:
    """Content that is waiting or in flight, and the number and id of each row that has it."""

    content: Content
    rows: list[tuple[int, str]]


class Work:
    """Embeds the rows that are not in the journal yet, and records them there.

    Args:
        compare: whether to compare the content of rows that are done with what it was then; ids always are compared.
        is_piped: whether rows come from the standard input, which can be fed again.
        on_progress: called with the number of rows that were done since the last call.

    Attributes:
        notes: the notes on the content that this run has read, and the ids of their rows.
    """

    def __init__(
        self,
        encode: Encode,
        journal: Journal,
        settings: Settings,
        *,
        compare: bool,
        is_piped: bool,
        on_progress: Callable[[int], None],
    ) -> None:
        self._encode, self._journal, self._settings = encode, journal, settings
        self._compare, self._is_piped, self._on_progress = compare, is_piped, on_progress
        self.notes: defaultdict[str, Names] = defaultdict(Names)
        self._open: dict[bytes, _Open] = {}
        self._pending: dict[Kind, list[_Open]] = {"text": [], "image": []}
        self._vectors: dict[bytes, Vector] = {}
        self._settled: list[Settled] = []
        self._n_open_rows = 0
        self._in_flight: dict[Future[list[Outcome]], list[_Open]] = {}
        self._pool = ThreadPoolExecutor(settings.workers, thread_name_prefix="jina-v4-embed")

    def run(self, rows: Iterable[Row]) -> int:
        """Embed what is not done yet.

        Returns:
            How many rows there are.

        Raises:
            StoppedError: a row failed and rows are not to be skipped, the server does not embed, or the journal
                cannot be written. What is done is in the journal.
            ChangedError: a row that is done has another id or content now.
            UsageError: an input cannot be read.
        """
        try:
            n_rows = self._read(rows)
            while self._n_open_rows:
                self._send_pending()
                self._collect()
        except JinaV4Error:
            self._record_in_flight()
            raise
        finally:
            # An interrupted run does not wait for the requests in flight; closing the client ends them.
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._record()
        return n_rows

    def _read(self, rows: Iterable[Row]) -> int:
        last, done, n_rows = self._journal.last(), dict[int, tuple[str, bytes | None]](), 0
        for number, row in enumerate(rows):
            n_rows = number + 1
            if number % _LOOKED_UP == 0 and number <= last:
                done = self._journal.done(number, number + _LOOKED_UP)
            if number in done:
                self._check_unchanged(number, row, *done[number])
                continue
            self._take(number, row)
            if len(self._settled) >= _SETTLED:
                self._record()
            while self._n_open_rows >= self._settings.max_open:
                if not self._in_flight:
                    self._send_pending()
                self._collect()
        if n_rows <= last:
            raise ChangedError(f"the input has {n_rows} rows, of which {last + 1} are done; {self._what_to_do()}")
        return n_rows

    def _take(self, number: int, row: Row) -> None:
        try:
            content = self._content(row)
        except RowError as error:
            if (stop := self._fail([(number, row.id)], None, str(error))) is not None:
                raise stop from error
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
        """Have the waiting batch of a kind sent, as soon as fewer requests than workers are in flight."""
        while len(self._in_flight) >= self._settings.workers:
            self._collect()
        batch, self._pending[kind] = self._pending[kind], []
        future = self._pool.submit(self._encode, kind, [opened.content.value for opened in batch])
        self._in_flight[future] = batch

    def _collect(self) -> None:
        """Wait until a batch is done, and record all that are."""
        done = wait(self._in_flight, return_when=FIRST_COMPLETED).done
        stops = [self._settle(self._in_flight.pop(future), future) for future in done]
        self._record()
        for stop in stops:
            if stop is not None:
                raise stop

    def _settle(self, batch: list[_Open], future: Future[list[Outcome]]) -> BaseException | None:
        """Settle the rows of a batch that is done; return why the run must stop, if it must."""
        if (error := future.exception()) is not None:
            return StoppedError(f"{_named(batch)}: {error}") if isinstance(error, JinaV4Error) else error
        outcomes = [*zip(batch, future.result(), strict=True)]
        stops = [(opened, outcome) for opened, outcome in outcomes if isinstance(outcome, JinaV4Error)]
        stop = StoppedError(f"{_named([opened for opened, _ in stops])}: {stops[0][1]}") if stops else None
        for opened, outcome in outcomes:
            if not isinstance(outcome, Exception):
                self._succeed(opened, outcome)
            elif stop is None:
                stop = self._fail(opened.rows, opened.content.digest, str(outcome))
            del self._open[opened.content.digest]
            self._n_open_rows -= len(opened.rows)
        return stop

    def _succeed(self, opened: _Open, vector: Vector) -> None:
        self._vectors[opened.content.digest] = vector
        self._settled += [Settled(number, row_id, opened.content.digest) for number, row_id in opened.rows]

    def _fail(self, rows: list[tuple[int, str]], digest: bytes | None, message: str) -> StoppedError | None:
        """Settle rows without a vector; where rows are not to be skipped, return why the run must stop."""
        if not self._settings.skip:
            return StoppedError(f"row {rows[0][1]}: {message}")
        self._settled += [Settled(number, row_id, digest, error=escaped(message)) for number, row_id in rows]
        return None

    def _record(self) -> None:
        """Write what is settled to the journal."""
        vectors, settled = self._vectors, self._settled
        self._vectors, self._settled = {}, []
        if settled:
            self._journal.record(vectors, settled)
            self._on_progress(len(settled))

    def _record_in_flight(self) -> None:
        """Record the vectors of the requests in flight; their errors do not matter after that which stopped the run."""
        for future, batch in self._in_flight.items():
            if future.exception() is None:
                for opened, outcome in zip(batch, future.result(), strict=True):
                    if not isinstance(outcome, Exception):
                        self._succeed(opened, outcome)
        self._record()

    def _content(self, row: Row) -> Content:
        content = row.read()
        if content.note is not None:
            self.notes[content.note].add(row.id)
        return content

    def _check_unchanged(self, number: int, row: Row, row_id: str, digest: bytes | None) -> None:
        """Compare a row that is done with the id and the digest that it had then."""
        if row.id != row_id:
            raise ChangedError(
                f"row {number + 1} is not what it was in an earlier run: its id was {row_id} and is {row.id};"
                f" {self._what_to_do()}"
            )
        if not self._compare:
            return
        try:
            digest_now = self._content(row).digest
        except RowError:
            digest_now = None
        if digest_now != digest:
            raise ChangedError(f"row {row.id} is not what it was in an earlier run; {self._what_to_do()}")

    def _what_to_do(self) -> str:
        # A file has the size and time that it had when the work began: it changed during a run, and was put back. Rows
        # that are done may be of either state. The standard input alone can be fed again.
        return f"{'feed the same rows again, or ' * self._is_piped}start anew with --restart"


def _named(batch: list[_Open]) -> str:
    ids = [row_id for opened in batch for _, row_id in opened.rows]
    return f"row {ids[0]}" if len(ids) == 1 else f"rows {ids[0]} to {ids[-1]}"
