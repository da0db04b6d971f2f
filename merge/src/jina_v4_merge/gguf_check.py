"""Checking a folder of `export-gguf` beyond its manifest, without the gguf package.

The manifest has the sha256 of the file, and the file is written in one go from what was checked before; so all that is
asked here is whether it is such a file, and whether the projector beside it is one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from jina_v4_merge.checkpoint import PROJECTOR_NAME, gguf_name
from jina_v4_merge.contents import HEAD_BYTES, instead
from jina_v4_merge.errors import MergeError
from jina_v4_merge.layout import PROJECTOR, PROJECTOR_BIAS, PROJECTOR_WEIGHT
from jina_v4_merge.weights import stored_tensors

_BEGINNING = b"GGUF\x03\x00\x00\x00"  # the name of the format and its version


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
        if not head.startswith(_BEGINNING):
            problems.append(f"{path}: this is {instead(head) or 'no GGUF file of version 3'}")
    if not (folder / PROJECTOR_NAME).is_file():
        return problems
    try:
        tensors = stored_tensors(folder / PROJECTOR_NAME)
    except MergeError as error:
        return [*problems, str(error)]
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if shapes.keys() != set(PROJECTOR) or shapes[PROJECTOR_WEIGHT][:1] != shapes[PROJECTOR_BIAS]:
        problems.append(f"{folder / PROJECTOR_NAME}: must hold {' and '.join(PROJECTOR)} of as many rows")
    elif any(tensor.dtype != torch.float32 for tensor in tensors.values()):
        problems.append(f"{folder / PROJECTOR_NAME}: its tensors must be float32")
    return problems
