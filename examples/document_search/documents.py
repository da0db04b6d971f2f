"""PDF files and pictures as the pages that are embedded; PDF pages are rendered as `jina-v4-embed` renders them.

A file is read once: the digest and the pages are of the same bytes, also if somebody writes to it meanwhile.
"""

import hashlib
import io
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jina_v4_client.embed.errors import RowError
from jina_v4_client.embed.pages import open_pdf, render_page
from PIL import Image, UnidentifiedImageError

from document_search.errors import DocumentError, UsageError

# By the start of their content. EPS is left out: Pillow would start Ghostscript on a file from anywhere.
PICTURE_FORMATS = {"PNG": ".png", "JPEG": ".jpg", "MPO": ".jpg", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"}
PICTURE_FORMATS |= {"TIFF": ".tiff"}
_PICTURE_SUFFIXES = {*PICTURE_FORMATS.values(), ".jpeg", ".tif"}
MAX_PICTURE_PIXELS = 64_000_000  # what a server takes (JINA_V4_MAX_IMAGE_PIXELS)
_PDFIUM = threading.Lock()  # pdfium may be called by one thread at a time, whatever the documents


@dataclass(frozen=True)
class Rendered:
    """A page as it is seen.

    Attributes:
        picture: RGB.
        sent: what the model is sent: the picture, or the file that it comes from.
    """

    number: int
    picture: Image.Image
    sent: Image.Image | bytes


@dataclass(frozen=True)
class Document:
    """A file of pages. Made by :func:`read_document`.

    Attributes:
        path: absolute, so that the index can be used from any folder.
        digest: sha256 of content, in hexadecimal.
    """

    path: Path
    content: bytes
    digest: str

    def count(self) -> int:
        """Count the pages.

        Raises:
            DocumentError: the file is broken, encrypted or empty.
        """
        raise NotImplementedError

    def pages(self, scale: float) -> Iterator[Rendered | DocumentError]:
        """Render all pages in order; one that cannot be rendered is an error.

        Args:
            scale: pixels a point; 1 is 72 dpi. Pictures keep their pixels.

        Raises:
            DocumentError: the file is broken, encrypted or empty.
        """
        raise NotImplementedError

    def page(self, number: int, scale: float) -> Image.Image:
        """Render one page; numbers begin at 1."""
        raise NotImplementedError


class Pdf(Document):
    """A PDF file."""

    def count(self) -> int:
        """Count the pages."""
        with self._opened() as document:
            return len(document)

    def pages(self, scale: float) -> Iterator[Rendered | DocumentError]:
        """Render all pages."""
        with self._opened() as document:
            for number in range(1, len(document) + 1):
                try:
                    picture = self._render(document, number, scale)
                    yield Rendered(number, picture, picture)
                except DocumentError as error:
                    yield error

    def page(self, number: int, scale: float) -> Image.Image:
        """Render one page."""
        with self._opened() as document:
            return self._render(document, number, scale)

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            with _PDFIUM:
                document = open_pdf(self.content)
        except RowError as error:
            raise DocumentError(f"{self.path}: {error}") from error
        try:
            yield document
        finally:
            with _PDFIUM:
                document.close()

    def _render(self, document: Any, number: int, scale: float) -> Image.Image:
        try:
            with _PDFIUM:
                return render_page(document, number - 1, scale)
        except RowError as error:
            raise DocumentError(f"{self.path}, page {number}: {error}") from error


class Picture(Document):
    """A picture: one page. It is sent as it is, and shown as the model sees it: not turned by its EXIF data."""

    def count(self) -> int:
        """Check the file; it has one page."""
        self._open()
        return 1

    def pages(self, scale: float) -> Iterator[Rendered | DocumentError]:
        """Give the one page."""
        yield Rendered(1, self.page(1, scale), self.content)

    def page(self, number: int, scale: float) -> Image.Image:  # noqa: ARG002 - as of any document
        """Give the one page."""
        return self._open()

    def _open(self) -> Image.Image:
        try:
            with Image.open(io.BytesIO(self.content), formats=_readers()) as picture:
                if picture.width * picture.height > MAX_PICTURE_PIXELS:
                    raise DocumentError(f"{self.path}: more than {MAX_PICTURE_PIXELS // 10**6} million pixels")
                return picture.convert("RGB")
        except DocumentError:
            raise
        except UnidentifiedImageError as error:
            raise DocumentError(f"{self.path}: not a picture, or in a format that is not read here") from error
        except Exception as error:  # Pillow's readers raise whatever a broken file makes them stumble over
            raise DocumentError(f"{self.path}: a broken picture ({type(error).__name__}: {error})") from error


def read_document(path: Path) -> Document:
    """Read a PDF file or a picture, by the end of its name.

    Raises:
        DocumentError: it cannot be read, or its name cannot be stored.
    """
    path = path.resolve()
    try:
        str(path).encode()
        content = path.read_bytes()
    except UnicodeEncodeError as error:
        raise DocumentError(
            f"{str(path).encode('utf-8', 'backslashreplace').decode()}: the name is not UTF-8"
        ) from error
    except OSError as error:
        raise DocumentError(f"{path} cannot be read: {error.strerror}") from error
    kind = Pdf if path.suffix.lower() == ".pdf" else Picture
    return kind(path, content, hashlib.sha256(content).hexdigest())


def suffix_of(content: bytes) -> str | None:
    """Tell by the content what the name of a file must end with; None for neither a PDF file nor a picture."""
    if b"%PDF-" in content[:1024]:
        return ".pdf"
    try:
        with Image.open(io.BytesIO(content), formats=_readers()) as picture:
            return PICTURE_FORMATS.get(picture.format or "")
    except Exception:  # as above
        return None


def find_files(inputs: Sequence[Path]) -> list[Path]:
    """Find the files to index.

    Args:
        inputs: PDF files, pictures, and folders that are searched for both.

    Returns:
        Each file once.

    Raises:
        UsageError: one does not exist or has another kind of name, or there are none.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += sorted(file for file in path.rglob("*") if _is_document(file) and file.is_file())
        elif not path.exists():
            raise UsageError(f"{path} does not exist")
        elif not _is_document(path):
            raise UsageError(
                f"{path} is neither a PDF file nor a picture by its name; it must end with .pdf, .png, ..."
            )
        else:
            files.append(path)
    if not files:
        raise UsageError(f"no PDF files or pictures in {', '.join(map(str, inputs))}")
    return list(dict.fromkeys(file.resolve() for file in files))


def _is_document(path: Path) -> bool:
    return path.suffix.lower() in {".pdf", *_PICTURE_SUFFIXES} and not path.name.startswith(".")


def _readers() -> list[str]:
    """Return the names of Pillow's readers; that of JPEG also reads MPO."""
    return [name for name in PICTURE_FORMATS if name != "MPO"]
