"""The multi-vector projector of a merged checkpoint, for servers that do not have it.

It is read here and not by ``safetensors.numpy``, because numpy has no bfloat16, in which most checkpoints keep it.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize

from jina_v4_client._model import MULTIVECTOR_DIM, TASKS, Task
from jina_v4_client._pooling import Vector, normalise_rows
from jina_v4_client.errors import ArgumentError, WrongServerError

PROJECTOR_FILE = "multi_vector_projector.safetensors"
_WEIGHT, _BIAS = "multi_vector_projector.weight", "multi_vector_projector.bias"
_MAX_BYTES = 64 * 2**20  # the real one has 1 MB: anything near this is another file


@dataclass(frozen=True)
class Projector:
    """What turns hidden states into the rows of a multi-vector.

    Attributes:
        path: where it was read.
        weight: (128, hidden)
        bias: (128,)
        task: whose it is, if the checkpoint's manifest lies beside it.
    """

    path: Path
    weight: Vector
    bias: Vector
    task: Task | None

    def project(self, rows: Vector) -> Vector:
        """Make a multi-vector.

        Args:
            rows: (n_tokens, hidden), not normalised, of the whole prompt.

        Returns:
            (n_tokens, 128) float32, every row of unit length.

        Raises:
            WrongServerError: hidden states of another model's size.
        """
        if rows.shape[1] != self.weight.shape[1]:
            raise WrongServerError(
                f"the server's hidden states have {rows.shape[1]} numbers and projector={str(self.path)!r} takes "
                f"{self.weight.shape[1]}: it belongs to another model"
            )
        return normalise_rows(rows @ self.weight.T + self.bias)  # (n_tokens, 128)


def read_projector(path: object) -> Projector:
    """Read the file of a projector.

    Raises:
        ArgumentError: no such file, or not this one.
    """
    if not isinstance(path, str | os.PathLike):
        raise ArgumentError(f"projector must be the path of a {PROJECTOR_FILE}, not {type(path).__name__}")
    file = Path(path)
    try:
        if not file.is_file() or file.stat().st_size > _MAX_BYTES:
            raise ArgumentError(f"projector={str(file)!r} is no {PROJECTOR_FILE}; give the path of a checkpoint's")
        # deserialize is not typed
        tensors: dict[str, Any] = dict(deserialize(file.read_bytes()))  # type: ignore[no-untyped-call]
    except ArgumentError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise ArgumentError(f"projector={str(file)!r} cannot be read ({error}); copy it anew") from error
    if tensors.keys() != {_WEIGHT, _BIAS}:
        raise ArgumentError(
            f"projector={str(file)!r} does not hold {_WEIGHT} and {_BIAS}; give the checkpoint's {PROJECTOR_FILE}"
        )
    weight, bias = (_as_float32(tensors[name]) for name in (_WEIGHT, _BIAS))
    if weight is None or bias is None or weight.ndim != 2 or weight.shape[0] != MULTIVECTOR_DIM:
        raise ArgumentError(f"projector={str(file)!r} has tensors of a shape or dtype that is not the model's")
    if bias.shape != (MULTIVECTOR_DIM,) or not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise ArgumentError(f"projector={str(file)!r} has NaN, infinity or a bias that is not the model's")
    return Projector(file, weight, bias, _manifest_task(file.with_name("manifest.json")))


def _as_float32(tensor: dict[str, Any]) -> Vector | None:
    if tensor["dtype"] == "BF16":
        upper = np.frombuffer(tensor["data"], "<u2").astype(np.uint32)
        return (upper << 16).view(np.float32).reshape(tensor["shape"])
    dtype = {"F32": "<f4", "F16": "<f2"}.get(tensor["dtype"])
    return None if dtype is None else np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"]).astype(np.float32)


def _manifest_task(manifest: Path) -> Task | None:
    """Read the task from a checkpoint's manifest; a projector copied somewhere else lies without one."""
    try:
        document = json.loads(manifest.read_bytes())
    except (OSError, ValueError):
        return None
    said = document.get("task") if isinstance(document, dict) else None
    return next((task for task in TASKS if task == said), None)
