"""Size and sha256 of files: of what is read, in the background; of what is written, while it is written."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any

from jina_v4_merge.errors import SourceError
from jina_v4_merge.pagecache import let_go

_CHUNK_BYTES = 1 << 20  # one buffer that stays in a core's cache


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


@contextmanager
def hashing(paths: Sequence[Path]) -> Iterator[Callable[[], dict[Path, FileDigest]]]:
    """Hash files in the background; what is given waits for the digests.

    Raises:
        SourceError: from what is given: a file cannot be read.
    """
    stop = Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(_read_digests, paths, stop).result
        finally:
            stop.set()


def _read_digests(paths: Sequence[Path], stop: Event) -> dict[Path, FileDigest]:
    """Return the digest of each file; give up early, with fewer, when `stop` is set."""
    digests: dict[Path, FileDigest] = {}
    chunk = memoryview(bytearray(_CHUNK_BYTES))
    for path in paths:
        sha256, size = hashlib.sha256(), 0
        try:
            with path.open("rb", buffering=0) as file:
                while n_read := file.readinto(chunk):
                    if stop.is_set():
                        return digests
                    sha256.update(chunk[:n_read])
                    size += n_read
                    let_go(file.fileno(), 0, size)
        except OSError as error:
            raise SourceError(f"{path}: cannot be read: {error.strerror}") from error
        digests[path] = FileDigest(sha256.hexdigest(), size)
    return digests
