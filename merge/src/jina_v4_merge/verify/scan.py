"""Reading a file once for two things: its sha256, and which of its tensors have values that are not finite."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from jina_v4_merge.errors import SourceError
from jina_v4_merge.files import FileDigest
from jina_v4_merge.reading.weights import is_finite, stored_tensors

_CHUNK_BYTES = 1 << 20  # stays in a core's cache between the two looks at it


@dataclass(frozen=True)
class Scan:
    """What one reading found.

    Attributes:
        digest: Of the whole file.
        not_finite: The tensors with a value that is not finite; of a file that is not safetensors none.
    """

    digest: FileDigest
    not_finite: tuple[str, ...]


def scan(path: Path) -> Scan:
    """Read a file, of any size, in a few MB of memory.

    Raises:
        SourceError: it cannot be read, or it is named .safetensors and is broken.
        LayoutError: a tensor is of another dtype than a checkpoint may hold.
    """
    # This checks the header as well. Between the values of the tensors there are no gaps.
    tensors = stored_tensors(path, quantized=True).values() if path.suffix == ".safetensors" else ()
    reader = _Reader()
    not_finite = []
    try:
        with path.open("rb") as file:
            for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
                reader.read(file, tensor.offset - reader.size)  # the header
                if not reader.read(file, tensor.n_bytes, tensor.dtype):
                    not_finite.append(tensor.name)
            reader.read(file, path.stat().st_size - reader.size)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from error
    return Scan(FileDigest(reader.sha256.hexdigest(), reader.size), tuple(not_finite))


class _Reader:
    """Hashes all that it reads."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()
        self.size = 0
        self._chunk = bytearray(_CHUNK_BYTES)

    def read(self, file: BinaryIO, n_bytes: int, dtype: torch.dtype | None = None) -> bool:
        """Read on; say whether all values are finite, where they are of a dtype."""
        finite = True
        while n_bytes > 0 and (n_read := file.readinto(memoryview(self._chunk)[:n_bytes])):  # type: ignore[attr-defined]
            self.sha256.update(memoryview(self._chunk)[:n_read])
            self.size += n_read
            n_bytes -= n_read
            if dtype is not None and n_read >= dtype.itemsize:
                finite &= is_finite(torch.frombuffer(self._chunk, dtype=dtype, count=n_read // dtype.itemsize))
        return finite
