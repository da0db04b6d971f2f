"""Reading the task adapters, from `adapters/` in a base or from a place of their own.

The published layout is one file with all tasks in it, the task being the last name before `.weight`; older revisions
have a folder a task, each an ordinary single-task adapter. Either way the result is the same: a scaling for each task
and base tensor, and tensors under the names of the published layout.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jina_v4_merge.errors import LayoutError, SourceError
from jina_v4_merge.files import pickles
from jina_v4_merge.reading.adapter_config import LoraConfig, read_lora_config
from jina_v4_merge.reading.layout import Shape, adapter_name, adapter_shapes, check, is_adapted, published_name
from jina_v4_merge.reading.sources import ADAPTERS_FOLDER
from jina_v4_merge.reading.weights import StoredTensor, stored_tensors

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"

# PEFT puts `base_model.model.` before the module; tools that unwrap its model first leave it out.
_TENSOR_NAME = re.compile(r"(base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(\.(?P<task>[^.]+))?\.weight")


@dataclass(frozen=True)
class Adapters:
    """The adapters of some tasks.

    Attributes:
        files: Task to what its adapter was read from, relative to the folder that was read.
        configs: Task to the config of its adapter.
        scalings: Task to published base tensor name to factor on `B @ A`.
        tensors: Published adapter tensor name to tensor.
    """

    files: Mapping[str, Sequence[str]]
    configs: Mapping[str, LoraConfig]
    scalings: Mapping[str, Mapping[str, float]]
    tensors: Mapping[str, StoredTensor]

    @property
    def tasks(self) -> list[str]:
        """The tasks that there are adapters of."""
        return list(self.scalings)

    def pair(self, task: str, base_name: str) -> tuple[StoredTensor, StoredTensor]:
        """Return A (rank, n_in) and B (n_out, rank) of a task, for a base tensor by its published name."""
        return self.tensors[adapter_name(task, base_name, "A")], self.tensors[adapter_name(task, base_name, "B")]


def read_adapters(folder: Path, tasks: Sequence[str], base: Mapping[str, Shape]) -> Adapters:
    """Read the headers and configs of the adapters in a folder, and account for every tensor in them.

    Args:
        folder: The base's, with `adapters/` in it, or one that has the adapters at its top.
        tasks: All tasks that the base has adapters for. Where each has a folder, one without is left out.
        base: The shapes of the base's tensors, by published name.

    Raises:
        SourceError: a file is missing or broken, or there are adapters in two places.
        ConfigError: an adapter is not plain LoRA.
        LayoutError: a tensor is unknown, missing or misshapen.
    """
    files: dict[str, list[str]] = {}
    configs: dict[str, LoraConfig] = {}
    tensors: dict[str, StoredTensor] = {}
    for prefix, part_tasks in _parts(folder, tasks):
        names = [prefix + ADAPTER_CONFIG_NAME, prefix + ADAPTER_WEIGHTS_NAME]
        files |= dict.fromkeys(part_tasks, names)
        configs |= dict.fromkeys(part_tasks, read_lora_config(folder / names[0]))
        for tensor in stored_tensors(folder / names[1]).values():
            name = _published(tensor, part_tasks)
            if (other := tensors.setdefault(name, tensor)) is not tensor:
                raise LayoutError(f"{tensor.path}: {other.name} and {tensor.name} are one tensor")

    def rank(task: str, base_name: str) -> int:
        return configs[task].rank_of(_module(tensors, task, base_name))

    found = {name: tensor.shape for name, tensor in tensors.items()}
    places = {name: str(tensor.path.relative_to(folder)) for name, tensor in tensors.items()}
    check(str(folder), found, adapter_shapes(base, configs, rank), places)
    scalings = {
        task: {name: config.scaling_of(_module(tensors, task, name)) for name in filter(is_adapted, base)}
        for task, config in configs.items()
    }
    return Adapters(files, configs, scalings, tensors)


def _parts(folder: Path, tasks: Sequence[str]) -> list[tuple[str, Sequence[str]]]:
    """Return what the names of files begin with, for each folder with a file, and the tasks that the file has."""
    found: list[list[tuple[str, Sequence[str]]]] = []
    for prefix in (f"{ADAPTERS_FOLDER}/", ""):
        if (folder / prefix / ADAPTER_WEIGHTS_NAME).exists():
            found.append([(prefix, tasks)])
        if present := [task for task in tasks if _holds_adapter(folder / prefix / task)]:
            found.append([(f"{prefix}{task}/", [task]) for task in present])
    if len(found) > 1:
        first, second = (folder / parts[0][0] for parts in found[:2])
        raise SourceError(f"there are adapters in {first} and in {second}; remove those that are not to be used")
    if found:
        return found[0]
    raise SourceError(
        f"{folder / ADAPTERS_FOLDER / ADAPTER_WEIGHTS_NAME}: no such file, nor a folder for each task beside it, "
        f"nor either in {folder} itself; --adapters says where else the adapters are."
        f"{pickles(folder / ADAPTERS_FOLDER) or pickles(folder)}"
    )


def _holds_adapter(folder: Path) -> bool:
    return any((folder / name).exists() for name in (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME))


def _module(tensors: Mapping[str, StoredTensor], task: str, base_name: str) -> str:
    """Return the name of a module as the adapter's file has it: that is what patterns in the config are about."""
    name = adapter_name(task, base_name, "A")
    match = _TENSOR_NAME.fullmatch(tensors[name].name if name in tensors else name)
    return match["module"] if match else name


def _published(tensor: StoredTensor, tasks: Sequence[str]) -> str:
    """Return the published name of an adapter tensor; one that has none keeps its own, and is unknown."""
    match = _TENSOR_NAME.fullmatch(tensor.name)
    if match is None:
        return tensor.name
    only = tasks[0] if len(tasks) == 1 else None
    task = match["task"] or only
    if task is None:
        return tensor.name
    if only is not None and task != only:
        raise LayoutError(f"{tensor.path}: {tensor.name} is not of task {only}, which this file is read for")
    return adapter_name(task, published_name(match["module"]) + ".weight", match["side"])
