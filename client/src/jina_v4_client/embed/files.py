"""Finds out what kind of file a file is: by its first bytes, or by its name where they say nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from jina_v4_client._images import (
    HEAD_BYTES,
    IMAGE_ENDINGS,
    NOT_READ,
    PDF_ENDING,
    TIFF_MARKS,
    opens_as_image,
    why_not_read,
)

FileKind = Literal["image", "tiff", "pdf"]
TableFormat = Literal["jsonl", "csv", "parquet", "text"]
TABLE_FORMATS: Mapping[str, TableFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}


def kind_of(path: str | Path) -> tuple[FileKind | None, str]:
    """Return what kind of file with pages this is.

    A file that is named as an image or a PDF file counts as one even if it does not begin like one: it is broken.

    Returns:
        The kind and ""; or None and why the file is left out.
    """
    path = Path(path)
    ending = path.suffix.lower()
    named: FileKind | None = "pdf" if ending == PDF_ENDING else "image" if ending in IMAGE_ENDINGS else None
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        return named, f"cannot be read: {error.strerror}"
    if head.lstrip().startswith(b"%PDF-"):
        return "pdf", ""
    if head.startswith(TIFF_MARKS):
        # A camera's raw file, for one, is a TIFF file whose first picture is a thumbnail.
        known = ending == "" or ending in IMAGE_ENDINGS
        return ("tiff", "") if known else (None, f"a kind of TIFF that is not read here ({ending})")
    why = why_not_read(head)
    if why != NOT_READ:
        return None, why
    if named != "image" and opens_as_image(path):
        return "image", ""
    if named is None and ending in TABLE_FORMATS:
        why = "a text or a table; give it as an INPUT of its own"
    return named, why
