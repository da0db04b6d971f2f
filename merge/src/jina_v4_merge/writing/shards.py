"""Writing tensors to safetensors files, some rows at a time; the library can only write whole dicts of tensors.

A safetensors file is the length of its header, the header (JSON: dtype, shape and byte range of each tensor), then the
bytes. All shapes are known beforehand. So the header is written first and the rows as they come, and the sha256 is
taken on the way: nothing is kept in memory, and nothing is read again.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from jina_v4_merge.files import FileDigest, HashedFile, json_bytes
from jina_v4_merge.quantize import KINDS, SCALE_DTYPE, scale_name
from jina_v4_merge.reading.layout import Shape, is_matrix
from jina_v4_merge.reading.weights import HEADER_DTYPES

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MAX_SHARD_BYTES = 4 << 30

_HEADER_NAMES = {dtype: name for name, dtype in HEADER_DTYPES.items()}


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


def name_shards(parts: Sequence[Mapping[str, Planned]]) -> list[Shard]:
    """Give shards the file names under which loaders look for them."""
    return [(f"model-{i:05}-of-{len(parts):05}.safetensors", part) for i, part in enumerate(parts, 1)]


def index(shards: Sequence[Shard]) -> bytes:
    """Return the model.safetensors.index.json of some shards."""
    weight_map = {name: file for file, tensors in shards for name in tensors}
    total_size = sum(tensor.n_bytes for _, tensors in shards for tensor in tensors.values())
    return json_bytes({"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))})


def file_size(tensors: Mapping[str, Planned]) -> int:
    """Return the size in bytes of a file with these tensors."""
    return len(_header(tensors)) + sum(tensor.n_bytes for tensor in tensors.values())


class ShardSeries:
    """Writes several files one after the other, each tensor in one or more blocks of rows, in the order planned.

    Attributes:
        digests: Of each file that is complete, by name.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        """Take the file names and what each holds; a file is created when its first rows come."""
        self.digests: dict[str, FileDigest] = {}
        self._folder = folder
        self._shards = list(shards)
        self._file: HashedFile | None = None
        self._bytes_due: dict[str, int] = {}  # of the tensors of the open file, in their order

    def append(self, name: str, rows: torch.Tensor) -> None:
        """Write the next rows of the tensor whose turn it is."""
        file_name, tensors = self._shards[0]
        if self._file is None:
            self._file = HashedFile(self._folder / file_name)
            self._file.write(_header(tensors))
            self._bytes_due = {name: tensor.n_bytes for name, tensor in tensors.items()}
        content = rows.contiguous().view(torch.uint8).reshape(-1).numpy().data  # (n_bytes,)
        turn = next(iter(self._bytes_due))
        if name != turn or rows.dtype != tensors[name].dtype or len(content) > self._bytes_due[name]:
            raise ValueError(f"{file_name}: {len(content)} bytes of {name} ({rows.dtype}) are not due, {turn} is")
        self._file.write(content)
        self._bytes_due[name] -= len(content)
        if not self._bytes_due[name]:
            del self._bytes_due[name]
        if not self._bytes_due:
            self.digests[file_name] = self._file.finish()
            self._file = None
            del self._shards[0]

    def close(self) -> None:
        """Close the file that is being written, if any."""
        if self._file is not None:
            self._file.close()


def _header(tensors: Mapping[str, Planned]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.n_bytes
        entries[name] = {
            "dtype": _HEADER_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values start aligned
    return len(text).to_bytes(8, "little") + text
