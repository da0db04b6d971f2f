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
from typing import IO, Any

from jina_v4_client.embed import check_installed
from jina_v4_client.embed.content import (
    Content,
    Row,
    broken_row,
    bytes_content,
    make_row,
    named_image_content,
    text_content,
)
from jina_v4_client.embed.errors import RowError, UsageError

STDIN = "-"
_BLOCK_BYTES = 2**20
_HEAD_BYTES = 4  # of the first line, which show UTF-16, UTF-32 and compression
_COMPRESSED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zX", b"BZh9", b"PK\x03\x04")  # gzip, zstd, xz, bzip2, zip
_PARQUET_ROWS = 1024  # decoded at a time
# Characters. No text or image is longer, and a quote that is not closed must not take all memory.
_MAX_CELL = 2**27
_UNDECODED = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of a byte that is not UTF-8
# A time out of range, or of an unknown zone, which is a KeyError before pyarrow 26.
_NOT_HELD = (ValueError, OverflowError, KeyError)
_NO_UTF8 = "not UTF-8; convert the file, as with: iconv -f WINDOWS-1252 -t UTF-8"
_LINE_ENDS = "a carriage return inside a line; if lines end with it, convert the file: tr '\\r' '\\n'"


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold the content and the id; a row has a text or an image."""

    text: str | None
    image: str | None
    id: str | None

    def content(self) -> list[str]:
        """Return the columns that hold content."""
        return [name for name in (self.text, self.image) if name is not None]

    def all(self) -> list[str]:
        """Return the columns that are read, each once."""
        return list(dict.fromkeys([*self.content(), *([] if self.id is None else [self.id])]))

    def row(self, record: Mapping[str, Any], number: str, folder: Path) -> Row:
        """Make a row of a record.

        Args:
            record: values by column.
            number: the id where no column holds one, or it holds none for this record.
            folder: what the paths of images are relative to.
        """
        try:
            row_id = number if self.id is None else _read_id(record.get(self.id), self.id)
        except RowError as error:
            return broken_row(number, str(error))
        text, image = (None if name is None else record.get(name) for name in (self.text, self.image))
        return make_row(row_id, partial(_read_content, text, image, self, folder))


def _read_id(value: Any, column: str) -> str:
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            where = f"{error.reason} at byte {error.start + 1}"
            raise RowError(f"the id in {column!r} is binary and not UTF-8 ({where}); write ids as text") from error
    if value in (None, "") or value != value:  # NaN, as pandas writes a missing number
        raise RowError(f"nothing in the column {column!r}, which holds the ids")
    if isinstance(value, Mapping | list):
        raise RowError(f"{column!r} holds no id but a value of type {type(value).__name__}")
    return str(value)


def _read_content(text: Any, image: Any, columns: Columns, folder: Path) -> Content:
    # An empty text is a text, but where a row may have an image instead it is the lack of one.
    nothing = (None,) if columns.text is None or columns.image is None else (None, "")
    has_text, has_image = text not in nothing, image not in nothing
    if has_text == has_image:
        names = " and ".join(map(repr, columns.content()))
        raise RowError(f"{'both' if has_text else 'nothing in'} {names}; a row needs one text or image")
    if has_text:
        if isinstance(text, str):
            return text_content(text)
        raise RowError(f"{columns.text!r} holds no text but a value of type {type(text).__name__}")
    # As Hugging Face's datasets write images: the file's bytes, or its path.
    value = image.get("bytes") or image.get("path") if isinstance(image, Mapping) else image
    if isinstance(value, bytes):
        return bytes_content(value)
    if isinstance(value, str) and value:
        return named_image_content(value, folder)
    raise RowError(f"{columns.image!r} holds no path, URL or file but a value of type {type(value).__name__}")


class _Lines:
    """A file with a row a line; the id is the number of the line. Empty lines are no rows.

    Raises:
        UsageError: it is UTF-16 or UTF-32, compressed, or a JSON array.
    """

    path: str

    def __post_init__(self) -> None:
        """Check how it begins."""
        if self.path != STDIN:
            with _opened(self.path) as file:
                self._check(file.readline(_HEAD_BYTES))

    def rows(self) -> Iterator[Row]:
        """Yield the rows in order."""
        with _opened(self.path) as file:
            for number, raw in enumerate(file, 1):
                if number == 1:
                    self._check(raw[:_HEAD_BYTES])
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                line = raw.rstrip(b"\r\n")
                if not line.strip():
                    continue
                row_id = _id(self.path, number)
                try:
                    row = self._row(row_id, line.decode("utf-8"))
                except UnicodeDecodeError as error:
                    where = f"byte {error.start + 1} of the line, 0x{line[error.start]:02x}"
                    row = broken_row(row_id, f"line {number}: {where}, is {_NO_UTF8}")
                yield row

    def count(self) -> int | None:
        """Count the lines, for the progress; None for the standard input."""
        return _count_lines(self.path)

    def _check(self, head: bytes) -> None:
        _check_head(self.path, head)

    def _row(self, row_id: str, line: str) -> Row:
        raise NotImplementedError


@dataclass(frozen=True)
class TextLines(_Lines):
    """One text a line."""

    path: str

    def _row(self, row_id: str, line: str) -> Row:
        return broken_row(row_id, _LINE_ENDS) if "\r" in line else make_row(row_id, partial(text_content, line))


@dataclass(frozen=True)
class JsonLines(_Lines):
    """One JSON object a line."""

    path: str
    columns: Columns

    def _check(self, head: bytes) -> None:
        super()._check(head)
        if head.removeprefix(b"\xef\xbb\xbf").startswith(b"["):
            raise UsageError(f"{_name(self.path)} is a JSON array, not an object a line; convert it: jq -c '.[]'")

    def _row(self, row_id: str, line: str) -> Row:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            return broken_row(row_id, f"no JSON ({error})")
        if not isinstance(record, dict):
            return broken_row(row_id, f"no JSON object but a value of type {type(record).__name__}")
        return self.columns.row(record, row_id, _folder(self.path))


@dataclass(frozen=True)
class Csv:
    """A table with a line of column names, separated by commas, or by tabs in a .tsv.

    Raises:
        UsageError: a column is missing or duplicated.
    """

    path: str
    columns: Columns

    def __post_init__(self) -> None:
        """Check the columns."""
        if self.path != STDIN:
            with _opened_text(self.path) as file:
                self._names(self._records(file))

    def rows(self) -> Iterator[Row]:
        """Yield the rows in order."""
        with _opened_text(self.path) as file:
            records = self._records(file)
            names = self._names(records)
            for number, (line, cells, error) in enumerate(records, 1):
                row_id = _id(self.path, number)
                if not error and len(cells) > len(names):
                    error = f"more than {len(names)} cells; is a quote missing?"
                if error:
                    yield broken_row(row_id, f"line {line}: {error}")
                else:
                    yield self.columns.row(dict(zip(names, cells, strict=False)), row_id, _folder(self.path))

    def count(self) -> int | None:
        """Count the lines below the first, for the progress; None for the standard input."""
        n_lines = _count_lines(self.path)
        return None if n_lines is None else max(n_lines - 1, 0)

    def _records(self, lines: Iterable[str]) -> "Iterator[_Record]":
        return _read_records(iter(lines), "\t" if self.path.lower().endswith(".tsv") else ",")

    def _names(self, records: "Iterator[_Record]") -> list[str]:
        """Read the names of the columns, and check them."""
        _, names, error = next(records, (1, [], ""))
        _check_head(self.path, "".join(names).encode("utf-8", "surrogateescape"))
        if error:
            raise UsageError(f"{_name(self.path)} is no CSV: the names of its columns, line 1: {error}")
        _check_columns(self.path, self.columns, names)
        return names


_Record = tuple[int, list[str], str]  # the line it begins in, its cells, and what is wrong with it


def _read_records(lines: Iterator[str], delimiter: str) -> Iterator[_Record]:
    """Yield the records of a CSV file that are not empty lines.

    An unclosed quote swallows all lines up to the next quote, or to the end. So after a broken record, reading goes on
    in the line after the one in which that record begins.
    """
    csv.field_size_limit(_MAX_CELL)
    again: deque[str] = deque()  # lines to be read once more
    taken: list[str] = []  # the lines of this record
    n_before = 0  # lines before it

    def take() -> Iterator[str]:
        while (line := again.popleft() if again else next(lines, None)) is not None:
            taken.append(line)
            yield line

    def begin() -> "Iterator[list[str]]":
        return csv.reader(take(), delimiter=delimiter, strict=True)

    reader = begin()
    while True:
        try:
            cells = next(reader)
            error = _NO_UTF8 if any(map(_UNDECODED.search, cells)) else ""
        except StopIteration:
            return
        except csv.Error as broken:
            cells, error = [], f"no CSV ({broken}); is a quote missing, or not doubled within quotes?"
            again.extendleft(reversed(taken[1:]))
            del taken[1:]
            reader = begin()
        if cells or error:
            yield n_before + 1, cells, error
        n_before += len(taken)
        taken.clear()


@dataclass(frozen=True)
class Parquet:
    """A parquet file.

    Raises:
        UsageError: it is none, or a column is missing or duplicated.
    """

    path: str
    columns: Columns

    def __post_init__(self) -> None:
        """Check the columns."""
        if self.path == STDIN:
            raise UsageError("parquet cannot be read from the standard input; give a file")
        _check_columns(self.path, self.columns, self._file().schema_arrow.names)

    def rows(self) -> Iterator[Row]:
        """Yield the rows in order; those after the first damage in a row group have no content."""
        file, number = self._file(), 0
        for group in range(file.num_row_groups):
            end = number + file.metadata.row_group(group).num_rows
            try:
                for record in self._records(file, group):
                    number += 1
                    row_id = _id(self.path, number)
                    if isinstance(record, str):
                        yield broken_row(row_id, record)
                    else:
                        yield self.columns.row(record, row_id, _folder(self.path))
            except (OSError, ValueError) as error:
                while number < end:
                    number += 1
                    yield broken_row(_id(self.path, number), f"broken parquet, in row group {group + 1} ({error})")

    def _records(self, file: Any, group: int) -> Iterator[dict[str, Any] | str]:
        """Yield the rows of a row group; a string says why one cannot be decoded."""
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, row_groups=[group], columns=self.columns.all()):
            try:
                yield from batch.to_pylist()
            except _NOT_HELD:
                for i in range(len(batch)):
                    try:
                        yield from batch.slice(i, 1).to_pylist()
                    except UnicodeDecodeError as error:
                        yield f"a text that is not UTF-8 ({error.reason} at byte {error.start + 1})"
                    except _NOT_HELD as error:
                        types = ", ".join(f"{field.name}: {field.type}" for field in batch.schema)
                        yield f"a value that Python cannot hold ({error}) in {types}"

    def count(self) -> int | None:
        """Count the rows."""
        return int(self._file().metadata.num_rows)

    def _file(self) -> Any:
        check_installed("pyarrow")
        from pyarrow import parquet  # type: ignore[import-untyped] # it has no types

        try:
            # A block at a time: by default the whole row group is in memory.
            return parquet.ParquetFile(self.path, buffer_size=_BLOCK_BYTES, pre_buffer=False)
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise UsageError(f"{self.path} is no parquet file ({error})") from error


def _check_columns(path: str, columns: Columns, names: list[str]) -> None:
    """Refuse a table in which a column is missing or duplicated."""
    for column in columns.all():
        if column not in names:
            there = ", ".join(map(repr, names)) or "none"
            raise UsageError(
                f"{_name(path)} has no column {column!r}; it has {there}: "
                "name yours with --text-column, --image-column or --id-column"
            )
        if names.count(column) > 1:
            raise UsageError(f"{_name(path)} has {names.count(column)} columns {column!r}; rename all but one")


def _check_head(path: str, head: bytes) -> None:
    """Refuse a file that is compressed, or in UTF-16 or UTF-32: no line of it is UTF-8."""
    if head.startswith(_COMPRESSED):
        raise UsageError(
            f"{_name(path)} is compressed, as .gz, .zip and .xlsx files are; decompress it, or save the sheet as CSV"
        )
    if head.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")) or b"\0" in head[:_HEAD_BYTES]:
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
        file = Path(path).open("rb")  # noqa: SIM115 - an error while it is read is not about opening it
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
