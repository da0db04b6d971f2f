"""The journal of a work folder: which rows are done, and their vectors; a kill at any moment does no harm to it.

Vectors are appended to one file; a transaction of SQLite then says which rows they belong to. The file is on the disk
before the transaction is, so the vectors that the database names are always there. What the file holds beyond them is
cut off when the folder is opened again. Memory does not grow with the rows: digests, too, are looked up in the database
(64 MiB of cache; about 110 bytes a row on the disk).
"""

import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from jina_v4_client.embed.errors import StoppedError, UsageError

VECTORS = "vectors.bin"
DATABASE = "journal.sqlite"
_CACHE_KIB = 65536
_TABLES = """
    CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS items (
        digest BLOB PRIMARY KEY, start INTEGER NOT NULL, length INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS rows (
        number INTEGER PRIMARY KEY, id TEXT NOT NULL, digest BLOB, start INTEGER, length INTEGER, error TEXT,
        CHECK ((start IS NULL) = (error IS NOT NULL))
    );
"""
# A row without an error has the vectors of its content.
_INSERT_ROW = """
    INSERT INTO rows SELECT :number, :id, :digest, start, length, :error
    FROM (SELECT 1) LEFT JOIN items ON items.digest = :digest AND :error IS NULL
"""


class Span(NamedTuple):
    """Where the vectors of a row begin in the file, and how many they are; a multi-vector is several."""

    start: int
    length: int


class Settled(NamedTuple):
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


class Recorded(NamedTuple):
    """A row of the journal: with a span, or with an error."""

    number: int
    id: str
    span: Span | None
    error: str | None


class Journal:
    """The open work folder of one run.

    Args:
        folder: must exist.
        dtype: of the vectors in the file.
        durable: whether to wait for the disk, so that a power cut loses nothing either.

    Raises:
        UsageError: another run has it open, or it is damaged.
        StoppedError: the disk is full, or the files may not be read or written.
    """

    def __init__(self, folder: Path, dtype: str, *, durable: bool = True) -> None:
        self._durable = durable
        self.dtype = np.dtype(dtype)
        self._path = folder / VECTORS
        with disk_errors(folder):
            self._database = _open_database(folder / DATABASE, durable)
            self._file = self._path.open("ab", buffering=0)
            if durable:
                sync_folder(folder)
            facts: dict[str, int] = dict(self._database.execute("SELECT name, value FROM facts"))
            self._width = facts.get("width", 0)
            self._end = facts.get("end", 0)  # in vectors
            n_bytes = self._end * self._width * self.dtype.itemsize
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
        """Return the number of the last row that is done; -1 if none is."""
        (number,) = self._database.execute("SELECT max(number) FROM rows").fetchone()
        return -1 if number is None else int(number)

    def holds(self, digest: bytes) -> bool:
        """Tell whether content has been embedded."""
        return self._database.execute("SELECT 1 FROM items WHERE digest = ?", (digest,)).fetchone() is not None

    def record(self, vectors: Mapping[bytes, NDArray[np.float32]], rows: Sequence[Settled]) -> None:
        """Record vectors and the rows that are done with them, all or none.

        Args:
            vectors: (width,) or (n, width) of each new content, by digest.
            rows: the content of those without an error is in `vectors`, now or in an earlier call.

        Raises:
            StoppedError: the disk is full, or earlier vectors have another width.
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
            blocks.append(np.ascontiguousarray(block, dtype=self.dtype).tobytes())
        with disk_errors(self._path.parent):
            if blocks:
                self._append(b"".join(blocks))
            with self._database:  # a transaction
                self._database.execute("BEGIN")
                self._database.executemany("INSERT INTO items VALUES (?, ?, ?)", spans)
                self._database.executemany(_INSERT_ROW, (row._asdict() for row in rows))
                facts = (("width", self._width), ("end", end))
                self._database.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", facts)
        self._end = end

    def mark_finishing(self) -> None:
        """Note that the output is about to be put in its place: from now on a file of its name is this run's."""
        with disk_errors(self._path.parent), self._database:
            self._database.execute("INSERT OR REPLACE INTO facts VALUES ('finishing', 1)")

    @property
    def is_finishing(self) -> bool:
        """Whether the output may have been put in its place."""
        return self._database.execute("SELECT 1 FROM facts WHERE name = 'finishing'").fetchone() is not None

    def recorded(self, first: int = 0) -> Iterator[Recorded]:
        """Yield the rows that are done in the order of the input, beginning with the number `first`."""
        query = "SELECT number, id, start, length, error FROM rows WHERE number >= ? ORDER BY number"
        for number, row_id, start, length, error in self._database.execute(query, (first,)):
            yield Recorded(number, row_id, None if start is None else Span(start, length), error)

    def n_repeated_ids(self) -> int | None:
        """Count the rows whose id an earlier row has; 2 s for a million rows.

        Returns:
            The number; None if the folder for temporary files, where SQLite sorts, is full or cannot be written.
        """
        try:
            (n_rows,) = self._database.execute("SELECT count(*) - count(DISTINCT id) FROM rows").fetchone()
        except sqlite3.OperationalError:
            return None
        return int(n_rows)

    def longer_than(self, n_vectors: int) -> Iterator[str]:
        """Yield the ids of the rows that have more vectors than this."""
        for (row_id,) in self._database.execute("SELECT id FROM rows WHERE length > ? ORDER BY number", (n_vectors,)):
            yield row_id

    def vectors(self, spans: Sequence[Span]) -> NDArray[np.generic]:
        """Read the vectors of spans, one after the other: (n, width)."""
        # Mapped anew each time: pages that were read would otherwise count as this process's memory until it ends.
        mapped = np.memmap(self._path, self.dtype, "r", shape=(self._end, self._width))
        numbers = np.concatenate([np.arange(span.start, span.start + span.length) for span in spans])
        return np.asarray(mapped[numbers])

    def close(self) -> None:
        """Close the files."""
        self._database.close()
        self._file.close()

    def __enter__(self) -> Self:
        """Return this journal."""
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Close the files; replace an error of SQLite, raised while reading, by one of this package."""
        self.close()
        if isinstance(error, sqlite3.DatabaseError):
            with disk_errors(self._path.parent):
                raise error

    def _append(self, content: bytes) -> None:
        # On a full disk an append can break off, or the transaction after it can fail, and the vectors in flight are
        # recorded all the same. So first cut off what such an append left.
        self._file.truncate(self._end * self._width * self.dtype.itemsize)
        view = memoryview(content)
        while view:
            view = view[self._file.write(view) :]
        if self._durable:
            os.fsync(self._file.fileno())


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Replace errors of the disk and of SQLite in a work folder by errors of this package.

    Raises:
        UsageError: another run has it open, or it is damaged.
        StoppedError: the disk is full, or files may not be read or written. The run can go on once that is mended.
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
                raise  # an error in this program


def is_in_use(folder: Path) -> bool:
    """Tell whether a run has this work folder open."""
    try:
        _open_database(folder / DATABASE, durable=False).close()
    except sqlite3.DatabaseError as error:
        return _code(error) == sqlite3.SQLITE_BUSY
    return False


def _code(error: sqlite3.DatabaseError) -> int:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # without the extended code


def _open_database(path: Path, durable: bool) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=1, isolation_level=None)
    try:
        database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        # One process at a time: a second run finds it locked, and SQLite needs no shared memory, which network disks
        # lack.
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute(f"PRAGMA synchronous = {'FULL' if durable else 'OFF'}")
        database.executescript(_TABLES)
        database.execute("BEGIN EXCLUSIVE")
        database.execute("COMMIT")
    except BaseException:
        database.close()  # its lock too, which otherwise stays until garbage is collected
        raise
    return database


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
