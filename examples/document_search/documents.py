"""PDF files as pictures of their pages.

A file is read once: the digest and the pages are of the same bytes, also if somebody writes to it meanwhile.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pypdfium2  # type: ignore[import-untyped] # it has no types
from PIL import Image

from document_search.errors import DocumentError, UsageError

MAX_PAGE_PIXELS = 100_000_000  # a poster at a large scale would take all memory


@dataclass(frozen=True)
class Document:
    """A PDF file.

    Attributes:
        path: absolute, so that the index can be used from any folder.
        digest: sha256 of content, in hexadecimal.
    """

    path: Path
    content: bytes
    digest: str

    def pages(self, scale: float) -> Iterator[Image.Image]:
        """Render all pages in order.

        Args:
            scale: pixels a point; 1 is 72 dpi.

        Raises:
            DocumentError: the file is broken, encrypted or empty, or a page cannot be rendered.
        """
        with closing(self._open()) as document:
            if len(document) == 0:
                raise DocumentError(f"{self.path} has no pages")
            for number in range(1, len(document) + 1):
                yield self._render(document, number, scale)

    def page(self, number: int, scale: float) -> Image.Image:
        """Render one page; numbers begin at 1."""
        with closing(self._open()) as document:
            return self._render(document, number, scale)

    def _open(self) -> Any:
        try:
            return pypdfium2.PdfDocument(self.content)
        except pypdfium2.PdfiumError as error:
            if "password" in str(error).lower():
                raise DocumentError(f"{self.path} is encrypted: it needs a password") from error
            raise DocumentError(f"{self.path} is broken or has no pages ({error})") from error

    def _render(self, document: Any, number: int, scale: float) -> Image.Image:
        try:
            with closing(document[number - 1]) as page:
                width, height = page.get_size()  # points
                if not 1 <= width * height * scale**2 <= MAX_PAGE_PIXELS:
                    raise DocumentError(
                        f"{self.path}, page {number}: {width:g} x {height:g} points at --scale {scale:g} are too few or"
                        f" too many pixels; 1 to {MAX_PAGE_PIXELS:,} are rendered"
                    )
                picture: Image.Image = page.render(scale=scale).to_pil().convert("RGB")
                return picture
        except (pypdfium2.PdfiumError, IndexError, ValueError, OSError) as error:
            raise DocumentError(f"{self.path}, page {number}: cannot be rendered ({error})") from error


def read_document(path: Path) -> Document:
    """Read a file.

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
    return Document(path, content, hashlib.sha256(content).hexdigest())


def find_files(inputs: Sequence[Path]) -> list[Path]:
    """Give the PDF files that were named or lie below a folder that was named, each once.

    Raises:
        UsageError: one is not there, is no PDF file by its name, or there are none.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += sorted(file for file in path.rglob("*") if _is_pdf(file) and file.is_file())
        elif not path.exists():
            raise UsageError(f"{path} is not there")
        elif not _is_pdf(path):
            raise UsageError(f"{path} is no PDF file by its name; give files that end with .pdf, or folders")
        else:
            files.append(path)
    if not files:
        raise UsageError(f"no PDF files in {', '.join(map(str, inputs))}")
    return list(dict.fromkeys(file.resolve() for file in files))


def _is_pdf(path: Path) -> bool:
    return path.suffix.lower() == ".pdf" and not path.name.startswith(".")
