"""Files that were dropped on the page, kept in a folder. Their names are shown, and are never paths.

A file is called by the digest of its content and what it is, so the same file is kept once; beside it is a file with
its name.
"""

import hashlib
import os
import tempfile
from collections.abc import AsyncIterable
from dataclasses import dataclass
from pathlib import Path

from document_search.documents import Document, read_document, suffix_of
from document_search.errors import DocumentError
from document_search.page.errors import PageError

MAX_FILE_BYTES = 100 * 2**20
MAX_PAGES = 2000  # of a file; a PDF file of 300 bytes can claim a million
MAX_PICTURE_BYTES = 20 * 2**20  # what a server takes of one image (JINA_V4_MAX_IMAGE_BYTES)
_MAX_NAME = 200  # letters


@dataclass(frozen=True)
class Upload:
    """A file that is kept, and has been read once."""

    name: str
    path: Path
    n_pages: int


class Uploads:
    """The folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, name: str, content: bytes) -> Upload:
        """Keep a file.

        Args:
            name: to be shown.
            content: of the file.

        Raises:
            PageError: it is too large, has too many pages, or is neither a PDF file nor a picture.
            DocumentError: it is broken, encrypted or empty.
        """
        suffix = suffix_of(content)
        if suffix is None:
            raise PageError(422, "BAD_FILE", "neither a PDF file nor a picture (PNG, JPEG, WebP, GIF, BMP, TIFF)")
        if suffix != ".pdf" and len(content) > MAX_PICTURE_BYTES:
            raise PageError(413, "TOO_LARGE", f"a picture may have {_megabytes(MAX_PICTURE_BYTES)} at most")
        path = self._folder / f"{hashlib.sha256(content).hexdigest()}{suffix}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write(path, content)
        try:
            n_pages = _count(read_document(path))
        except (DocumentError, PageError):
            path.unlink()
            raise
        shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)[:_MAX_NAME]
        self._write(path.with_suffix(".name"), (shown or "a file").encode("utf-8", "replace"))
        return Upload(self.name_of(path), path, n_pages)

    def name_of(self, path: Path) -> str:
        """Return the name of a file of the index as it is shown."""
        if path.parent == self._folder:
            try:
                return path.with_suffix(".name").read_text("utf-8")
            except OSError:  # somebody removed it
                return path.name
        return path.name

    def _write(self, path: Path, content: bytes) -> None:
        """Write a file in one step: whoever reads it finds all of it."""
        handle, part = tempfile.mkstemp(dir=self._folder, prefix=".part-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            Path(part).replace(path)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise


async def read_body(content: AsyncIterable[bytes], max_bytes: int) -> bytes:
    """Read the body of a request; one that is too large is read to its end, or the browser would not see the reply.

    Raises:
        PageError: it is too large, or empty.
    """
    body, n_bytes = bytearray(), 0
    async for piece in content:
        n_bytes += len(piece)
        if n_bytes <= max_bytes:
            body += piece
    if n_bytes > max_bytes:
        raise PageError(413, "TOO_LARGE", f"larger than {_megabytes(max_bytes)}, the most that this page takes")
    if not body:
        raise PageError(422, "BAD_FILE", "the file is empty")
    return bytes(body)


def _count(document: Document) -> int:
    """Count the pages; a file of too many is refused."""
    try:
        n_pages = document.count()
    except DocumentError as error:
        # The name of the file is shown beside it; the path is ours.
        raise DocumentError(str(error).removeprefix(f"{document.path}: ")) from error
    if n_pages > MAX_PAGES:
        message = f"{n_pages:,} pages; this page takes files of {MAX_PAGES:,} pages at most. For longer files, use: "
        raise PageError(413, "TOO_LARGE", f"{message}make search PDF=FILE.pdf")
    return n_pages


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes // 2**20} MiB"
