"""The program that renders PDF pages, as a child process per request, so that a bad file harms nothing else.

It imports nothing of the server, starts in 0.2 s, and limits itself before it reads a file. The exchange:

1. standard input: a line of JSON with the limits and the size of each file; then the files, one after the other;
2. standard output: a line per file, `{"n_pages": 12}`;
3. standard input: a line with the pages to render, `[[0, 1], [0, 2]]`: the index of a file, and a page from 1;
4. standard output: for each page a line `{"width": 1190, "height": 1684}`, then its pixels, three bytes each.

A line `{"error": ...}` ends the exchange. The pixels are the same as those of `jina-v4-embed`.
"""

import io
import json
import math
import resource
import sys
from contextlib import closing
from typing import Any

import pypdfium2  # type: ignore[import-untyped] # it has no types
from PIL import Image
from pypdfium2 import raw

SCALE = 2.0  # pixels per point: 144 dpi, the default of jina-v4-embed
# Like jina-v4-embed, a page over these limits of an image is rendered smaller.
MAX_PIXELS = 64_000_000
MAX_PNG_BYTES = 20 * 2**20
SAFE_PIXELS = 6_900_000  # a PNG file with this many pixels never has more than MAX_PNG_BYTES
MAX_ASPECT_RATIO = 200
HEADER_BYTES = 1024  # the beginning of a PDF file, which has its signature


class UnreadableError(Exception):
    """A file or page cannot be rendered; the server writes the message after the name of the file."""


def limit(max_bytes: int, max_cpu_s: int) -> None:
    """Limit the memory and processor time of this process, and forbid it to write files."""
    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (max_cpu_s, max_cpu_s + 1))
    for kind in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(kind, (0, 0))


def open_pdf(content: bytes) -> Any:
    """Open a PDF file, so that its pages are rendered with the contents of their form fields.

    Raises:
        UnreadableError: the file is broken, encrypted or empty.
    """
    if b"%PDF-" not in content[:HEADER_BYTES]:
        raise UnreadableError("is not a PDF file")
    # This resets pdfium's last error, which it would report again for a file without pages.
    raw.FPDF_LoadMemDocument64(b"", 0, None)
    try:
        document = pypdfium2.PdfDocument(content)
    except (pypdfium2.PdfiumError, OSError) as error:
        if "password" in str(error).lower():
            raise UnreadableError("is encrypted and needs a password; send a copy without one") from error
        raise UnreadableError("is a broken PDF file, or has no pages") from error
    # This is what `init_forms` does if the file lists its form fields. Many programs that split files lose the list,
    # and PDF readers show the fields all the same.
    config = raw.FPDF_FORMFILLINFO(version=2)
    document.formenv = pypdfium2.PdfFormEnv(raw.FPDFDOC_InitFormFillEnvironment(document, config), config)
    return document


def render_page(document: Any, number: int) -> Image.Image:
    """Render a page as PDF readers show it: cropped, rotated, with annotations and the contents of form fields.

    Args:
        document: from open_pdf.
        number: of the page, from 1.

    Returns:
        An RGB picture.

    Raises:
        UnreadableError: the page is broken, smaller than a pixel, or has an aspect ratio that the model refuses.
    """
    try:
        with closing(document[number - 1]) as page:
            width, height = page.get_size()  # points
            if width * height * SCALE**2 < 1:
                raise UnreadableError(f"has a page {number} of {width:g} x {height:g} points, less than a pixel")
            columns, rows = math.ceil(width * SCALE), math.ceil(height * SCALE)
            if max(columns, rows) > MAX_ASPECT_RATIO * min(columns, rows):
                size = f"has a page {number} of {columns} x {rows} pixels"
                raise UnreadableError(f"{size}; the model takes aspect ratios up to {MAX_ASPECT_RATIO}")
            safe_scale = SCALE * min(1, math.sqrt(SAFE_PIXELS / (columns * rows)))
            if columns * rows > MAX_PIXELS:
                return _rendered(page, safe_scale)
            picture = _rendered(page, SCALE)
            if columns * rows > SAFE_PIXELS and _n_png_bytes(picture) > MAX_PNG_BYTES:
                return _rendered(page, safe_scale)
            return picture
    except (pypdfium2.PdfiumError, ValueError, OSError) as error:
        raise UnreadableError(f"has a page {number} that cannot be rendered") from error


def _rendered(page: Any, scale: float) -> Image.Image:
    # Annotations and a white background are pypdfium2's defaults.
    picture: Image.Image = page.render(scale=scale).to_pil().convert("RGB")
    return picture


def _n_png_bytes(picture: Image.Image) -> int:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)  # as the client does
    return file.tell()


def main() -> None:
    """Answer one request."""
    received, sent = sys.stdin.buffer, sys.stdout.buffer

    def say(**facts: object) -> None:
        sent.write(json.dumps(facts).encode() + b"\n")
        sent.flush()

    head = json.loads(received.readline())
    limit(head["max_bytes"], head["max_cpu_s"])
    try:
        documents = []
        for content in [received.read(n_bytes) for n_bytes in head["n_bytes"]]:
            documents.append(open_pdf(content))
            say(n_pages=len(documents[-1]))
        for file, number in json.loads(
            received.readline() or "[]"
        ):  # the server sends nothing if it refuses the request
            picture = render_page(documents[file], number)
            say(width=picture.width, height=picture.height)
            sent.write(picture.tobytes())
            sent.flush()
    except UnreadableError as error:
        say(error=str(error))
    except MemoryError:
        say(error=None)


if __name__ == "__main__":
    main()
