"""What the command line names as inputs, as sources of rows."""

import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from jina_v4_client._images import NOT_READ
from jina_v4_client.embed.content import Content, Row
from jina_v4_client.embed.errors import UsageError
from jina_v4_client.embed.files import kind_of
from jina_v4_client.embed.folder import Folder, LeftOut, is_read_with, open_file
from jina_v4_client.embed.tables import STDIN, Columns, Csv, JsonLines, Parquet, TextLines

_NAMED = 10  # of many names, this many are printed
FORMATS = ("jsonl", "csv", "parquet", "text")
_FORMAT_OF = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}


class Source(Protocol):
    """Something that has rows."""

    @property
    def path(self) -> str:
        """The path as it was given."""

    def rows(self) -> Iterator[Row]:
        """Give the rows in order, each time the same."""

    def count(self) -> int | None:
        """Count the rows, about; None if that cannot be done."""


@dataclass
class Names:
    """How many rows or files there are of a kind, and the names of the first."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.first) < _NAMED:
            self.first.append(name)

    def __str__(self) -> str:
        """Return the names, and how many more there are."""
        more = self.count - len(self.first)
        return ", ".join(self.first) + (f" and {more:,} more" if more else "")


@dataclass(frozen=True)
class Inputs:
    """All inputs of a run, one behind the other.

    Attributes:
        notes: the remarks on rows whose content this run has read, and the ids of those rows.
    """

    sources: Sequence[Source]
    notes: dict[str, Names] = field(default_factory=dict)

    def rows(self) -> Iterator[Row]:
        """Give all rows in order."""
        for source in self.sources:
            for row in source.rows():
                yield Row(row.id, lambda row=row: self._noted(row))  # type: ignore[misc] # mypy infers no lambda that has a default

    def left_out(self) -> Iterator[LeftOut]:
        """Yield the files of folders that have no rows."""
        for source in self.sources:
            if isinstance(source, Folder):
                yield from source.left_out()

    def check_apart(self, output: Path, files: Sequence[Path]) -> None:
        """Refuse an output that would replace an input, or that is in a folder that is read.

        Args:
            output: as it was given.
            files: that the run writes.

        Raises:
            UsageError: an input and the output are not apart.
        """
        for source in self.sources:
            if isinstance(source, Folder):
                if is_read_with(output.resolve(), Path(source.path).resolve()):
                    raise UsageError(f"OUTPUT {output} is in the INPUT {source.path}; choose an OUTPUT outside of it")
            elif source.path != STDIN and any(file.exists() and file.samefile(source.path) for file in files):
                raise UsageError(f"OUTPUT {output} would replace the INPUT {source.path}; choose another OUTPUT")

    def _noted(self, row: Row) -> Content:
        content = row.read()
        if content.note is not None:
            self.notes.setdefault(content.note, Names()).add(row.id)
        return content

    def count(self) -> int | None:
        """Count the rows, about; None if that cannot be done."""
        counts = [source.count() for source in self.sources]
        return None if None in counts else sum(count or 0 for count in counts)

    def fingerprints(self) -> list[dict[str, object]]:
        """Describe the inputs, so that a change is seen: files by size and time of modification."""
        return [_fingerprint(source) for source in self.sources]

    @property
    def told_apart_by_content(self) -> bool:
        """Whether a change can be seen only by reading: the standard input has neither size nor time."""
        return any(source.path == STDIN for source in self.sources)


def open_inputs(paths: Sequence[str], columns: Columns, input_format: str | None, pdf_scale: float) -> Inputs:
    """Open inputs.

    Args:
        paths: as they were given.
        columns: of the tables.
        input_format: of files and of the standard input; None to go by the file's ending, JSON lines for the standard
            input.
        pdf_scale: pixels a point.

    Raises:
        UsageError: one is not there, of no known format, or lacks a column.
    """
    if paths.count(STDIN) > 1:
        raise UsageError("the standard input can be read once only")
    return Inputs([open_input(path, columns, input_format, pdf_scale) for path in paths])


def open_input(path: str, columns: Columns, input_format: str | None, pdf_scale: float) -> Source:
    """Open one input; see `open_inputs`."""
    ending, why = Path(path).suffix.lower(), ""
    if path != STDIN:
        try:
            mode = Path(path).stat().st_mode
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UsageError(f"{path} is not there") from error
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from error
        if stat.S_ISDIR(mode):
            return Folder(path, pdf_scale)
        if not stat.S_ISREG(mode):
            raise UsageError(f"{path} is neither a file nor a folder; pipe it into `-`")
        if input_format is None and ending not in _FORMAT_OF:
            kind, why = kind_of(path)
            if kind is not None:
                return open_file(path, kind, pdf_scale)
    match input_format or ("jsonl" if path == STDIN else _FORMAT_OF.get(ending)):
        case "jsonl":
            return JsonLines(path, columns)
        case "csv":
            return Csv(path, columns)
        case "parquet":
            return Parquet(path, columns)
        case "text":
            return TextLines(path)
        case _ if why != NOT_READ:
            raise UsageError(f"{path}: {why}")
        case _:
            raise UsageError(
                f"{path}: {why}. If it is a table or text, say so with --input-format, one of {', '.join(FORMATS)}; "
                "or give images, PDF files or folders of these"
            )


def _fingerprint(source: Source) -> dict[str, object]:
    if source.path == STDIN:
        return {"path": STDIN}
    if isinstance(source, Folder):
        return {"path": source.path, **source.fingerprint()}
    try:
        status = Path(source.path).stat()
    except OSError as error:
        raise UsageError(f"{source.path} cannot be read: {error.strerror}") from error
    return {"path": source.path, "bytes": status.st_size, "modified_ns": status.st_mtime_ns}
