"""Reading a file once for both of the things to know about it: its sha256, and which of its tensors are not finite."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from jina_v4_merge.digests import FileDigest
from jina_v4_merge.errors import SourceError
from jina_v4_merge.weights import stored_tensors

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
    # This looks whether the header is sound as well.
    tensors = stored_tensors(path, quantized=True) if path.suffix == ".safetensors" else {}
    reader = _Reader()
    not_finite = []
    try:
        with path.open("rb") as file:
            for name, n_bytes in _ranges(file, reader) if tensors else []:
                if not reader.read(file, n_bytes, tensors[name].dtype):
                    not_finite.append(name)
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

    def add(self, content: bytes | memoryview) -> None:
        self.sha256.update(content)
        self.size += len(content)

    def read(self, file: BinaryIO, n_bytes: int, dtype: torch.dtype | None = None) -> bool:
        """Read on; say whether all values are finite, where they are of a dtype."""
        finite = True
        while n_bytes > 0 and (n_read := file.readinto(memoryview(self._chunk)[:n_bytes])):  # type: ignore[attr-defined]
            self.add(memoryview(self._chunk)[:n_read])
            n_bytes -= n_read
            if dtype is not None and n_read >= dtype.itemsize:
                values = torch.frombuffer(self._chunk, dtype=dtype, count=n_read // dtype.itemsize)  # (n,)
                if dtype == torch.float8_e4m3fn:  # without infinities, and not known to aminmax
                    finite &= not bool(values.isnan().any())
                else:
                    # The extremes are NaN where any value is.
                    finite &= all(math.isfinite(extreme.item()) for extreme in torch.aminmax(values))
        return finite


def _ranges(file: BinaryIO, reader: _Reader) -> list[tuple[str, int]]:
    """Read the header; return names and sizes of the tensors in the order of their bytes, which leave no gap."""
    size = file.read(8)
    content = file.read(int.from_bytes(size, "little"))
    reader.add(size)
    reader.add(content)
    header = json.loads(content)
    header.pop("__metadata__", None)
    offsets = sorted((*entry["data_offsets"], name) for name, entry in header.items())
    return [(name, stop - start) for start, stop, name in offsets]
