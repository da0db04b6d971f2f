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
from pathlib import Path

import torch

from jina_v4_merge.digests import FileDigest
from jina_v4_merge.layout import Shape
from jina_v4_merge.pagecache import WINDOW_BYTES, let_go

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MAX_SHARD_BYTES = 4 << 30

Shard = tuple[str, Mapping[str, Shape]]  # file name, and the tensors in it

_HEADER_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def plan(shapes: Mapping[str, Shape], dtype: torch.dtype, max_shard_bytes: int) -> list[dict[str, Shape]]:
    """Cut tensors into shards of at most `max_shard_bytes`, in order; a larger tensor gets a shard of its own."""
    shards: list[dict[str, Shape]] = []
    size = 0
    for name, shape in shapes.items():
        n_bytes = math.prod(shape) * dtype.itemsize
        if not shards or size + n_bytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += n_bytes
    return shards


def file_size(shapes: Mapping[str, Shape], dtype: torch.dtype) -> int:
    """Return the size in bytes of a file with these tensors."""
    return len(_header(shapes, dtype)) + sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize


class SafetensorsWriter:
    """Writes one file: its tensors in the order of `shapes`, each in one or more blocks of rows."""

    def __init__(self, path: Path, shapes: Mapping[str, Shape], dtype: torch.dtype) -> None:
        """Create the file and write its header."""
        self.name = path.name
        self._path = path
        self._dtype = dtype
        self._bytes_due = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
        self._sha256 = hashlib.sha256()
        self._size = 0
        self._let_go_size = 0
        self._file = path.open("xb")
        self._write(_header(shapes, dtype))

    def append(self, name: str, rows: torch.Tensor) -> None:
        """Write the next rows of the tensor whose turn it is."""
        content = rows.contiguous().view(torch.uint8).reshape(-1).numpy().data  # (n_bytes,)
        turn = next(iter(self._bytes_due), None)
        if name != turn or rows.dtype != self._dtype or len(content) > self._bytes_due[name]:
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

    def __init__(self, folder: Path, shards: Sequence[Shard], dtype: torch.dtype) -> None:
        """Take the file names and what each holds; a file is created when its first rows come."""
        self.digests: dict[str, FileDigest] = {}
        self._folder = folder
        self._shards = list(shards)
        self._dtype = dtype
        self._writer: SafetensorsWriter | None = None

    def append(self, name: str, rows: torch.Tensor) -> None:
        """Write the next rows of the tensor whose turn it is."""
        if self._writer is None:
            file_name, shapes = self._shards.pop(0)
            self._writer = SafetensorsWriter(self._folder / file_name, shapes, self._dtype)
        self._writer.append(name, rows)
        if self._writer.complete:
            self.digests[self._writer.name] = self._writer.finish()
            self._writer = None

    def close(self) -> None:
        """Close the file that is being written, if any."""
        if self._writer is not None:
            self._writer.close()


def _header(shapes: Mapping[str, Shape], dtype: torch.dtype) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _HEADER_DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values start aligned
    return len(text).to_bytes(8, "little") + text
