"""Reading tensors from safetensors files, some rows at a time, so that memory stays flat.

Headers are read by the library, which refuses broken ones, and rows only when they are needed. Rows are read here: the
library maps files, and every page of a mapping that was ever touched counts as resident, 7.5 GB for the real base.
Files with anything but plain float tensors are refused, but for our own quantized checkpoints.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from jina_v4_merge.errors import LayoutError, SourceError, WeightError, named
from jina_v4_merge.files import HEAD_BYTES, ask_for, instead, let_go, pickles, read_json
from jina_v4_merge.reading.layout import Shape, published_name

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_FLOAT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
HEADER_DTYPES = _FLOAT_DTYPES | {"I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn}  # by their names in headers
# Small enough that a block, its float32 form and its folded forms stay in a core's cache.
_BLOCK_BYTES = 1 << 20
_AHEAD_BYTES = 4 << 20


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: what it is and where; its values stay on the disk.

    Attributes:
        path: Of the file.
        name: The one in the file.
        shape: Its own.
        dtype: Its own.
        offset: Of its first byte in the file.
    """

    path: Path
    name: str
    shape: Shape
    dtype: torch.dtype
    offset: int

    @property
    def n_bytes(self) -> int:
        """The size of the values on the disk."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def row_blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield all rows, a block at a time, with the slice of rows that each block is.

        Raises:
            SourceError: the file cannot be read any more.
            WeightError: a block is all zero: it was never written, as where a download was interrupted.
        """
        n_rows = max(1, _BLOCK_BYTES // self._row_bytes)
        with self._open() as file:
            for start in range(0, self.shape[0], n_rows):
                rows = slice(start, min(start + n_rows, self.shape[0]))
                ask_for(file.fileno(), self.offset + rows.stop * self._row_bytes, _AHEAD_BYTES)
                block = self._read(file, rows)
                if (len(block) == n_rows or rows.start == 0) and self._is_hole(block):
                    raise WeightError(
                        f"{self.path}: {self.name} is all zero from row {rows.start} to {rows.stop - 1}: the file was "
                        "not downloaded or copied whole; download or copy it again"
                    )
                yield rows, block

    def read(self, rows: slice = slice(None)) -> torch.Tensor:
        """Return some rows, or all, in the dtype of the file.

        Raises:
            SourceError: the file cannot be read any more.
        """
        with self._open() as file:
            return self._read(file, rows)

    @contextmanager
    def _open(self) -> Iterator[FileIO]:
        try:
            file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise SourceError(f"{self.path}: cannot read {self.name}: {error.strerror}") from error
        with file:
            yield file

    def _read(self, file: FileIO, rows: slice) -> torch.Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        block = torch.empty(stop - start, *self.shape[1:], dtype=self.dtype)  # (n_rows, ...)
        content = block.view(torch.uint8).reshape(-1).numpy().data  # (n_bytes,)
        try:
            n_read = os.preadv(file.fileno(), [content], self.offset + start * self._row_bytes)
            # All that was read of this tensor up to here: parts of pages at the ends of blocks would stay.
            let_go(file.fileno(), self.offset, stop * self._row_bytes)
        except OSError as error:
            raise SourceError(f"{self.path}: cannot read {self.name}: {error.strerror}") from error
        if n_read != len(content):
            raise SourceError(f"{self.path}: cannot read {self.name}: the file has become shorter")
        return block

    def _is_hole(self, block: torch.Tensor) -> bool:
        # Vectors may be zero, and rows of the embeddings that no token has.
        if block.dim() == 1 or "embed_tokens" in self.name or block[0].any():
            return False
        return not block.any()

    @property
    def _row_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape[1:]).numel()


def stored_tensors(path: Path, quantized: bool = False) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file.

    Args:
        path: Of the file.
        quantized: Whether tensors may be int8 or fp8.

    Raises:
        SourceError: there is no such file, or it is cut short or otherwise broken.
        LayoutError: a tensor is of another dtype.
    """
    dtypes = HEADER_DTYPES if quantized else _FLOAT_DTYPES
    tensors: dict[str, StoredTensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            offsets = _offsets(path)
            for name in file.keys():  # noqa: SIM118 - a safe_open is no dict and cannot be iterated over
                header = file.get_slice(name)
                if header.get_dtype() not in dtypes:
                    raise LayoutError(
                        f"{path}: {name} has dtype {header.get_dtype()}; only {', '.join(dtypes)} are read"
                    )
                shape, dtype = tuple(header.get_shape()), dtypes[header.get_dtype()]
                tensors[name] = StoredTensor(path, name, shape, dtype, offsets[name])
    except FileNotFoundError as error:
        raise SourceError(f"{path}: no such file.{pickles(path.parent)}") from error
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error}") from error
    except SafetensorError as error:
        with path.open("rb") as file:
            reason = instead(file.read(HEAD_BYTES))
        raise SourceError(f"{path}: {f'this is {reason}' if reason else f'broken or cut short: {error}'}") from error
    return tensors


def _offsets(path: Path) -> dict[str, int]:
    """Return where in a file each tensor begins; the header must have been found to be sound."""
    with path.open("rb") as file:
        n_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(n_bytes))
    header.pop("__metadata__", None)
    return {name: 8 + n_bytes + entry["data_offsets"][0] for name, entry in header.items()}


def is_finite(values: torch.Tensor) -> bool:
    """Say whether all values are finite."""
    if values.dtype == torch.float8_e4m3fn:  # without infinities, and not known to aminmax
        return not bool(values.isnan().any())
    # The extremes are NaN where any value is; 20 times as fast as asking each value.
    return all(math.isfinite(extreme.item()) for extreme in torch.aminmax(values))


def damaged(inputs: Sequence[tuple[StoredTensor, torch.Tensor]]) -> WeightError | None:
    """Return the error for the first of some inputs, with their values, that is not finite; None if all are."""
    for stored, values in inputs:
        if not is_finite(values):
            return WeightError(f"{stored.path}: {stored.name} holds a value that is not finite; the file is damaged")
    return None


def out_of_range(name: str, dtype: str, roomier: str) -> WeightError:
    """Return the error for a tensor with a value that its dtype cannot hold, and the dtypes that can."""
    return WeightError(f"{name}: a value does not fit {dtype}; choose a --dtype of more range ({roomier})")


def base_files(folder: Path) -> list[str]:
    """Return the names of the weight files of a base: its index and shards, or its single file.

    Raises:
        SourceError: there is neither or both, or the index is broken or names a file that is not there.
    """
    if not (folder / INDEX_NAME).exists():
        if not (folder / SINGLE_NAME).exists():
            raise SourceError(f"{folder}: neither {INDEX_NAME} nor {SINGLE_NAME} is there.{pickles(folder)}")
        return [SINGLE_NAME]
    if (folder / SINGLE_NAME).exists():
        raise SourceError(
            f"{folder}: {INDEX_NAME} and {SINGLE_NAME} are both there, and loaders differ about which they read; "
            "remove the one that is not to be used"
        )
    weight_map = _weight_map(folder)
    absent = [name for name in weight_map if not (folder / weight_map[name]).exists()]
    if absent:
        raise SourceError(
            f"{folder / INDEX_NAME}: {weight_map[absent[0]]} is not there, which should hold {named(absent)}"
        )
    return [INDEX_NAME, *sorted(set(weight_map.values()))]


def base_tensors(folder: Path, quantized: bool = False) -> dict[str, StoredTensor]:
    """Read the headers of all weight files of a base.

    Args:
        folder: Of the base.
        quantized: Whether tensors may be int8 or fp8, as in a checkpoint of ours.

    Returns:
        Published name to tensor.

    Raises:
        SourceError: a file is missing or broken.
        LayoutError: index and shards do not name the same tensors, or two tensors have the same published name.
    """
    tensors: dict[str, StoredTensor] = {}
    for file_name in base_files(folder):
        if file_name == INDEX_NAME:
            continue
        for name, tensor in stored_tensors(folder / file_name, quantized).items():
            if (other := tensors.setdefault(published_name(name), tensor)) is not tensor:
                raise LayoutError(f"{folder}: {other.name} ({other.path.name}) and {name} ({file_name}) are one tensor")
    if (folder / INDEX_NAME).exists():
        _check_index(folder, tensors)
    return tensors


def _weight_map(folder: Path) -> dict[str, str]:
    try:
        weight_map = read_json(folder / INDEX_NAME)["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (KeyError, AttributeError) as error:
        raise SourceError(f"{folder / INDEX_NAME}: no index of safetensors shards: {error!r}") from error


def _check_index(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    listed = set(_weight_map(folder).items())
    present = {(tensor.name, tensor.path.name) for tensor in tensors.values()}
    wrong = sorted(f"{name} ({file})" for name, file in listed ^ present)
    if wrong:
        raise LayoutError(f"{folder / INDEX_NAME}: index and shards disagree about {named(wrong)}")
