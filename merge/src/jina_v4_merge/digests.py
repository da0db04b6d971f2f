"""Size and sha256 of files: of what is read, in the background; of what is written, while it is written."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any

from jina_v4_merge.errors import SourceError

_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class FileDigest:
    """What a manifest says about one file."""

    sha256: str
    size: int

    def as_json(self) -> dict[str, Any]:
        """Return the form that a manifest holds."""
        return asdict(self)


def write_file(path: Path, content: bytes) -> FileDigest:
    """Write a small file through to the disk and return its digest."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return FileDigest(hashlib.sha256(content).hexdigest(), len(content))


def read_digests(folder: Path, names: Iterable[str], stop: Event) -> dict[str, FileDigest]:
    """Return the digest of each named file of a folder; give up early, with fewer, when `stop` is set.

    Raises:
        SourceError: a file cannot be read.
    """
    digests: dict[str, FileDigest] = {}
    for name in names:
        sha256, size = hashlib.sha256(), 0
        try:
            with (folder / name).open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    if stop.is_set():
                        return digests
                    sha256.update(chunk)
                    size += len(chunk)
        except OSError as error:
            raise SourceError(f"{folder / name}: cannot be read: {error.strerror}") from error
        digests[name] = FileDigest(sha256.hexdigest(), size)
    return digests
