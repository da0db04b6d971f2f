"""Inputs that the model sees as images: image files, the pages of PDF files, and the frames of TIFF files."""

import io
import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from jina_v4_client._images import CLIPPED, CLIPPED_MODES, open_image
from jina_v4_client._model import MAX_ASPECT_RATIO
from jina_v4_client.embed import check_installed
from jina_v4_client.embed.content import Content, Row, broken_row, file_content, make_row, picture_content
from jina_v4_client.embed.errors import RowError
from jina_v4_client.embed.files import FileKind

# What a server takes of one image (JINA_V4_MAX_IMAGE_PIXELS and _BYTES); it scales a page to 602,112 pixels anyway.
_SERVER_PIXELS = 64_000_000
_SERVER_BYTES = 20 * 2**20
_SAFE_PIXELS = 6_900_000  # a PNG file of this many pixels is never over _SERVER_BYTES
_NEW_SUBFILE_TYPE = 254  # a tag of TIFF
_COPY_OR_MASK = 0b101  # its bits for a smaller copy of another frame, and for a mask
_DYNAMIC_XFA = 2  # pdfium's FORMTYPE_XFA_FULL

NO_XFA = "an XFA form: what its program would show is not rendered, but what other readers show in its place"
NOT_PAGES = "a TIFF file with frames that are smaller copies of its pages, or masks: these are no rows"


@dataclass(frozen=True)
class ImageFile:
    """An image; its path is the id."""

    path: str

    def rows(self) -> Iterator[Row]:
        """Yield the one row."""
        yield make_row(self.path, partial(file_content, Path(self.path)))

    def count(self) -> int:
        """Count the rows."""
        return 1


@dataclass(frozen=True)
class Tiff:
    """A TIFF file, a row a page; the id is the path, followed by the number of the frame if there are several pages."""

    path: str

    def rows(self) -> Iterator[Row]:
        """Yield the pages in order; where the file breaks off there is a row without content."""
        pages, n_frames = self._pages()
        if len(pages) == 1:
            yield from ImageFile(self.path).rows()
            return
        note = NOT_PAGES if n_frames > len(pages) else None
        try:
            with Path(self.path).open("rb") as file, open_image(file) as image:
                for index in pages:
                    yield make_row(f"{self.path}#{index + 1}", partial(_read_frame, image, index, note))
        except OSError as error:
            yield broken_row(self.path, f"cannot be read ({error})")

    def count(self) -> int:
        """Count the pages."""
        return len(self._pages()[0])

    def _pages(self) -> tuple[list[int], int]:
        """Return which frames are pages, and how many frames there are; a broken one is the last page."""
        pages, index = [0], 0
        try:
            with Path(self.path).open("rb") as file, open_image(file) as image:
                while True:
                    index += 1
                    image.seek(index)
                    # Pillow's type for any file has no tag_v2; a TIFF's has
                    if not image.tag_v2.get(_NEW_SUBFILE_TYPE, 0) & _COPY_OR_MASK:  # type: ignore[attr-defined]
                        pages.append(index)
        except EOFError:  # there is no such frame
            return pages, index
        except Exception:  # Pillow's reader raises whatever a broken file makes it stumble over
            return sorted({*pages, index}), index + 1


def _read_frame(image: Image.Image, index: int, note: str | None) -> Content:
    try:
        image.seek(index)
        picture = image.convert("RGB")
    except Exception as error:  # as above
        raise RowError(f"the frame cannot be read ({type(error).__name__}: {error})") from error
    return picture_content(picture, CLIPPED if image.mode in CLIPPED_MODES else note)


@dataclass(frozen=True)
class Pdf:
    """A PDF file, a row a page; the id is the path and the number of the page.

    Attributes:
        scale: pixels a point; 1 is 72 dpi.
    """

    path: str
    scale: float

    def rows(self) -> Iterator[Row]:
        """Yield the pages in order; a file that cannot be opened is one row without content."""
        try:
            document = open_pdf(self.path)
        except RowError as error:
            yield broken_row(self.path, str(error))
            return
        with closing(document):
            note = NO_XFA if document.get_formtype() == _DYNAMIC_XFA else None
            for index in range(len(document)):
                yield make_row(f"{self.path}#{index + 1}", partial(_read_page, document, index, self.scale, note))

    def count(self) -> int:
        """Count the pages."""
        try:
            with closing(open_pdf(self.path)) as document:
                return len(document)
        except RowError:
            return 1


def _read_page(document: Any, index: int, scale: float, note: str | None) -> Content:
    return picture_content(render_page(document, index, scale), note)


Pages = ImageFile | Tiff | Pdf


def open_pages(path: str, kind: FileKind, pdf_scale: float) -> Pages:
    """Open a file as a source of rows."""
    if kind == "pdf":
        return Pdf(path, pdf_scale)
    return Tiff(path) if kind == "tiff" else ImageFile(path)


def open_pdf(source: str | bytes) -> Any:
    """Open a PDF file, so that its pages are rendered with what is filled into their forms.

    Args:
        source: a path or the bytes of a file.

    Returns:
        A pypdfium2.PdfDocument, to be closed.

    Raises:
        RowError: it is broken, needs a password, or has no pages.
        UsageError: pypdfium2 is not installed.
    """
    check_installed("pypdfium2")
    import pypdfium2  # type: ignore[import-untyped] # it has no types
    from pypdfium2 import raw

    # For a file without pages pdfium sets no error, and the last one of another file would be reported: clear it.
    raw.FPDF_LoadMemDocument64(b"", 0, None)
    try:
        document = pypdfium2.PdfDocument(source)
    except (pypdfium2.PdfiumError, OSError) as error:
        if "password" in str(error).lower():
            raise RowError("encrypted: it needs a password; save a copy without one") from error
        raise RowError(f"a broken PDF file, or one without pages ({error})") from error
    # What PdfDocument.init_forms does only if the file has a list of its form fields. Many programs that split files
    # lose the list; readers show the fields all the same.
    config = raw.FPDF_FORMFILLINFO(version=2)
    document.formenv = pypdfium2.PdfFormEnv(raw.FPDFDOC_InitFormFillEnvironment(document, config), config)
    return document


def render_page(document: Any, index: int, scale: float) -> Image.Image:
    """Render a page as a reader of the file shows it: cropped, turned, with annotations and filled in forms.

    A page that is larger than a server takes is rendered with fewer pixels.

    Args:
        document: from open_pdf.
        index: of the page, from 0.
        scale: pixels a point; 1 is 72 dpi.

    Returns:
        An RGB picture.

    Raises:
        RowError: the page cannot be rendered, is smaller than a pixel, or has an aspect ratio that the model refuses.
    """
    import pypdfium2

    try:
        with closing(document[index]) as page:
            width, height = page.get_size()  # points
            if width * height * scale**2 < 1:
                raise RowError(f"a page of {width:g} x {height:g} points is less than a pixel at a scale of {scale:g}")
            columns, rows = math.ceil(width * scale), math.ceil(height * scale)
            if max(columns, rows) > MAX_ASPECT_RATIO * min(columns, rows):
                raise RowError(f"{columns} x {rows} pixels: the model refuses aspect ratios above {MAX_ASPECT_RATIO}")
            safe_scale = scale * min(1, math.sqrt(_SAFE_PIXELS / (columns * rows)))
            if columns * rows > _SERVER_PIXELS:
                return _rendered(page, safe_scale)
            picture = _rendered(page, scale)
            if columns * rows > _SAFE_PIXELS and _n_png_bytes(picture) > _SERVER_BYTES:
                return _rendered(page, safe_scale)
            return picture
    except (pypdfium2.PdfiumError, ValueError, OSError) as error:
        raise RowError(f"the page cannot be rendered ({error})") from error


def _rendered(page: Any, scale: float) -> Image.Image:
    # By default, pypdfium2 draws annotations, on a white ground.
    picture: Image.Image = page.render(scale=scale).to_pil().convert("RGB")
    return picture


def _n_png_bytes(picture: Image.Image) -> int:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)  # as the client does
    return file.tell()
