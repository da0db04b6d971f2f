"""An adapter as `export-adapters` writes it: reading its folder, and checking it against its manifest and its base.

A loader of adapters takes what it finds: a layer whose tensors are missing stays the base's, and nobody says so. So
every tensor that the base beside it calls for must be there, in its shape.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jina_v4_merge.adapter_config import LoraConfig, lora_config
from jina_v4_merge.adapters import CONFIG_NAME, WEIGHTS_NAME
from jina_v4_merge.checkpoint import BASE, MANIFEST_NAME, PROJECTOR_NAME
from jina_v4_merge.errors import ConfigError, LayoutError, named
from jina_v4_merge.layout import (
    PROJECTOR,
    PROJECTOR_BIAS,
    PROJECTOR_WEIGHT,
    Shape,
    base_shapes,
    check,
    is_matrix,
    module_name,
)
from jina_v4_merge.shards import DTYPES
from jina_v4_merge.sources import CONFIG_NAME as BASE_CONFIG_NAME
from jina_v4_merge.sources import read_json
from jina_v4_merge.weights import StoredTensor, stored_tensors

_PROJECTOR_DTYPE = torch.float32  # folded once, on a few rows: nothing is saved by rounding it


@dataclass(frozen=True)
class ExportedAdapter:
    """A task's adapter and folded projector.

    Attributes:
        config: Rank and scaling.
        lora: Its tensors by the names in its file.
        projector: Weight and bias, by published name.
    """

    config: LoraConfig
    lora: Mapping[str, StoredTensor]
    projector: Mapping[str, StoredTensor]

    def pair(self, base_name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Return A (rank, n_in) and B (n_out, rank), as stored, and the factor on `B @ A`, of a base tensor."""
        a, b = (self.lora[file_name(base_name, side)].read() for side in "AB")
        return a, b, self.config.scaling_of(module_name(base_name))


def file_name(base_name: str, side: str) -> str:
    """Return what an ordinary PEFT adapter calls a tensor: for which base tensor and which side, "A" or "B"."""
    return f"base_model.model.{module_name(base_name)}.lora_{side}.weight"


def read_adapter(folder: Path) -> ExportedAdapter:
    """Read the config of an exported adapter, and the headers of its files.

    Raises:
        MergeError: one of its classes: a file is missing or broken, or no plain LoRA.
    """
    try:
        config = lora_config(read_json(folder / CONFIG_NAME))
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG_NAME}: {error}") from error
    return ExportedAdapter(config, stored_tensors(folder / WEIGHTS_NAME), stored_tensors(folder / PROJECTOR_NAME))


def base_beside(folder: Path) -> dict[str, Shape]:
    """Return the tensors of the base that was exported with an adapter; none where it was not.

    Raises:
        MergeError: one of its classes: its config cannot be read.
    """
    path = folder.parent / BASE / BASE_CONFIG_NAME
    if not path.exists():
        return {}
    shapes = base_shapes(read_json(path) | {"multi_vector_projector_dim": 1})
    return {name: shape for name, shape in shapes.items() if name not in PROJECTOR}


def check_adapter(folder: Path, manifest: Mapping[str, Any], adapter: ExportedAdapter) -> list[str]:
    """Check names, shapes and dtypes of an adapter's tensors, its scaling, and that the base beside it is its own.

    Returns:
        All that is wrong, each a sentence.
    """
    problems = []
    expected: dict[str, Shape] = {}
    hidden = 0
    for name, (n_out, n_in) in ((name, shape) for name, shape in base_beside(folder).items() if is_matrix(name)):
        rank = adapter.config.rank_of(module_name(name))
        expected |= {file_name(name, "A"): (rank, n_in), file_name(name, "B"): (n_out, rank)}
        hidden = n_in if name.endswith(".q_proj.weight") else hidden
    if expected:
        size = next((tensor.shape[0] for tensor in adapter.projector.values()), 0)
        expected |= {PROJECTOR_WEIGHT: (size, hidden), PROJECTOR_BIAS: (size,)}
        tensors = {**adapter.lora, **adapter.projector}
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        try:
            check(str(folder), shapes, expected, {name: tensor.path.name for name, tensor in tensors.items()})
        except LayoutError as error:
            problems.append(str(error))
    for stored, dtype in ((adapter.lora, DTYPES[manifest["dtype"]]), (adapter.projector, _PROJECTOR_DTYPE)):
        if other := [f"{name} ({tensor.path.name})" for name, tensor in stored.items() if tensor.dtype != dtype]:
            problems.append(f"{folder}: these tensors must be {dtype} and are not: {named(other)}")
    base_manifest = folder.parent / BASE / MANIFEST_NAME
    if base_manifest.exists() and _base_of(manifest) != _base_of(read_json(base_manifest)):
        problems.append(
            f"{folder}: was made for another base than {base_manifest.parent}, or without it; export base and adapters "
            "again with `jina-v4-merge export-adapters --with-base`"
        )
    told = manifest.get("scaling")
    default = told.get("default") if isinstance(told, Mapping) else told
    if default != adapter.config.scaling:
        problems.append(f"{folder / MANIFEST_NAME}: scaling is {told!r}; {CONFIG_NAME} says {adapter.config.scaling!r}")
    return problems


def _base_of(manifest: Mapping[str, Any]) -> object:
    """Return the sums of the files from which the base of an exported folder was made, as servers compare them."""
    found: object = manifest
    for key in ("sources", "base", "files"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found
