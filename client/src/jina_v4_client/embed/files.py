"""What kind a file is. Its first bytes decide; its name does where they say nothing."""

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

Kind = Literal["image", "tiff", "pdf"]
_TABLE_ENDINGS = frozenset([".csv", ".jsonl", ".ndjson", ".parquet", ".tsv", ".txt"])


def kind_of(path: str | Path) -> tuple[Kind | None, str]:
    """Tell what a file is.

    A file whose name is an image's or a PDF file's counts as one even if it does not begin so: it is a broken one.

    Returns:
        Its kind, and nothing; or None, and why the file is left out.
    """
    ending = Path(path).suffix.lower()
    try:
        with Path(path).open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        return kind_by_name(ending), f"cannot be read: {error.strerror}"
    if head.lstrip().startswith(b"%PDF-"):
        return "pdf", ""
    if head.startswith(TIFF_MARKS):
        # A camera's raw file, for one, is a TIFF file whose first picture is a thumbnail.
        known = ending == "" or ending in IMAGE_ENDINGS
        return ("tiff", "") if known else (None, f"a kind of TIFF that is not read here ({ending})")
    why = why_not_read(head)
    if why != NOT_READ:
        return None, why
    named = kind_by_name(ending)
    if named != "image" and opens_as_image(Path(path)):
        return "image", ""
    if named is None and ending in _TABLE_ENDINGS:
        why = "a text or a table; give it as an INPUT of its own"
    return named, why


def kind_by_name(ending: str) -> Kind | None:
    """Tell by the ending of a name, in small letters, whether a file is meant as an image or a PDF file."""
    if ending == PDF_ENDING:
        return "pdf"
    return "image" if ending in IMAGE_ENDINGS else None
