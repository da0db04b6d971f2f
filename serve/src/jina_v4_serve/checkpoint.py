"""What the launcher reads of a merged checkpoint: enough to know that it is whole and of the asked task.

Names and sizes are compared with the manifest; the content is not hashed (7.5 GB would take longer than the start).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jina_v4_serve.errors import CheckpointError

MANIFEST = "manifest.json"
# Sides are multiples of 28 pixels: one image token stands for 28 x 28 of them.
PIXELS_PER_TOKEN = 28 * 28
# Tokens of the image prompt beside the image's own.
IMAGE_PROMPT_TOKENS = 11


@dataclass(frozen=True)
class Checkpoint:
    """A whole merged checkpoint on disk."""

    folder: Path
    task: str
    dtype: str
    max_positions: int
    random_weights: bool


def read_checkpoint(folder: Path, task: str) -> Checkpoint:
    """Check a folder against its manifest.

    Args:
        folder: what `jina-v4-merge fold` wrote for one task.
        task: the task it must be of.

    Raises:
        CheckpointError: when it is missing, incomplete, of another task, or not a merged checkpoint at all.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no such folder: {folder}. `jina-v4-merge fold --base BASE --out DIR` makes checkpoints")
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: it is not a checkpoint of `jina-v4-merge fold`"
            " (the folder to name is the one of a single task, such as DIR/jina-embeddings-v4-retrieval)"
        )
    manifest = _read_json(folder / MANIFEST)
    try:
        served, dtype, files = manifest["task"], manifest["dtype"], manifest["files"]
        sizes = {str(name): int(entry["size"]) for name, entry in files.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is not a manifest of `jina-v4-merge fold`: {error!r}") from error
    if served != task:
        raise CheckpointError(f"{folder} is the checkpoint of task {served}, not of {task}")
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} is not whole: {name} is missing. Fold it again")
        if path.stat().st_size != size:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, the manifest says {size}. Fold it again")
    config = _read_json(folder / "config.json")
    text_config = config.get("text_config", config)
    return Checkpoint(
        folder=folder,
        task=task,
        dtype=dtype,
        max_positions=int(text_config["max_position_embeddings"]),
        random_weights="standin" in manifest.get("sources", {}).get("base", {}),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return content
