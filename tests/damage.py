"""Changes to the files of bases, checkpoints and exports, for tests of who notices them; and what such folders hold."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from conftest import TASKS
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def flip(path: Path, position: int = -1000) -> None:
    """Flip a bit of one byte."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def truncate(path: Path, n_bytes: int) -> None:
    """Cut off so many bytes at the end."""
    path.write_bytes(path.read_bytes()[:-n_bytes])


def change_json(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_json(path: Path, **changes: object) -> None:
    change_json(path, lambda content: content.update(changes))


def edit(path: Path, change: Callable[[Tensors], object]) -> None:
    """Change the tensors of a file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def rehash(folder: Path) -> None:
    """Make the manifest agree with its files as they are, as a mistake made before it was written would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    contents = {name: (folder / name).read_bytes() for name in manifest["files"] if (folder / name).exists()}
    manifest["files"] = {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        for name, content in contents.items()
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edit_and_rehash(path: Path, change: Callable[[Tensors], object]) -> None:
    edit(path, change)
    rehash(path.parent)


def split_adapters(adapters: Path, tasks: Iterable[str] = TASKS) -> None:
    """Turn the published layout, one file, into the older one, a folder a task."""
    tensors = load_file(adapters / "adapter_model.safetensors")
    for task in tasks:
        (adapters / task).mkdir()
        own = {name.replace(f".{task}.", "."): t for name, t in tensors.items() if f".{task}." in name}
        save_file(own, adapters / task / "adapter_model.safetensors")
        shutil.copy(adapters / "adapter_config.json", adapters / task)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (adapters / name).unlink()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights_of(folder: Path) -> Tensors:
    return {name: tensor for path in sorted(folder.glob("m*.safetensors")) for name, tensor in load_file(path).items()}
