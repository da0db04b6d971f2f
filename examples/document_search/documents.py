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

from jina_v4_client._images import open_image, why_not_read
from jina_v4_client.embed.content import Row
from jina_v4_client.embed.errors import RowError
from jina_v4_client.embed.files import kind_of
from jina_v4_client.embed.folder import walk
from jina_v4_client.embed.pages import Tiff, open_pdf, render_page
from PIL import Image, UnidentifiedImageError

from document_search.errors import DocumentError, UsageError

# Of files that are dropped on the page, by the start of their content.
PICTURE_FORMATS = {"PNG": ".png", "JPEG": ".jpg", "MPO": ".jpg", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"}
PICTURE_FORMATS |= {"TIFF": ".tiff"}
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
            with open_image(io.BytesIO(self.content)) as picture:
                _check_size(picture, str(self.path))
                return picture.convert("RGB")
        except DocumentError:
            raise
        except UnidentifiedImageError as error:
            raise DocumentError(f"{self.path}: {why_not_read(self.content[:1024])}") from error
        except Exception as error:  # Pillow's readers raise whatever a broken file makes them stumble over
            raise DocumentError(f"{self.path}: a broken picture ({type(error).__name__}: {error})") from error


class Scan(Document):
    """A TIFF file of several pages, the same as `jina-v4-embed` makes of it. It is read again, by its path."""

    def count(self) -> int:
        """Count the pages."""
        return Tiff(str(self.path)).count()

    def pages(self, scale: float) -> Iterator[Rendered | DocumentError]:  # noqa: ARG002 - as of any document
        """Give all pages."""
        for number, row in enumerate(Tiff(str(self.path)).rows(), 1):
            try:
                yield self._render(number, row)
            except DocumentError as error:
                yield error
        if hashlib.sha256(self.path.read_bytes()).hexdigest() != self.digest:
            raise DocumentError(f"{self.path}: it changed while it was read")

    def page(self, number: int, scale: float) -> Image.Image:  # noqa: ARG002 - as of any document
        """Give one page."""
        for n, row in enumerate(Tiff(str(self.path)).rows(), 1):
            if n == number:
                return self._render(number, row).picture
        raise DocumentError(f"{self.path} has no page {number}")

    def _render(self, number: int, row: Row) -> Rendered:
        try:
            picture = row.read().value
        except RowError as error:
            raise DocumentError(f"{self.path}, page {number}: {error}") from error
        if not isinstance(picture, Image.Image):
            raise DocumentError(f"{self.path} has changed since it was opened")
        _check_size(picture, f"{self.path}, page {number}")
        return Rendered(number, picture, picture)


def _check_size(picture: Image.Image, where: str) -> None:
    if picture.width * picture.height > MAX_PICTURE_PIXELS:
        raise DocumentError(f"{where}: more than {MAX_PICTURE_PIXELS // 10**6} million pixels")


def read_document(path: Path) -> Document:
    """Read a PDF file or a picture, as `jina-v4-embed` tells them apart.

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
    kind, _ = kind_of(path)
    several = kind == "tiff" and Tiff(str(path)).count() > 1
    document = Pdf if kind == "pdf" else Scan if several else Picture
    return document(path, content, hashlib.sha256(content).hexdigest())


def suffix_of(content: bytes) -> str | None:
    """Tell by the content what the name of a file must end with; None for neither a PDF file nor a picture."""
    if b"%PDF-" in content[:1024]:
        return ".pdf"
    try:
        with Image.open(io.BytesIO(content), formats=_readers()) as picture:
            return PICTURE_FORMATS.get(picture.format or "")
    except Exception:  # as above
        return None


def find_files(inputs: Sequence[Path], index: Path) -> tuple[list[Path], list[str]]:
    """Find the files to index, in folders those that `jina-v4-embed` finds.

    Args:
        inputs: PDF files, pictures, and folders that are searched for both.
        index: the folder of the index, whose own files are passed over.

    Returns:
        Each file once; and the files of folders that are left out, each with why.

    Raises:
        UsageError: one does not exist or is of another kind, or there are none.
    """
    files: dict[Path, None] = {}
    left_out: list[str] = []
    for path in inputs:
        if not path.exists():
            raise UsageError(f"{path} does not exist")
        is_folder = path.is_dir()
        for name, why_not in walk(str(path)) if is_folder else [(str(path), "")]:
            kind, why = (None, why_not) if why_not else kind_of(name)
            why = why.removesuffix("; give it as an INPUT of its own")  # which is for jina-v4-embed
            if kind is not None:
                files[Path(name).resolve()] = None
            elif is_folder and not Path(name).resolve().is_relative_to(index.resolve()):
                left_out.append(f"{name}: {why}")
            elif not is_folder:
                raise UsageError(f"{name} is neither a PDF file nor a picture ({why})")
    if not files:
        raise UsageError(f"no PDF files or pictures in {', '.join(map(str, inputs))}")
    return [*files], left_out


def _readers() -> list[str]:
    """Return the names of Pillow's readers; that of JPEG also reads MPO."""
    return [name for name in PICTURE_FORMATS if name != "MPO"]
