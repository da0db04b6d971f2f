"""The work folder: which rows are done, and their vectors, safe from a kill at any moment.

Vectors are appended to one file; a transaction of SQLite then says which rows they are for. The file is on the disk
before the transaction is, so what the database tells is always there, and what the file holds beyond it is cut off when
the folder is opened again. Memory does not grow with the rows: digests, too, are looked up in the database (64 MiB of
cache; about 110 bytes a row on the disk).
"""

import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from jina_v4_client.embed.errors import StoppedError, UsageError
from jina_v4_client.embed.job import sync_folder

VECTORS = "vectors.bin"
DATABASE = "journal.sqlite"
_CACHE_KIB = 65536
_TABLES = """
    CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS items (
        digest BLOB PRIMARY KEY, start INTEGER NOT NULL, length INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS rows (
        number INTEGER PRIMARY KEY, id TEXT NOT NULL, digest BLOB, start INTEGER, length INTEGER, error TEXT
    );
"""


@dataclass(frozen=True)
class Span:
    """Where vectors lie in the file, counted in vectors; a multi-vector is several."""

    start: int
    length: int


@dataclass(frozen=True)
class Settled:
    """A row that is done: its content has vectors, or it failed.

    Attributes:
        number: its place in the input, from 0.
        digest: of its content; None if it could not be read.
        error: why there is no vector; None if there is one.
    """

    number: int
    id: str
    digest: bytes | None
    error: str | None = None


@dataclass(frozen=True)
class Recorded:
    """A row as the journal tells it: with a span, or with an error."""

    number: int
    id: str
    span: Span | None
    error: str | None


class Journal:
    """The open work folder of one run.

    Args:
        folder: must exist.
        dtype: of the vectors in the file.
        durable: whether to wait for the disk, so that a power cut is survived too.

    Raises:
        UsageError: another run has it open, or it is damaged.
        StoppedError: the disk is full, or the files may not be read or written.
    """

    def __init__(self, folder: Path, dtype: str, *, durable: bool = True) -> None:
        self._durable = durable
        self._dtype = np.dtype(dtype)
        self._path = folder / VECTORS
        with disk_errors(folder):
            self._database = _open_database(folder / DATABASE, durable)
            self._file = self._path.open("ab", buffering=0)
            if durable:
                sync_folder(folder)
            facts: dict[str, int] = dict(self._database.execute("SELECT name, value FROM facts"))
            self._width = facts.get("width", 0)
            self._end = facts.get("end", 0)  # in vectors
            n_bytes = self._end * self._width * self._dtype.itemsize
            if self._path.stat().st_size < n_bytes:
                self.close()
                raise UsageError(f"{folder} is damaged: vectors are missing at the end; start anew with --restart")
            self._file.truncate(n_bytes)

    @property
    def width(self) -> int:
        """Dimensions of a vector; 0 before the first."""
        return self._width

    @property
    def n_vectors(self) -> int:
        """How many vectors are in the file."""
        return self._end

    def count(self, *, failed: bool = False) -> int:
        """Count the rows that are done, or those of them that failed."""
        counted = "error" if failed else "*"  # a column's count is of what is not null
        (n_rows,) = self._database.execute(f"SELECT count({counted}) FROM rows").fetchone()  # noqa: S608 - a constant
        return int(n_rows)

    def done(self, first: int, end: int) -> dict[int, tuple[str, bytes | None]]:
        """Return the id and the digest of each row from `first` to before `end` that is done."""
        query = "SELECT number, id, digest FROM rows WHERE number >= ? AND number < ?"
        return {number: (row_id, digest) for number, row_id, digest in self._database.execute(query, (first, end))}

    def last(self) -> int:
        """Give the number of the last row that is done, -1 if none is."""
        (number,) = self._database.execute("SELECT max(number) FROM rows").fetchone()
        return -1 if number is None else int(number)

    def holds(self, digest: bytes) -> bool:
        """Tell whether content has been embedded."""
        return self._span(digest) is not None

    def record(self, vectors: Mapping[bytes, NDArray[np.float32]], rows: Sequence[Settled]) -> None:
        """Keep vectors and the rows that are done with them, all or none.

        Args:
            vectors: (width,) or (n, width) of each new content, by digest.
            rows: those without an error have their content in `vectors`, or had it there before.

        Raises:
            StoppedError: the disk is full, or the vectors do not go with those that are there.
        """
        end = self._end
        spans: list[tuple[bytes, int, int]] = []
        blocks = []
        for digest, vector in vectors.items():
            block = np.atleast_2d(vector)  # (n, width)
            if self._width not in (0, block.shape[1]):
                raise StoppedError(
                    f"the work so far has {self._width}-d vectors; the server now returns {block.shape[1]}-d ones"
                )
            self._width = block.shape[1]
            spans.append((digest, end, len(block)))
            end += len(block)
            blocks.append(np.ascontiguousarray(block, dtype=self._dtype).tobytes())
        with disk_errors(self._path.parent):
            if blocks:
                self._append(b"".join(blocks))
            with self._database:  # a transaction
                self._database.execute("BEGIN")
                self._database.executemany("INSERT INTO items VALUES (?, ?, ?)", spans)
                self._database.executemany("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?)", map(self._line, rows))
                facts = (("width", self._width), ("end", end))
                self._database.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", facts)
        self._end = end

    def mark_finishing(self) -> None:
        """Note that the output is about to be put in its place, so that one found there is this run's."""
        with disk_errors(self._path.parent), self._database:
            self._database.execute("INSERT OR REPLACE INTO facts VALUES ('finishing', 1)")

    @property
    def is_finishing(self) -> bool:
        """Whether the output may have been put in its place."""
        return self._database.execute("SELECT 1 FROM facts WHERE name = 'finishing'").fetchone() is not None

    def recorded(self, first: int = 0) -> Iterator[Recorded]:
        """Give the rows that are done, in the order of the input, from one on."""
        query = "SELECT number, id, start, length, error FROM rows WHERE number >= ? ORDER BY number"
        for number, row_id, start, length, error in self._database.execute(query, (first,)):
            yield Recorded(number, row_id, None if start is None else Span(start, length), error)

    def n_repeated_ids(self) -> int:
        """Count the rows whose id an earlier row has; SQLite sorts on the disk, 2 s for a million rows."""
        (n_rows,) = self._database.execute("SELECT count(*) - count(DISTINCT id) FROM rows").fetchone()
        return int(n_rows)

    def longer_than(self, n_vectors: int) -> Iterator[str]:
        """Yield the ids of the rows that have more vectors than so many."""
        for (row_id,) in self._database.execute("SELECT id FROM rows WHERE length > ? ORDER BY number", (n_vectors,)):
            yield row_id

    def vectors(self, spans: Sequence[Span]) -> NDArray[np.generic]:
        """Read vectors, one behind the other: (n, width)."""
        # Mapped anew each time, so that the pages read do not count as this process's memory for ever.
        mapped = np.memmap(self._path, self._dtype, "r", shape=(self._end, self._width))
        numbers = np.concatenate([np.arange(span.start, span.start + span.length) for span in spans])
        return np.asarray(mapped[numbers])

    def close(self) -> None:
        """Close the files."""
        self._database.close()
        self._file.close()

    def __enter__(self) -> Self:
        """Give this journal."""
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Close the files; raise an error of ours for one of SQLite's that reading met."""
        self.close()
        if isinstance(error, sqlite3.DatabaseError):
            with disk_errors(self._path.parent):
                raise error

    def _span(self, digest: bytes) -> Span | None:
        found = self._database.execute("SELECT start, length FROM items WHERE digest = ?", (digest,)).fetchone()
        return None if found is None else Span(*found)

    def _line(self, row: Settled) -> tuple[int, str, bytes | None, int | None, int | None, str | None]:
        if row.error is not None:
            return row.number, row.id, row.digest, None, None, row.error
        span = None if row.digest is None else self._span(row.digest)
        if span is None:
            raise StoppedError(f"row {row.id!r} is done without a vector: this is a mistake of the program")
        return row.number, row.id, row.digest, span.start, span.length, None

    def _append(self, content: bytes) -> None:
        # A full disk breaks off an append or the transaction behind it, and what is in flight is kept all the same:
        # nothing that was left here may stand before it.
        self._file.truncate(self._end * self._width * self._dtype.itemsize)
        view = memoryview(content)
        while view:
            view = view[self._file.write(view) :]
        if self._durable:
            os.fsync(self._file.fileno())


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Raise an error of ours for what the disk or SQLite has against a work folder.

    Raises:
        UsageError: another run has it open, or it is damaged.
        StoppedError: the disk is full, or files may not be read or written: it goes on once that is mended.
    """
    try:
        yield
    except OSError as error:
        raise StoppedError(f"{folder} cannot be used until this is mended: {error.strerror or error}") from error
    except sqlite3.DatabaseError as error:
        match _code(error):
            case sqlite3.SQLITE_BUSY:
                raise UsageError(f"{folder} cannot be used: another run is at work in it") from error
            case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
                raise UsageError(f"{folder} is damaged ({error}); start anew with --restart") from error
            case _ if isinstance(error, sqlite3.OperationalError):
                raise StoppedError(f"{folder} cannot be used until this is mended: {error}") from error
            case _:
                raise  # a mistake of the program


def is_in_use(folder: Path) -> bool:
    """Tell whether a run has this work folder open."""
    try:
        _open_database(folder / DATABASE, durable=False).close()
    except sqlite3.DatabaseError as error:
        return _code(error) == sqlite3.SQLITE_BUSY
    return False


def _code(error: sqlite3.DatabaseError) -> int:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # without what further tells it apart


def _open_database(path: Path, durable: bool) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=1, isolation_level=None)
    database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    # The only user: a second run finds it locked, and no file is shared between processes, which network disks cannot.
    database.execute("PRAGMA locking_mode = EXCLUSIVE")
    database.execute("PRAGMA journal_mode = WAL")
    database.execute(f"PRAGMA synchronous = {'FULL' if durable else 'OFF'}")
    database.executescript(_TABLES)
    database.execute("BEGIN EXCLUSIVE")
    database.execute("COMMIT")
    return database
