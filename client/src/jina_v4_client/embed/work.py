"""The work: rows are read, equal content is found, batches are embedded by several requests at once, results are kept.

One thread reads rows and writes the journal; the others only wait for the server. Whatever is finished is in the
journal before more is sent: a kill costs what the requests in flight hold and nothing else. `encoder` finds out which
items of a batch are at fault.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from jina_v4_client.embed.content import Content, Kind, Row, escaped
from jina_v4_client.embed.encoder import Encode, Outcome
from jina_v4_client.embed.errors import ChangedError, RowError, StoppedError
from jina_v4_client.embed.journal import Journal, Settled
from jina_v4_client.errors import JinaV4Error
from jina_v4_client.results import Vector

_LOOKED_UP = 1024  # rows of which it is asked at once whether they are done
_SETTLED = 1024  # rows without new vectors (copies, failures) that are kept at once


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


class Work:
    """Embeds the rows that are not in the journal yet, and puts them there.

    Args:
        compare: whether to compare the content of rows that are done, too, with what it was then; ids always are.
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
        self._in_flight: dict[Future[list[Outcome]], list[_Open]] = {}
        self._pool = ThreadPoolExecutor(settings.workers, thread_name_prefix="jina-v4-embed")

    def run(self, rows: Iterable[Row]) -> int:
        """Embed what is not done yet.

        Returns:
            How many rows there are.

        Raises:
            StoppedError: a row failed and rows are not to be skipped, or the server is of no use. What was
                finished is in the journal.
            UsageError: an input cannot be read.
        """
        try:
            n_rows = self._read(rows)
            while self._n_open_rows:
                self._send_pending()
                self._collect()
        except JinaV4Error:
            self._keep_what_comes()
            raise
        finally:
            # An interrupted run does not wait for the requests in flight: the client ends them when it is closed.
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._keep({})
        return n_rows

    def _read(self, rows: Iterable[Row]) -> int:
        last, done, n_rows = self._journal.last(), dict[int, tuple[str, bytes | None]](), 0
        for number, row in enumerate(rows):
            n_rows = number + 1
            if number % _LOOKED_UP == 0 and number <= last:
                done = self._journal.done(number, number + _LOOKED_UP)
            if number in done:
                row_id, digest = done[number]
                if row.id != row_id:
                    raise ChangedError(
                        f"row {number + 1} is not what it was in an earlier run: its id was {row_id} and is {row.id};"
                        f" {self._what_helps()}"
                    )
                if self._compare:
                    self._check_unchanged(row, digest)
                continue
            self._take(number, row)
            if len(self._settled) >= _SETTLED:
                self._keep({})
            while self._n_open_rows >= self._settings.max_open:
                if not self._in_flight:
                    self._send_pending()
                self._collect()
        if n_rows <= last:
            raise ChangedError(f"the input has {n_rows} rows, of which {last + 1} are done; {self._what_helps()}")
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
        """Have the waiting batch of a kind sent, once a request may be."""
        while len(self._in_flight) >= self._settings.workers:
            self._collect()
        batch, self._pending[kind] = self._pending[kind], []
        future = self._pool.submit(self._encode, kind, [opened.content.value for opened in batch])
        self._in_flight[future] = batch

    def _collect(self) -> None:
        """Wait for a batch, and keep all that are there."""
        done = wait(self._in_flight, return_when=FIRST_COMPLETED).done
        vectors: dict[bytes, Vector] = {}
        stops = [self._settle(self._in_flight.pop(future), future, vectors) for future in done]
        self._keep(vectors)
        for stop in stops:
            if stop is not None:
                raise stop

    def _settle(
        self, batch: list[_Open], future: Future[list[Outcome]], vectors: dict[bytes, Vector]
    ) -> BaseException | None:
        """Settle the rows of a batch that was embedded; return why the run must stop, if it must."""
        if (error := future.exception()) is not None:
            return StoppedError(f"{_named(batch)}: {error}") if isinstance(error, JinaV4Error) else error
        outcomes = future.result()
        stops = [(one, error) for one, error in zip(batch, outcomes, strict=True) if isinstance(error, JinaV4Error)]
        stop = StoppedError(f"{_named([one for one, _ in stops])}: {stops[0][1]}") if stops else None
        for opened, outcome in zip(batch, outcomes, strict=True):
            digest = opened.content.digest
            if not isinstance(outcome, Exception):
                vectors[digest] = outcome
                self._settled += [Settled(number, row_id, digest) for number, row_id in opened.rows]
            elif stop is None:
                try:
                    self._fail(opened.rows, digest, str(outcome))
                except StoppedError as error:
                    stop = error
            del self._open[digest]
            self._n_open_rows -= len(opened.rows)
        return stop

    def _fail(self, rows: list[tuple[int, str]], digest: bytes | None, message: str) -> None:
        if not self._settings.skip:
            raise StoppedError(f"row {rows[0][1]}: {message}")
        self._settled += [Settled(number, row_id, digest, error=escaped(message)) for number, row_id in rows]

    def _keep(self, vectors: dict[bytes, Vector]) -> None:
        if not vectors and not self._settled:
            return
        settled, self._settled = self._settled, []
        self._journal.record(vectors, settled)
        self._on_progress(len(settled))

    def _keep_what_comes(self) -> None:
        """Keep what the requests in flight bring; what else they meet is no news after what stopped the run."""
        vectors: dict[bytes, Vector] = {}
        for future, batch in self._in_flight.items():
            if future.exception() is not None:
                continue
            for opened, outcome in zip(batch, future.result(), strict=True):
                if not isinstance(outcome, Exception):
                    vectors[opened.content.digest] = outcome
                    self._settled += [Settled(number, row_id, opened.content.digest) for number, row_id in opened.rows]
        self._keep(vectors)

    def _check_unchanged(self, row: Row, digest: bytes | None) -> None:
        try:
            digest_now = row.read().digest
        except RowError:
            digest_now = None
        if digest_now != digest:
            raise ChangedError(f"row {row.id} is not what it was in an earlier run; {self._what_helps()}")

    def _what_helps(self) -> str:
        # Files are what they were when the work began, or the job differs: they changed meanwhile, and were put back.
        return f"{'feed the same rows again, or ' * self._compare}start anew with --restart"


def _named(batch: list[_Open]) -> str:
    ids = [row_id for opened in batch for _, row_id in opened.rows]
    return f"row {ids[0]}" if len(ids) == 1 else f"rows {ids[0]} to {ids[-1]}"
