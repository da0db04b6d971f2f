"""What the command line names as inputs, as sources of rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from jina_v4_client.embed.content import Row
from jina_v4_client.embed.errors import UsageError
from jina_v4_client.embed.pages import IMAGE_ENDINGS, PDF_ENDING, Folder, ImageFile, Pdf, check_pdf_reader
from jina_v4_client.embed.tables import STDIN, Columns, Csv, JsonLines, Parquet, TextLines

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


@dataclass(frozen=True)
class Inputs:
    """All inputs of a run, one behind the other."""

    sources: Sequence[Source]

    def rows(self) -> Iterator[Row]:
        """Give all rows in order."""
        for source in self.sources:
            yield from source.rows()

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
    return Inputs([_open(path, columns, input_format, pdf_scale) for path in paths])


def _open(path: str, columns: Columns, input_format: str | None, pdf_scale: float) -> Source:
    ending = Path(path).suffix.lower()
    if path != STDIN:
        if not Path(path).exists():
            raise UsageError(f"{path} is not there")
        if Path(path).is_dir():
            return Folder(path, pdf_scale)
        if not Path(path).is_file():
            raise UsageError(f"{path} is neither a file nor a folder; pipe it into `-`")
        if input_format is None and ending in IMAGE_ENDINGS:
            return ImageFile(path)
        if input_format is None and ending == PDF_ENDING:
            check_pdf_reader()
            return Pdf(path, pdf_scale)
    match input_format or ("jsonl" if path == STDIN else _FORMAT_OF.get(ending)):
        case "jsonl":
            return JsonLines(path, columns)
        case "csv":
            return Csv(path, columns)
        case "parquet":
            return Parquet(path, columns)
        case "text":
            return TextLines(path)
        case _:
            raise UsageError(
                f"{path}: what it holds cannot be told by its name; say it with --input-format, one of "
                f"{', '.join(FORMATS)}, or give images, PDF files or folders of these"
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
