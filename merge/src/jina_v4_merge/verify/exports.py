"""Checking exported folders: an adapter against the base beside it, a GGUF file and its projector.

A loader of adapters takes what it finds: a layer whose tensors are missing stays the base's, and no message says so. So
every tensor that the base beside it calls for must be there, in its shape.

The manifest has the sha256 of a GGUF file, which is written in one go from what was checked before. So all that is
checked here is whether it is such a file, which needs no gguf package.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from jina_v4_merge.errors import LayoutError, MergeError, named
from jina_v4_merge.files import HEAD_BYTES, instead, read_json
from jina_v4_merge.reading.adapter_config import read_lora_config
from jina_v4_merge.reading.adapters import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from jina_v4_merge.reading.configs import CONFIG_NAME
from jina_v4_merge.reading.layout import (
    PROJECTOR,
    PROJECTOR_BIAS,
    PROJECTOR_WEIGHT,
    Shape,
    check,
    is_matrix,
    module_name,
    peft_name,
    projector_shapes,
    stock_shapes,
)
from jina_v4_merge.reading.weights import StoredTensor, stored_tensors
from jina_v4_merge.writing.checkpoint import BASE, MANIFEST_NAME, PROJECTOR_NAME, gguf_name
from jina_v4_merge.writing.shards import DTYPES

_PROJECTOR_DTYPE = torch.float32  # folded once, on a few rows: nothing is saved by rounding it
_GGUF_BEGINNING = b"GGUF\x03\x00\x00\x00"  # the name of the format and its version


def check_adapter(folder: Path, manifest: Mapping[str, Any]) -> tuple[dict[str, StoredTensor], list[str]]:
    """Check names, shapes and dtypes of an adapter's tensors, its scaling, and that the base beside it is its own.

    Returns:
        Its tensors and its projector's, by the names in the files, and all that is wrong, each a sentence.

    Raises:
        MergeError: one of its classes: a file is missing or broken, or no plain LoRA.
    """
    config = read_lora_config(folder / ADAPTER_CONFIG_NAME)
    lora, projector = stored_tensors(folder / ADAPTER_WEIGHTS_NAME), stored_tensors(folder / PROJECTOR_NAME)
    tensors = {**lora, **projector}
    dim = projector_dim(folder / PROJECTOR_NAME, projector)
    problems = []
    base = folder.parent / BASE
    if (base / CONFIG_NAME).exists():
        base_config = read_json(base / CONFIG_NAME)
        expected: dict[str, Shape] = {}
        for name, shape in stock_shapes(base_config).items():
            if is_matrix(name):
                (n_out, n_in), rank = shape, config.rank_of(module_name(name))
                expected |= {peft_name(name, "A"): (rank, n_in), peft_name(name, "B"): (n_out, rank)}
        expected |= projector_shapes(base_config, dim)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        try:
            check(str(folder), shapes, expected, {name: tensor.path.name for name, tensor in tensors.items()})
        except LayoutError as error:
            problems.append(str(error))
    for stored, dtype in ((lora, DTYPES[manifest["dtype"]]), (projector, _PROJECTOR_DTYPE)):
        if other := [f"{name} ({tensor.path.name})" for name, tensor in stored.items() if tensor.dtype != dtype]:
            problems.append(f"{folder}: these tensors must be {dtype} and are not: {named(other)}")
    if (base / MANIFEST_NAME).exists() and _base_of(manifest) != _base_of(read_json(base / MANIFEST_NAME)):
        problems.append(
            f"{folder}: was made for another base than {base}, or without it; export base and adapters "
            "again with `jina-v4-merge export-adapters --with-base`"
        )
    listed = manifest.get("scaling")
    default = listed.get("default") if isinstance(listed, Mapping) else listed
    if default != config.scaling:
        problems.append(
            f"{folder / MANIFEST_NAME}: scaling is {listed!r}; {ADAPTER_CONFIG_NAME} says {config.scaling!r}"
        )
    return tensors, problems


def projector_dim(path: Path, projector: Mapping[str, StoredTensor]) -> int:
    """Return how many dimensions a row of a multi-vector has, by a projector's tensors.

    Raises:
        LayoutError: it has none.
    """
    shape = projector[PROJECTOR_BIAS].shape if PROJECTOR_BIAS in projector else ()
    if not any(shape):
        raise LayoutError(f"{path}: {PROJECTOR_BIAS} is missing or empty")
    return shape[0]


def _base_of(manifest: Mapping[str, Any]) -> object:
    """Return the sums of the files from which the base of an exported folder was made, as servers compare them."""
    found: object = manifest
    for key in ("sources", "base", "files"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def check_gguf(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Check the two files of a folder that `export-gguf` made.

    Returns:
        All that is wrong, each a sentence; that a file is missing is not said here.
    """
    problems = []
    path = folder / gguf_name(manifest["task"], manifest["dtype"])
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        if not head.startswith(_GGUF_BEGINNING):
            problems.append(f"{path}: this is {instead(head) or 'no GGUF file of version 3'}")
    if not (folder / PROJECTOR_NAME).is_file():
        return problems
    try:
        tensors = stored_tensors(folder / PROJECTOR_NAME)
        projector_dim(folder / PROJECTOR_NAME, tensors)
    except MergeError as error:
        return [*problems, str(error)]
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if shapes.keys() != set(PROJECTOR) or shapes[PROJECTOR_WEIGHT][:1] != shapes[PROJECTOR_BIAS]:
        problems.append(f"{folder / PROJECTOR_NAME}: must hold {' and '.join(PROJECTOR)} with the same number of rows")
    elif any(tensor.dtype != _PROJECTOR_DTYPE for tensor in tensors.values()):
        problems.append(f"{folder / PROJECTOR_NAME}: its tensors must be float32")
    return problems
