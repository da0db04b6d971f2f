"""Inputs that are looked at: image files, the pages of PDF files, and folders of both."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jina_v4_client.embed import missing
from jina_v4_client.embed.content import Content, Row, broken_row, file_content, make_row, picture_content
from jina_v4_client.embed.errors import RowError, UsageError

IMAGE_ENDINGS = (
    *(".avif", ".bmp", ".gif", ".ico", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm"),
    *(".qoi", ".tif", ".tiff", ".webp"),
)
PDF_ENDING = ".pdf"
_MAX_PAGE_PIXELS = 100_000_000  # a poster at a large scale would take all memory


@dataclass(frozen=True)
class ImageFile:
    """An image; its path is the id."""

    path: str

    def rows(self) -> Iterator[Row]:
        """Give the one row."""
        yield make_row(self.path, lambda: file_content(Path(self.path)))

    def count(self) -> int | None:
        """Count the rows."""
        return 1


@dataclass(frozen=True)
class Pdf:
    """A PDF file, a row a page; the id is the path and the number of the page.

    Attributes:
        scale: pixels a point; 1 is 72 dpi.
    """

    path: str
    scale: float

    def rows(self) -> Iterator[Row]:
        """Give the pages in order; a file that cannot be opened is one row without content."""
        try:
            document = _open_pdf(self.path)
        except RowError as error:
            yield broken_row(self.path, str(error))
            return
        with closing(document):
            for index in range(len(document)):
                yield make_row(f"{self.path}#{index + 1}", lambda index=index: self._render(document, index))  # type: ignore[misc]

    def count(self) -> int | None:
        """Count the pages."""
        try:
            with closing(_open_pdf(self.path)) as document:
                return len(document)
        except RowError:
            return 1

    def _render(self, document: Any, index: int) -> Content:
        import pypdfium2  # type: ignore[import-untyped] # it has no types

        try:
            with closing(document[index]) as page:
                width, height = page.get_size()  # points
                n_pixels = width * height * self.scale**2
                if not 1 <= n_pixels <= _MAX_PAGE_PIXELS:
                    raise RowError(
                        f"a page of {width:g} x {height:g} points at --pdf-scale {self.scale:g} is {n_pixels:.2g} "
                        f"pixels; 1 to {_MAX_PAGE_PIXELS:.0e} are rendered"
                    )
                # draw_annots and a white ground are the defaults: what a reader of the file sees.
                picture = page.render(scale=self.scale).to_pil().convert("RGB")
        except (pypdfium2.PdfiumError, ValueError, OSError) as error:
            raise RowError(f"the page cannot be rendered ({error})") from error
        return picture_content(picture)


@dataclass(frozen=True)
class Folder:
    """The images and PDF files below a folder, sorted by name; names that begin with a dot are left out."""

    path: str
    pdf_scale: float

    def rows(self) -> Iterator[Row]:
        """Give the rows in order."""
        for file in self._files():
            yield from self._source(file.path).rows()

    def count(self) -> int | None:
        """Count the rows."""
        counts = [self._source(file.path).count() or 0 for file in self._files()]
        if not counts:
            raise UsageError(f"{self.path} holds neither images nor PDF files")
        return sum(counts)

    def fingerprint(self) -> dict[str, object]:
        """Describe the files, so that a change is seen."""
        listing, n_files = hashlib.sha256(), 0
        for file in self._files():
            status = file.stat()
            listing.update(f"{file.path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
            n_files += 1
        return {"files": n_files, "listing": listing.hexdigest()}

    def _source(self, path: str) -> "ImageFile | Pdf":
        return Pdf(path, self.pdf_scale) if path.lower().endswith(PDF_ENDING) else ImageFile(path)

    def _files(self) -> Iterator["os.DirEntry[str]"]:
        yield from _walk(self.path)


def _walk(folder: str) -> Iterator["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)  # no more in memory than one folder's names
    except OSError as error:
        raise UsageError(f"{folder} cannot be read: {error.strerror}") from error
    for entry in listed:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path)
        elif Path(entry.name).suffix.lower() in (*IMAGE_ENDINGS, PDF_ENDING) and entry.is_file():
            yield entry


def check_pdf_reader() -> None:
    """Refuse PDF files where pypdfium2 is not installed."""
    try:
        import pypdfium2  # noqa: F401 - is it there?
    except ModuleNotFoundError as error:
        raise UsageError(missing("pypdfium2")) from error


def _open_pdf(path: str) -> Any:
    check_pdf_reader()
    import pypdfium2

    try:
        return pypdfium2.PdfDocument(path)
    except (pypdfium2.PdfiumError, OSError) as error:
        locked = "password" in str(error).lower()
        raise RowError("encrypted: it needs a password" if locked else f"a broken PDF file ({error})") from error
