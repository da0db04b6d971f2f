"""Inputs with a row a line or a record: plain text, JSON lines, CSV and parquet; read as a stream."""

import csv
import io
import json
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Self

from jina_v4_client.embed import missing
from jina_v4_client.embed.content import Row, broken_row, bytes_content, make_row, named_image_content, text_content
from jina_v4_client.embed.errors import UsageError

STDIN = "-"
_BLOCK_BYTES = 2**20
_PARQUET_ROWS = 1024  # decoded at a time
_MAX_CELL = (
    2**27
)  # characters: longer than any text or image, so that a quote that is not closed does not take all memory
_UNDECODED = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of a byte that is not UTF-8
_NO_UTF8 = "not UTF-8; convert the file, as with: iconv -f WINDOWS-1252 -t UTF-8"
_LINE_ENDS = "a carriage return inside a line; if lines end with it, convert the file: tr '\\r' '\\n'"


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
    if isinstance(row_id, bytes):
        try:
            row_id = row_id.decode("utf-8")
        except UnicodeDecodeError as error:
            where = f"{error.reason} at byte {error.start + 1}"
            return broken_row(number, f"the id in {columns.id!r} is binary and not UTF-8 ({where}); write ids as text")
    if row_id in (None, "") or row_id != row_id:  # NaN, as pandas writes a missing number
        return broken_row(number, f"nothing in the column {columns.id!r}, which holds the ids")
    if isinstance(row_id, Mapping | list):
        return broken_row(number, f"{columns.id!r} holds no id but a value of type {type(row_id).__name__}")
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
            return make_row(row_id, partial(bytes_content, value))
        if isinstance(value, str) and value:
            return make_row(row_id, partial(named_image_content, value, folder))
    elif isinstance(value, str):
        return make_row(row_id, partial(text_content, value))
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
            elif "\r" in line:
                yield broken_row(number, _LINE_ENDS)
            else:
                yield make_row(number, partial(text_content, line))

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
        UsageError: a column is not there, or there twice.
    """

    path: str
    columns: Columns

    def __post_init__(self) -> None:
        """Look at the columns."""
        if self.path != STDIN:
            with _opened_text(self.path) as file:
                self._names(_Records(file, self._delimiter))

    def rows(self) -> Iterator[Row]:
        """Give the rows in order."""
        with _opened_text(self.path) as file:
            records = _Records(file, self._delimiter)
            names = self._names(records)
            for number, (line, cells, error) in enumerate(records, 1):
                row_id = _id(self.path, number)
                if error:
                    yield broken_row(row_id, f"line {line}: {error}")
                elif len(cells) > len(names):
                    yield broken_row(row_id, f"line {line}: more than {len(names)} cells; is a quote missing?")
                elif any(map(_UNDECODED.search, cells)):
                    yield broken_row(row_id, f"line {line}: {_NO_UTF8}")
                else:
                    yield row_of(dict(zip(names, cells, strict=False)), row_id, self.columns, _folder(self.path))

    def count(self) -> int | None:
        """Count the rows, about, for the progress; None if that cannot be done."""
        n_lines = _count_lines(self.path)
        return None if n_lines is None else max(n_lines - 1, 0)

    @property
    def _delimiter(self) -> str:
        return "\t" if self.path.lower().endswith(".tsv") else ","

    def _names(self, records: "_Records") -> list[str]:
        """Read the names of the columns, and check them."""
        _, names, error = next(records, (1, [], ""))
        _check_encoding(self.path, "".join(names).encode("utf-8", "surrogateescape"))
        if not error and any(map(_UNDECODED.search, names)):
            error = _NO_UTF8
        if error:
            raise UsageError(f"{_name(self.path)} is no CSV: the names of its columns, line 1: {error}")
        check_columns(self.path, self.columns, names)
        return names


class _Records:
    """The records of a CSV file: for each the line it begins in, its cells, and what is wrong with it.

    An unclosed quote swallows all lines up to the next quote, or to the end. So after a broken record, reading goes on
    in the line after the one in which that record begins.
    """

    def __init__(self, lines: Iterable[str], delimiter: str) -> None:
        csv.field_size_limit(_MAX_CELL)
        self._lines, self._delimiter = iter(lines), delimiter
        self._number = 0  # of lines that are behind us
        self._again: deque[str] = deque()  # lines to be read once more
        self._read: list[str] = []  # lines of this record
        self._reader = self._begin()

    def __iter__(self) -> Self:
        """Return this iterator."""
        return self

    def __next__(self) -> tuple[int, list[str], str]:
        """Return the next record that is not an empty line."""
        while True:
            self._number += len(self._read)
            self._read = []
            try:
                cells, error = next(self._reader), ""
            except csv.Error as broken:
                cells, error = [], f"no CSV ({broken}); is a quote missing, or not doubled within quotes?"
                self._again.extendleft(reversed(self._read[1:]))
                del self._read[1:]
                self._reader = self._begin()
            if cells or error:
                return self._number + 1, cells, error

    def _begin(self) -> "Iterator[list[str]]":
        return csv.reader(self._take(), delimiter=self._delimiter, strict=True)

    def _take(self) -> Iterator[str]:
        while True:
            line = self._again.popleft() if self._again else next(self._lines, None)
            if line is None:
                return
            self._read.append(line)
            yield line


@dataclass(frozen=True)
class Parquet:
    """A parquet file.

    Raises:
        UsageError: it is none, or a column is not there, or there twice.
    """

    path: str
    columns: Columns

    def __post_init__(self) -> None:
        """Look at the columns."""
        if self.path == STDIN:
            raise UsageError("parquet cannot be read from the standard input; give a file")
        check_columns(self.path, self.columns, self._file().schema_arrow.names)

    def rows(self) -> Iterator[Row]:
        """Yield the rows in order; those after the first damage in a row group have no content."""
        file, number = self._file(), 0
        for group in range(file.num_row_groups):
            end = number + file.metadata.row_group(group).num_rows
            try:
                for record in self._records(file, group):
                    number += 1
                    if isinstance(record, str):
                        yield broken_row(_id(self.path, number), record)
                    else:
                        yield row_of(record, _id(self.path, number), self.columns, _folder(self.path))
            except (OSError, ValueError) as error:
                while number < end:
                    number += 1
                    yield broken_row(_id(self.path, number), f"broken parquet, in row group {group + 1} ({error})")

    def _records(self, file: Any, group: int) -> Iterator[dict[str, Any] | str]:
        """Yield the rows of a row group; a string says why one cannot be decoded."""
        # The same column twice is once in the answer.
        columns = list(dict.fromkeys(self.columns.all()))
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, row_groups=[group], columns=columns):
            try:
                yield from batch.to_pylist()
            except (ValueError, OverflowError):
                for i in range(len(batch)):
                    try:
                        yield from batch.slice(i, 1).to_pylist()
                    except UnicodeDecodeError as error:
                        yield f"a text that is not UTF-8 ({error.reason} at byte {error.start + 1})"
                    except (ValueError, OverflowError) as error:  # a time out of range, or of an unknown zone
                        types = ", ".join(f"{field.name}: {field.type}" for field in batch.schema)
                        yield f"a value that Python cannot hold ({error}) in {types}"

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
    """Refuse a table that lacks a column, or has it twice."""
    for column in columns.all():
        if column not in names:
            there = ", ".join(map(repr, names)) or "none"
            raise UsageError(
                f"{_name(path)} has no column {column!r}; it has {there}: "
                "name yours with --text-column, --image-column or --id-column"
            )
        if names.count(column) > 1:
            raise UsageError(f"{_name(path)} has {names.count(column)} columns {column!r}; rename all but one")


def _lines(path: str) -> Iterator[tuple[str, str, str]]:
    """Give for each line that is not empty its id, its text without the line's end, and what is wrong with it."""
    with _opened(path) as file:
        for number, raw in enumerate(file, 1):
            if number == 1:
                _check_encoding(path, raw)
            line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            line = line.rstrip(b"\r\n")
            if not line.strip():
                continue
            try:
                yield _id(path, number), line.decode("utf-8"), ""
            except UnicodeDecodeError as error:
                where = f"byte {error.start + 1} of the line, 0x{line[error.start]:02x}"
                yield _id(path, number), "", f"line {number}: {where}, is {_NO_UTF8}"


def _check_encoding(path: str, head: bytes) -> None:
    """Refuse a file in UTF-16 or UTF-32, of which no line is UTF-8."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")) or b"\0" in head[:4]:
        raise UsageError(
            f"{_name(path)}, line 1: it begins like UTF-16 or UTF-32, not like UTF-8; convert the file, as with: "
            "iconv -f UTF-16 -t UTF-8"
        )


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
        text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
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
