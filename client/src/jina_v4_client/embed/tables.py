"""Inputs with a row a line or a record: plain text, JSON lines, CSV and parquet; read as a stream."""

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from jina_v4_client.embed import missing
from jina_v4_client.embed.content import Row, broken_row, bytes_content, make_row, named_image_content, text_content
from jina_v4_client.embed.errors import StoppedError, UsageError

STDIN = "-"
_BLOCK_BYTES = 2**20
_PARQUET_ROWS = 1024  # decoded at a time


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold the content and the id; a row has a text or an image."""

    text: str | None = "text"
    image: str | None = None
    id: str | None = None

    def content(self) -> list[str]:
        """The columns that hold content."""
        return [name for name in (self.text, self.image) if name is not None]

    def all(self) -> list[str]:
        """The columns that are read."""
        return [*self.content(), *([] if self.id is None else [self.id])]


def row_of(record: Mapping[str, Any], number: object, columns: Columns, folder: Path) -> Row:
    """Make a row of a table's record.

    Args:
        record: values by column.
        number: the id where no column holds one.
        columns: which to read.
        folder: what the paths of images are relative to.
    """
    row_id = number if columns.id is None else record.get(columns.id)
    if row_id is None:
        return broken_row(number, f"nothing in the column {columns.id!r}, which holds the ids")
    # An empty text is a text, but where a row may have an image instead it is the lack of one.
    empty = (None,) if columns.text is None or columns.image is None else (None, "")
    found = [name for name in columns.content() if record.get(name) not in empty]
    if len(found) != 1:
        names = " and ".join(map(repr, columns.content()))
        return broken_row(row_id, f"{'both' if found else 'nothing in'} {names}; a row needs one text or image")
    value = record[found[0]]
    if found[0] == columns.image:
        # As Hugging Face's datasets write images: the file's bytes, or where it lies.
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            file = value
            return make_row(row_id, lambda: bytes_content(file))
        if isinstance(value, str) and value:
            name = value
            return make_row(row_id, lambda: named_image_content(name, folder))
    elif isinstance(value, str):
        text = value
        return make_row(row_id, lambda: text_content(text))
    kind = "path, URL or file" if found[0] == columns.image else "text"
    return broken_row(row_id, f"{found[0]!r} holds no {kind} but a value of type {type(value).__name__}")


@dataclass(frozen=True)
class TextLines:
    """One text a line; the id is the number of the line. Empty lines are no rows."""

    path: str

    def rows(self) -> Iterator[Row]:
        """Give the rows in order."""
        for number, line, error in _lines(self.path):
            if error:
                yield broken_row(number, error)
            else:
                text = line
                yield make_row(number, lambda text=text: text_content(text))  # type: ignore[misc]

    def count(self) -> int | None:
        """Count the rows, about, for the progress; None if that cannot be done."""
        return _count_lines(self.path)


@dataclass(frozen=True)
class JsonLines:
    """One JSON object a line. Empty lines are no rows."""

    path: str
    columns: Columns

    def rows(self) -> Iterator[Row]:
        """Give the rows in order."""
        for number, line, error in _lines(self.path):
            if error:
                yield broken_row(number, error)
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as broken:
                yield broken_row(number, f"no JSON ({broken})")
                continue
            if isinstance(record, dict):
                yield row_of(record, number, self.columns, _folder(self.path))
            else:
                yield broken_row(number, f"no JSON object but a value of type {type(record).__name__}")

    def count(self) -> int | None:
        """Count the rows, about, for the progress; None if that cannot be done."""
        return _count_lines(self.path)


@dataclass(frozen=True)
class Csv:
    """A table with a line of column names, separated by commas, or by tabs in a .tsv.

    Raises:
        UsageError: a column is not there.
    """

    path: str
    columns: Columns

    def __post_init__(self) -> None:
        """Look at the columns."""
        if self.path != STDIN:
            with _opened_text(self.path) as file:
                self._check(self._reader(file))

    def rows(self) -> Iterator[Row]:
        """Give the rows in order."""
        with _opened_text(self.path) as file:
            reader = self._reader(file)
            self._check(reader)
            try:
                for number, record in enumerate(reader, 1):
                    if None in record:  # where DictReader puts what is beyond the last column
                        yield broken_row(
                            _id(self.path, number), f"more than {len(record) - 1} cells; is a quote missing?"
                        )
                    else:
                        yield row_of(record, _id(self.path, number), self.columns, _folder(self.path))
            except (csv.Error, UnicodeDecodeError) as error:
                raise StoppedError(f"{_name(self.path)}, after line {reader.line_num}: no CSV ({error})") from error

    def count(self) -> int | None:
        """Count the rows, about, for the progress; None if that cannot be done."""
        n_lines = _count_lines(self.path)
        return None if n_lines is None else max(n_lines - 1, 0)

    def _reader(self, file: IO[str]) -> "csv.DictReader[str]":
        csv.field_size_limit(2**31 - 1)  # a text may be as long as it likes
        return csv.DictReader(file, delimiter="\t" if self.path.lower().endswith(".tsv") else ",", strict=True)

    def _check(self, reader: "csv.DictReader[str]") -> None:
        try:
            names = list(reader.fieldnames or [])
        except (csv.Error, UnicodeDecodeError) as error:
            raise UsageError(f"{_name(self.path)} is no CSV ({error})") from error
        check_columns(self.path, self.columns, names)


@dataclass(frozen=True)
class Parquet:
    """A parquet file.

    Raises:
        UsageError: it is none, or a column is not there.
    """

    path: str
    columns: Columns

    def __post_init__(self) -> None:
        """Look at the columns."""
        if self.path == STDIN:
            raise UsageError("parquet cannot be read from the standard input; give a file")
        check_columns(self.path, self.columns, self._file().schema_arrow.names)

    def rows(self) -> Iterator[Row]:
        """Give the rows in order."""
        number = 0
        # The same column twice is once in the answer.
        batches = self._file().iter_batches(batch_size=_PARQUET_ROWS, columns=list(dict.fromkeys(self.columns.all())))
        while True:
            try:
                batch = next(batches, None)
                records = [] if batch is None else batch.to_pylist()
            except (OSError, ValueError) as error:
                raise StoppedError(f"{self.path}, after row {number}: broken parquet ({error})") from error
            if batch is None:
                return
            for record in records:
                number += 1
                yield row_of(record, _id(self.path, number), self.columns, _folder(self.path))

    def count(self) -> int | None:
        """Count the rows."""
        return int(self._file().metadata.num_rows)

    def _file(self) -> Any:
        try:
            from pyarrow import parquet  # type: ignore[import-untyped] # it has no types
        except ModuleNotFoundError as error:
            raise UsageError(missing("pyarrow")) from error
        try:
            return parquet.ParquetFile(self.path)
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise UsageError(f"{self.path} is no parquet file ({error})") from error


def check_columns(path: str, columns: Columns, names: list[str]) -> None:
    """Refuse a table that lacks a column."""
    for column in columns.all():
        if column not in names:
            there = ", ".join(map(repr, names)) or "none"
            raise UsageError(
                f"{_name(path)} has no column {column!r}; it has {there}: "
                "name yours with --text-column, --image-column or --id-column"
            )


def _lines(path: str) -> Iterator[tuple[str, str, str]]:
    """Give for each line that is not empty its id, its text without the line's end, and what is wrong with it."""
    with _opened(path) as file:
        for number, raw in enumerate(file, 1):
            line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            line = line.rstrip(b"\r\n")
            if not line.strip():
                continue
            try:
                yield _id(path, number), line.decode("utf-8"), ""
            except UnicodeDecodeError as error:
                yield _id(path, number), "", f"no UTF-8 ({error.reason} at byte {error.start} of the line)"


def _count_lines(path: str) -> int | None:
    if path == STDIN:
        return None
    with _opened(path) as file:
        n_lines, last = 0, b"\n"
        while block := file.read(_BLOCK_BYTES):
            n_lines, last = n_lines + block.count(b"\n"), block[-1:]
    return n_lines + (last != b"\n")


@contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    if path == STDIN:
        yield sys.stdin.buffer
        return
    try:
        file = Path(path).open("rb")  # noqa: SIM115 - what is raised while it is read is not about opening it
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    with file:
        yield file


@contextmanager
def _opened_text(path: str) -> Iterator[IO[str]]:
    with _opened(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        try:
            yield text
        finally:
            text.detach()


def _id(path: str, number: int) -> str:
    return str(number) if path == STDIN else f"{path}#{number}"


def _name(path: str) -> str:
    return "the standard input" if path == STDIN else path


def _folder(path: str) -> Path:
    return Path() if path == STDIN else Path(path).parent
