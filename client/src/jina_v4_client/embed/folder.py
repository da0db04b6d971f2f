"""Folders. Every file below one is a row or several, or it is left out and reported."""

import hashlib
import os
from collections.abc import Iterator, Set
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from jina_v4_client.embed.content import Row, escaped
from jina_v4_client.embed.errors import UsageError
from jina_v4_client.embed.files import kind_of
from jina_v4_client.embed.pages import Pages, open_pages


class LeftOut(NamedTuple):
    """A file that has no rows, and why; both can be written as UTF-8."""

    path: str
    why: str


@dataclass(frozen=True)
class Folder:
    """The images and PDF files below a folder, sorted by name; names that begin with a dot are left out.

    A linked folder is read once, and not again if it is below this folder or another linked one.
    """

    path: str
    pdf_scale: float

    def rows(self) -> Iterator[Row]:
        """Yield the rows in order."""
        for file in self._files():
            yield from file.rows()

    def count(self) -> int | None:
        """Count the rows.

        Raises:
            UsageError: there are none.
        """
        counts = [file.count() for file in self._files()]
        if not counts:
            left_out = "".join(f"; {entry.path}: {entry.why}" for entry in islice(self.left_out(), 3))
            raise UsageError(f"{self.path} holds neither images nor PDF files{left_out}")
        return sum(counts)

    def left_out(self) -> Iterator[LeftOut]:
        """Yield the files that have no rows, in order."""
        return (entry for entry in self._entries() if isinstance(entry, LeftOut))

    def fingerprint(self) -> dict[str, object]:
        """Describe the files that have rows, so that a change is seen."""
        listing, n_files = hashlib.sha256(), 0
        for file in self._files():
            try:
                status = Path(file.path).stat()
            except OSError as error:
                raise UsageError(f"{file.path} cannot be read: {error.strerror}") from error
            listing.update(f"{file.path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
            n_files += 1
        return {"files": n_files, "listing": listing.hexdigest()}

    def _files(self) -> Iterator[Pages]:
        return (entry for entry in self._entries() if not isinstance(entry, LeftOut))

    def _entries(self) -> Iterator[Pages | LeftOut]:
        for path, why_not in walk(self.path):
            kind, why = (None, why_not) if why_not else kind_of(path)
            yield LeftOut(escaped(path), escaped(why)) if kind is None else open_pages(path, kind, self.pdf_scale)


def walk(folder: str) -> Iterator[tuple[str, str]]:
    """Yield the files below a folder in order: the path, and why it cannot be read ("" if it can)."""
    real = Path(folder).resolve()
    return _below(folder, real, (real,), {real})


def _below(folder: str, real: Path, chain: tuple[Path, ...], read: set[Path]) -> Iterator[tuple[str, str]]:
    """Yield what is below a folder.

    Args:
        folder: as it is named in paths.
        real: the same without links.
        chain: the input, and the linked folders on the way from it to this folder.
        read: the input and all linked folders that were entered; each is read as a whole.
    """
    try:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)  # no more in memory than one folder's names
    except OSError as error:
        raise UsageError(f"{folder} cannot be read: {error.strerror}") from error
    for entry in listed:
        if entry.name.startswith("."):
            continue
        path = Path(entry.path)
        try:
            if path.is_dir():
                target, through = real / entry.name, chain
                if entry.is_symlink():
                    target = path.resolve()
                    if is_read_with(target, read):
                        continue
                    if any(other.is_relative_to(target) for other in chain):
                        yield entry.path, "a link to a folder that this one is in"
                        continue
                    through = (*chain, target)
                    read.add(target)
                elif target in read:  # an earlier link led into it
                    continue
                yield from _below(entry.path, target, through, read)
            elif path.is_file():
                yield entry.path, ""
            else:
                yield entry.path, "a link that leads nowhere" if entry.is_symlink() else "not a regular file"
        except OSError as error:
            yield entry.path, f"cannot be read: {error.strerror}"


def is_read_with(folder: Path, others: Set[Path]) -> bool:
    """Tell whether a folder is read with one of others: it is the same or below it, and not below a hidden name."""
    for part in (folder, *folder.parents):
        if part in others:
            return True
        if part.name.startswith("."):
            return False
    return False
