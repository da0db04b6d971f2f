"""The model to be folded: a base and its adapters, of which every tensor is accounted for and no value is read yet."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jina_v4_merge.errors import ConfigError, SourceError, named
from jina_v4_merge.files import read_json
from jina_v4_merge.reading import sources
from jina_v4_merge.reading.adapters import Adapters, read_adapters
from jina_v4_merge.reading.configs import CONFIG_NAME, TOKENIZER_NAME, check_tokenizer, small_files, task_names
from jina_v4_merge.reading.layout import base_shapes, check
from jina_v4_merge.reading.weights import StoredTensor, base_files, base_tensors


@dataclass(frozen=True)
class Model:
    """A base and its adapters.

    Attributes:
        base: Where the base is.
        config: Its config.json.
        tensors: Its tensors by published name, in the order in which checkpoints have them.
        small_files: The content of its tokenizer's and processor's files, by name.
        base_files: The names of all files of the base that are used.
        adapter_source: Where the adapters are; `base` again, if beside it.
        adapters: Those of all its tasks.
        states: The state of each file in the folders that were read, from before anything was.
    """

    base: sources.Source
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    small_files: Mapping[str, bytes]
    base_files: Sequence[str]
    adapter_source: sources.Source
    adapters: Adapters
    states: Mapping[Path, sources.FileState | None]

    @property
    def files(self) -> list[Path]:
        """All files that are read, the weights among them."""
        adapter_files = dict.fromkeys(name for names in self.adapters.files.values() for name in names)
        return [self.base.folder / name for name in self.base_files] + [
            self.adapter_source.folder / name for name in adapter_files
        ]

    def require_tasks(self, tasks: Iterable[str]) -> None:
        """Check that there is an adapter of each of some tasks.

        Raises:
            ConfigError: with those that there is none of.
        """
        if absent := [task for task in tasks if task not in self.adapters.tasks]:
            raise ConfigError(
                f"{self.adapter_source.name} has no adapter of task {named(absent)}; "
                f"it has {', '.join(self.adapters.tasks)}"
            )

    def require_unchanged(self) -> None:
        """Check that all files that are read are still the ones that they were when the model was opened.

        Raises:
            SourceError: with those that are not.
        """
        if changed := [str(path) for path in self.files if sources.file_state(path) != self.states.get(path)]:
            raise SourceError(
                f"{named(changed)}: changed while the base was read. Nothing was written; start again when nobody "
                "writes there any more"
            )

    def lora(self, task: str, base_name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Return A (rank, n_in) and B (n_out, rank), float64, and the factor on `B @ A`, of a task and base tensor.

        Raises:
            WeightError: A is all zero, which no training makes it: it was never written.
        """
        a, b = self.adapters.pair(task, base_name)
        rows_of_a = [block for _, block in a.row_blocks()]
        return torch.cat(rows_of_a).double(), b.read().double(), self.adapters.scalings[task][base_name]


def open_model(
    base: str, revision: str | None = None, adapters: str | None = None, adapters_revision: str | None = None
) -> Model:
    """Find base and adapters, read all of them but the values of tensors, and account for every tensor.

    Args:
        base: A folder, or the name of a model on the hub.
        revision: Of a base on the hub.
        adapters: A folder, or the name of a model on the hub, of adapters that are not beside the base.
        adapters_revision: Of adapters on the hub.

    Raises:
        MergeError: one of its classes: something cannot be found or read, does not fit, or cannot be folded exactly.
    """
    if adapters_revision is not None and adapters is None:
        raise SourceError("--adapters-revision is for --adapters from the hub; --revision is for the base")
    # Another model is refused before its gigabytes are fetched.
    base_shapes(read_json(sources.find("--base", base, revision, only=CONFIG_NAME).folder / CONFIG_NAME))
    source = sources.find("--base", base, revision)
    states = sources.file_states(source.folder)
    config = read_json(source.folder / CONFIG_NAME)
    shapes = base_shapes(config)
    tensors = base_tensors(source.folder)
    found = {name: tensor.shape for name, tensor in tensors.items()}
    check(source.name, found, shapes, {name: tensor.path.name for name, tensor in tensors.items()})
    configs = small_files(source.folder)
    check_tokenizer(source.folder / TOKENIZER_NAME, configs[TOKENIZER_NAME], config)
    adapter_source = source if adapters is None else sources.find("--adapters", adapters, adapters_revision)
    if adapter_source is not source:
        states |= sources.file_states(adapter_source.folder)
    return Model(
        source,
        config,
        {name: tensors[name] for name in shapes},  # the same order, whatever the base's files have
        configs,
        [CONFIG_NAME, *configs, *base_files(source.folder)],
        adapter_source,
        read_adapters(adapter_source.folder, task_names(config), shapes),
        states,
    )
