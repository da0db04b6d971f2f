"""Checks an exported base and the adapters of all tasks, which one server loads together (`--one-base`).

`jina-v4-merge export-adapters --with-base` writes the folder `base`, and a folder for each task with its adapter and
its folded projector. vLLM reports no error when an adapter lacks the tensors of a layer: that layer silently stays the
base's. So every tensor is checked here, and a server compares its vectors at the start (`api.start_check`).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jina_v4_serve.checkpoint import (
    BASE,
    PROJECTOR,
    Checkpoint,
    check_canary,
    digest_of,
    read_json,
    read_manifest,
    read_tensors,
    readable,
)
from jina_v4_serve.errors import CheckpointError, OptionError
from jina_v4_serve.facts import TASKS

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
# Older versions ignore `rank_pattern` and `alpha_pattern`, and scale such layers wrongly.
OLDEST_VLLM_WITH_PATTERNS = (0, 32)

_MODULES = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_SCALING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
_PROJECTOR_AXES = {"multi_vector_projector.weight": 2, "multi_vector_projector.bias": 1}


@dataclass(frozen=True)
class Adapter:
    """A task's adapter and projector on disk.

    Attributes:
        digest: a hash of base and adapter. Equal files have equal digests, whoever exported them and when.
        weight_bytes: the size of adapter and projector on disk.
        rank: the highest rank of any layer.
        has_patterns: whether some layers have their own rank or scaling.
    """

    folder: Path
    task: str
    digest: str
    weight_bytes: int
    rank: int
    has_patterns: bool


@readable()
def read_adapters(checkpoint: Checkpoint) -> dict[str, Adapter]:
    """Check the adapters of an exported base; return them by task. A merged checkpoint has none.

    Raises:
        CheckpointError: an adapter is missing, incomplete, of another task or another base.
    """
    if checkpoint.task != BASE:
        return {}
    return {task: _read_adapter(checkpoint, checkpoint.folder.parent / task, task) for task in TASKS}


def _read_adapter(base: Checkpoint, folder: Path, task: str) -> Adapter:
    again = "Export base and adapters again with `jina-v4-merge export-adapters --with-base`"
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing: each task's adapter has a folder next to the base. {again}")
    manifest = read_manifest(folder, task)
    if manifest.get("part") != "adapter":
        raise CheckpointError(f"{folder} is not an adapter of `jina-v4-merge export-adapters`. {again}")
    if _base_of(folder) != _base_of(base.folder):
        raise CheckpointError(f"{folder} was made for another base than {base.folder}. {again}")
    check_canary(folder)
    tensors = read_tensors(folder / WEIGHTS, str(manifest["dtype"]))
    expected = {
        f"base_model.model.model.language_model.layers.{i}.{module}.lora_{side}.weight"
        for i in range(base.n_layers)
        for module in _MODULES
        for side in "AB"
    }
    if odd := sorted(expected ^ tensors.keys()):
        reason = "is missing" if odd[0] in expected else "fits no layer"
        raise CheckpointError(f"{folder / WEIGHTS}: {odd[0]} {reason} ({len(odd)} in all). {again}")
    projector = read_tensors(folder / PROJECTOR, "float32")
    if {name: len(tensor.shape) for name, tensor in projector.items()} != _PROJECTOR_AXES:
        raise CheckpointError(
            f"{folder / PROJECTOR} is not a projector: it has {', '.join(sorted(projector))}. {again}"
        )
    config = read_json(folder / CONFIG)
    return Adapter(
        folder=folder,
        task=task,
        digest=_digest(base, manifest["files"], config),
        weight_bytes=sum((folder / name).stat().st_size for name in (WEIGHTS, PROJECTOR)),
        rank=max(tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_A.weight")),
        has_patterns=bool(config.get("rank_pattern") or config.get("alpha_pattern")),
    )


def _digest(base: Checkpoint, files: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    # The config also says where the base came from, which does not change the vectors.
    weights = digest_of({name: entry for name, entry in files.items() if name != CONFIG})
    scaling = json.dumps([config.get(key) for key in _SCALING])
    return hashlib.sha256(f"{base.digest} {weights} {scaling}".encode()).hexdigest()


def _base_of(folder: Path) -> object:
    """Return the checksums of the files from which a folder's base was made."""
    sources = read_json(folder / "manifest.json").get("sources")
    base = sources.get("base") if isinstance(sources, Mapping) else None
    return base.get("files") if isinstance(base, Mapping) else None


def check_patterns(adapters: Mapping[str, Adapter], vllm_version: Sequence[int]) -> None:
    """Refuse adapters that the installed vLLM would scale wrongly.

    Raises:
        OptionError: the message names the adapter and the oldest version that scales it right.
    """
    for adapter in adapters.values():
        if adapter.has_patterns and tuple(vllm_version) < OLDEST_VLLM_WITH_PATTERNS:
            oldest = ".".join(map(str, OLDEST_VLLM_WITH_PATTERNS))
            raise OptionError(
                f"{adapter.folder / CONFIG} sets rank_pattern or alpha_pattern, which vLLM reads from {oldest} on;"
                " serve merged checkpoints, or install a newer vLLM"
            )
