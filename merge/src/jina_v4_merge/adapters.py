"""Reading the task adapters that lie beside a base, in `adapters/`.

The published layout is one file with all tasks in it, the task being the last name before `.weight`; older revisions
have a folder a task, each an ordinary single-task adapter. Either way the result is the same: a scaling for each task,
and tensors under the names of the published layout.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jina_v4_merge.errors import ConfigError, LayoutError, SourceError
from jina_v4_merge.layout import Shape, adapter_name, adapter_shapes, check, published_name
from jina_v4_merge.lora import rank_and_scaling
from jina_v4_merge.sources import read_json
from jina_v4_merge.weights import StoredTensor, stored_tensors

FOLDER = "adapters"
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

_TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(\.(?P<task>[^.]+))?\.weight")


@dataclass(frozen=True)
class Adapters:
    """The adapters of all tasks of a base.

    Attributes:
        files: What they were read from, relative to the base's folder.
        scalings: Task to factor on `B @ A`.
        tensors: Published adapter tensor name to tensor.
    """

    files: Sequence[str]
    scalings: Mapping[str, float]
    tensors: Mapping[str, StoredTensor]


def read_adapters(folder: Path, tasks: Sequence[str], base: Mapping[str, Shape]) -> Adapters:
    """Read the headers and configs of a base's adapters, and account for every tensor in them.

    Args:
        folder: The base's.
        tasks: All tasks that the base has adapters for.
        base: The shapes of the base's tensors, by published name.

    Raises:
        SourceError: a file is missing or broken.
        ConfigError: an adapter is not plain LoRA.
        LayoutError: a tensor is unknown, missing or misshapen.
    """
    files: list[str] = []
    ranks: dict[str, int] = {}
    scalings: dict[str, float] = {}
    tensors: dict[str, StoredTensor] = {}
    for part, part_tasks in _parts(folder, tasks):
        files += [f"{part}/{CONFIG_NAME}", f"{part}/{WEIGHTS_NAME}"]
        rank, scaling = _read_config(folder / part / CONFIG_NAME)
        ranks |= dict.fromkeys(part_tasks, rank)
        scalings |= dict.fromkeys(part_tasks, scaling)
        for tensor in stored_tensors(folder / part / WEIGHTS_NAME).values():
            name = _published(tensor.name, part_tasks)
            if (other := tensors.setdefault(name, tensor)) is not tensor:
                raise LayoutError(f"{tensor.path}: {other.name} and {tensor.name} are one tensor")
    found = {name: tensor.shape for name, tensor in tensors.items()}
    check(str(folder / FOLDER), found, adapter_shapes(base, ranks))
    return Adapters(files, scalings, tensors)


def _parts(folder: Path, tasks: Sequence[str]) -> list[tuple[str, Sequence[str]]]:
    if (folder / FOLDER / WEIGHTS_NAME).exists():
        return [(FOLDER, tasks)]
    if any((folder / FOLDER / task).is_dir() for task in tasks):
        return [(f"{FOLDER}/{task}", [task]) for task in tasks]
    raise SourceError(f"{folder / FOLDER / WEIGHTS_NAME}: no such file, nor a folder for each task beside it")


def _read_config(path: Path) -> tuple[int, float]:
    config = read_json(path)
    try:
        return rank_and_scaling(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _published(name: str, tasks: Sequence[str]) -> str:
    """Return the published name of an adapter tensor; one that has none keeps its own, and is unknown."""
    match = _TENSOR_NAME.fullmatch(name)
    if match is None:
        return name
    task = match["task"] or (tasks[0] if len(tasks) == 1 else None)
    if task is None:
        return name
    return adapter_name(task, published_name(match["module"]) + ".weight", match["side"])
