"""Reading tensors from safetensors files, some rows at a time, so that memory stays flat.

Only headers are read until rows are asked for. A file is mapped anew for each block of rows: a mapping that stays open
would count every page ever touched as resident, 7.5 GB for the real base. Files with anything but plain float tensors
(quantised ones, say) are refused.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from jina_v4_merge.errors import LayoutError, SourceError, named
from jina_v4_merge.layout import Shape, published_name

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_FLOAT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Small enough that a block, its float32 form and its folded forms stay in a core's cache.
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and what it is; its values stay on the disk."""

    path: Path
    name: str
    shape: Shape
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        """The size of the values on the disk."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def row_blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield all rows, a block at a time, with the slice of rows that each block is.

        Raises:
            SourceError: the file cannot be read any more.
        """
        row_bytes = max(1, self.n_bytes // self.shape[0])
        n_rows = max(1, _BLOCK_BYTES // row_bytes)
        for start in range(0, self.shape[0], n_rows):
            rows = slice(start, min(start + n_rows, self.shape[0]))
            yield rows, self.read(rows)

    def read(self, rows: slice = slice(None)) -> torch.Tensor:
        """Return some rows, or all, in the dtype of the file.

        Raises:
            SourceError: the file cannot be read any more.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                block: torch.Tensor = file.get_slice(self.name)[rows]
        except (OSError, SafetensorError) as error:
            raise SourceError(f"{self.path}: cannot read {self.name}: {error}") from error
        return block


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file.

    Raises:
        SourceError: there is no such file, or it is cut short or otherwise broken.
        LayoutError: a tensor is not of a plain float dtype.
    """
    tensors: dict[str, StoredTensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safe_open is no dict and cannot be iterated over
                header = file.get_slice(name)
                if header.get_dtype() not in _FLOAT_DTYPES:
                    raise LayoutError(
                        f"{path}: {name} has dtype {header.get_dtype()}; choose a base in {', '.join(_FLOAT_DTYPES)}"
                    )
                tensors[name] = StoredTensor(path, name, tuple(header.get_shape()), _FLOAT_DTYPES[header.get_dtype()])
    except FileNotFoundError as error:
        raise SourceError(f"{path}: no such file") from error
    except (OSError, SafetensorError) as error:
        raise SourceError(f"{path}: broken or cut short: {error}") from error
    return tensors


def base_files(folder: Path) -> list[str]:
    """Return the names of the weight files of a base: its index and shards, or its single file.

    Raises:
        SourceError: there is neither, or the index is broken or names a file that is not there.
    """
    if not (folder / INDEX_NAME).exists():
        if not (folder / SINGLE_NAME).exists():
            raise SourceError(f"{folder}: neither {INDEX_NAME} nor {SINGLE_NAME} is there")
        return [SINGLE_NAME]
    weight_map = _weight_map(folder)
    absent = [name for name in weight_map if not (folder / weight_map[name]).exists()]
    if absent:
        raise SourceError(
            f"{folder / INDEX_NAME}: {weight_map[absent[0]]} is not there, which should hold {named(absent)}"
        )
    return [INDEX_NAME, *sorted(set(weight_map.values()))]


def base_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Read the headers of all weight files of a base.

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
        for name, tensor in stored_tensors(folder / file_name).items():
            if (other := tensors.setdefault(published_name(name), tensor)) is not tensor:
                raise LayoutError(f"{folder}: {other.name} ({other.path.name}) and {name} ({file_name}) are one tensor")
    if (folder / INDEX_NAME).exists():
        _check_index(folder, tensors)
    return tensors


def _weight_map(folder: Path) -> dict[str, str]:
    try:
        weight_map = json.loads((folder / INDEX_NAME).read_bytes())["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{folder / INDEX_NAME}: no index of safetensors shards: {error!r}") from error


def _check_index(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    listed = set(_weight_map(folder).items())
    lying = {(tensor.name, tensor.path.name) for tensor in tensors.values()}
    wrong = sorted(f"{name} ({file})" for name, file in listed ^ lying)
    if wrong:
        raise LayoutError(f"{folder / INDEX_NAME}: index and shards disagree about {named(wrong)}")
