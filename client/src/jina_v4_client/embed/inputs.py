"""The inputs that the command line names, as sources of rows."""

import itertools
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_args

from jina_v4_client._images import NOT_READ
from jina_v4_client.embed.content import Row
from jina_v4_client.embed.errors import UsageError
from jina_v4_client.embed.files import TABLE_FORMATS, TableFormat, kind_of
from jina_v4_client.embed.folder import Folder, LeftOut, is_read_with
from jina_v4_client.embed.pages import open_pages
from jina_v4_client.embed.tables import STDIN, Columns, Csv, JsonLines, Parquet, TextLines


class Source(Protocol):
    """A file, a folder or the standard input."""

    @property
    def path(self) -> str:
        """The path as the command line names it."""

    def rows(self) -> Iterator[Row]:
        """Yield the rows, each time in the same order."""

    def count(self) -> int | None:
        """Count the rows; of tables, the lines they may be in. None if that cannot be done."""


@dataclass(frozen=True)
class Inputs:
    """All inputs of a run, one after the other."""

    sources: Sequence[Source]

    def rows(self) -> Iterator[Row]:
        """Yield all rows in order."""
        return itertools.chain.from_iterable(source.rows() for source in self.sources)

    def count(self) -> int | None:
        """Count the rows, about; None if that cannot be done."""
        counts = [source.count() for source in self.sources]
        return None if None in counts else sum(filter(None, counts))

    def left_out(self) -> Iterator[LeftOut]:
        """Yield the files of folders that have no rows."""
        return itertools.chain.from_iterable(one.left_out() for one in self.sources if isinstance(one, Folder))

    def fingerprints(self) -> list[dict[str, object]]:
        """Describe the inputs, so that a change is seen: files by size and time of modification."""
        return [{"path": source.path, **_fingerprint(source)} for source in self.sources]

    @property
    def has_stdin(self) -> bool:
        """Whether rows come from the standard input, whose fingerprint cannot show a change."""
        return any(source.path == STDIN for source in self.sources)

    def check_apart(self, output: Path, files: Sequence[Path]) -> None:
        """Refuse an output that would replace an input, or that is in a folder that is read.

        Args:
            output: as the command line names it.
            files: that the run writes.

        Raises:
            UsageError: an input and the output are not apart.
        """
        for source in self.sources:
            if isinstance(source, Folder):
                if is_read_with(output.resolve(), {Path(source.path).resolve()}):
                    raise UsageError(f"OUTPUT {output} is in the INPUT {source.path}; choose an OUTPUT outside of it")
            elif source.path != STDIN and any(file.exists() and file.samefile(source.path) for file in files):
                raise UsageError(f"OUTPUT {output} would replace the INPUT {source.path}; choose another OUTPUT")


def open_inputs(paths: Sequence[str], options: Mapping[str, Any]) -> Inputs:
    """Open inputs.

    Args:
        paths: as the command line names them.
        options: of the command, by the name of the flag.

    Raises:
        UsageError: one does not exist, has an unknown format, or lacks a column.
    """
    if paths.count(STDIN) > 1:
        raise UsageError("the standard input can be read once only")
    return Inputs([open_input(path, options) for path in paths])


def open_input(path: str, options: Mapping[str, Any]) -> Source:
    """Open one input; see `open_inputs`."""
    by_name = "jsonl" if path == STDIN else TABLE_FORMATS.get(Path(path).suffix.lower())
    table_format = options["input-format"] or by_name
    if path != STDIN:
        try:
            mode = Path(path).stat().st_mode
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UsageError(f"{path} is not there") from error
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from error
        if stat.S_ISDIR(mode):
            return Folder(path, options["pdf-scale"])
        if not stat.S_ISREG(mode):
            raise UsageError(f"{path} is neither a file nor a folder; pipe it into `-`")
    if table_format is None:
        kind, why = kind_of(path)
        if kind is not None:
            return open_pages(path, kind, options["pdf-scale"])
        if why == NOT_READ:
            formats = ", ".join(get_args(TableFormat))
            why += f". If it is a table or text, say so with --input-format, one of {formats}; "
            why += "or give images, PDF files or folders of these"
        raise UsageError(f"{path}: {why}")
    columns = Columns(options["text-column"], options["image-column"], options["id-column"])
    match table_format:
        case "text":
            return TextLines(path)
        case "jsonl":
            return JsonLines(path, columns)
        case "csv":
            return Csv(path, columns)
        case _:
            return Parquet(path, columns)


def _fingerprint(source: Source) -> dict[str, object]:
    if source.path == STDIN:
        return {}
    if isinstance(source, Folder):
        return source.fingerprint()
    try:
        status = Path(source.path).stat()
    except OSError as error:
        raise UsageError(f"{source.path} cannot be read: {error.strerror}") from error
    return {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}
