"""Writing tensors to safetensors files, some rows at a time; the library can only write whole dicts of tensors.

A safetensors file is the length of its header, the header (JSON: dtype, shape and byte range of each tensor), then the
bytes. All shapes are known beforehand, so the header goes out first, the rows follow as they come, and the sha256 is
taken on the way: nothing is kept, and nothing is read again.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from jina_v4_merge.digests import FileDigest
from jina_v4_merge.layout import Shape, is_matrix
from jina_v4_merge.pagecache import WINDOW_BYTES, let_go
from jina_v4_merge.quantize import KINDS, SCALE_DTYPE, scale_name

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MAX_SHARD_BYTES = 4 << 30

_HEADER_DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
}


@dataclass(frozen=True)
class Planned:
    """A tensor that is going to be written."""

    shape: Shape
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        """The size of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


Shard = tuple[str, Mapping[str, Planned]]  # file name, and the tensors in it


def planned(shapes: Mapping[str, Shape], dtype: torch.dtype) -> dict[str, Planned]:
    """Return tensors of one dtype."""
    return {name: Planned(shape, dtype) for name, shape in shapes.items()}


def checkpoint_tensors(
    shapes: Mapping[str, Shape], dtype: torch.dtype, quantized: str | None = None
) -> dict[str, Planned]:
    """Return the tensors that a checkpoint holds: a quantized matrix has its scales beside it.

    Args:
        shapes: Of the base's tensors, by published name.
        dtype: Of all that is not quantized.
        quantized: What the language model's matrices are: one of `quantize.KINDS`.
    """
    tensors: dict[str, Planned] = {}
    for name, shape in shapes.items():
        if quantized is None or not is_matrix(name):
            tensors[name] = Planned(shape, dtype)
        else:
            tensors[name] = Planned(shape, KINDS[quantized])
            tensors[scale_name(name)] = Planned((shape[0], 1), SCALE_DTYPE)
    return tensors


def plan(tensors: Mapping[str, Planned], max_shard_bytes: int) -> list[dict[str, Planned]]:
    """Cut tensors into shards of at most `max_shard_bytes`, in order; a larger tensor gets a shard of its own."""
    shards: list[dict[str, Planned]] = []
    size = 0
    for name, tensor in tensors.items():
        if not shards or size + tensor.n_bytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.n_bytes
    return shards


def file_size(tensors: Mapping[str, Planned]) -> int:
    """Return the size in bytes of a file with these tensors."""
    return len(_header(tensors)) + sum(tensor.n_bytes for tensor in tensors.values())


class SafetensorsWriter:
    """Writes one file: its tensors in the order of `tensors`, each in one or more blocks of rows."""

    def __init__(self, path: Path, tensors: Mapping[str, Planned]) -> None:
        """Create the file and write its header."""
        self.name = path.name
        self._path = path
        self._tensors = tensors
        self._bytes_due = {name: tensor.n_bytes for name, tensor in tensors.items()}
        self._sha256 = hashlib.sha256()
        self._size = 0
        self._let_go_size = 0
        self._file = path.open("xb")
        self._write(_header(tensors))

    def append(self, name: str, rows: torch.Tensor) -> None:
        """Write the next rows of the tensor whose turn it is."""
        content = rows.contiguous().view(torch.uint8).reshape(-1).numpy().data  # (n_bytes,)
        turn = next(iter(self._bytes_due), None)
        if name != turn or rows.dtype != self._tensors[name].dtype or len(content) > self._bytes_due[name]:
            raise ValueError(f"{self._path}: {len(content)} bytes of {name} ({rows.dtype}) are not due, {turn} is")
        self._write(content)
        self._bytes_due[name] -= len(content)
        if not self._bytes_due[name]:
            del self._bytes_due[name]

    @property
    def complete(self) -> bool:
        """Whether all rows of all tensors are written."""
        return not self._bytes_due

    def finish(self) -> FileDigest:
        """Write through to the disk, close, and return the digest of the whole file."""
        if not self.complete:
            raise ValueError(f"{self._path}: {next(iter(self._bytes_due))} is not yet written")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return FileDigest(self._sha256.hexdigest(), self._size)

    def close(self) -> None:
        """Close the file, finished or not."""
        self._file.close()

    def _write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._sha256.update(content)
        self._size += len(content)
        if self._size - self._let_go_size >= WINDOW_BYTES:
            let_go(self._file.fileno())
            self._let_go_size = self._size


class ShardSeries:
    """Writes several files one after the other, going on to the next when one has all its tensors."""

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        """Take the file names and what each holds; a file is created when its first rows come."""
        self.digests: dict[str, FileDigest] = {}
        self._folder = folder
        self._shards = list(shards)
        self._writer: SafetensorsWriter | None = None

    def append(self, name: str, rows: torch.Tensor) -> None:
        """Write the next rows of the tensor whose turn it is."""
        if self._writer is None:
            file_name, tensors = self._shards.pop(0)
            self._writer = SafetensorsWriter(self._folder / file_name, tensors)
        self._writer.append(name, rows)
        if self._writer.complete:
            self.digests[self._writer.name] = self._writer.finish()
            self._writer = None

    def close(self) -> None:
        """Close the file that is being written, if any."""
        if self._writer is not None:
            self._writer.close()


def _header(tensors: Mapping[str, Planned]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.n_bytes
        entries[name] = {
            "dtype": _HEADER_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values start aligned
    return len(text).to_bytes(8, "little") + text
