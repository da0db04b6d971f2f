"""The revision: a short text in every reply that changes when the vectors of a server change."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jina_v4_serve.checkpoint import BASE, Checkpoint, read_checkpoint
from jina_v4_serve.errors import CheckpointError
from jina_v4_serve.exported import Adapter, read_adapters
from jina_v4_serve.settings import Served

# vLLM's options for coarser types, by the prefix that their values get in the revision.
QUANTIZED = {"": "quantization", "kv_": "kv_cache_dtype", "vision_": "mm_encoder_attn_dtype"}


def revision(checkpoint: Checkpoint, precision: str, max_pixels: int | None, adapter: Adapter | None = None) -> str:
    """Return the revision: a digest of the files, the precision, and the largest image area.

    `max_pixels` is the operator's, or None for the checkpoint's; `adapter` is the task's, if there is one.
    """
    return f"{_digest(checkpoint, adapter)}-{precision}-{max_pixels or checkpoint.max_pixels}"


def check_same(folder: Path, served: Served) -> None:
    """Check after a start that the checkpoint is still the one whose revision was read before the start.

    Raises:
        CheckpointError: another checkpoint has replaced it. What was loaded may be of either, or a mixture.
    """
    if not served.revisions:  # the launcher did not start this server
        return
    checkpoint = read_checkpoint(folder, BASE if len(served.tasks) > 1 else served.tasks[0])
    adapters = read_adapters(checkpoint)
    for task, began_as in served.revisions.items():
        if not began_as.startswith(f"{_digest(checkpoint, adapters.get(task))}-"):
            raise CheckpointError(f"{folder} was replaced by another checkpoint during the start: start again")


def _digest(checkpoint: Checkpoint, adapter: Adapter | None) -> str:
    return (checkpoint.digest if adapter is None else adapter.digest)[:16]


def precision(merged: Mapping[str, Any], quantized: str | None = None) -> str:
    """Return the dtype that vLLM computes in, and what is quantized, as in bfloat16+int8+kv_fp8.

    `merged` are vLLM's settings from our arguments and the user's options; `quantized` is the checkpoint's.
    """
    return "+".join([merged["dtype"], *quantized_parts(merged, quantized)])


def quantized_parts(merged: Mapping[str, Any], quantized: str | None = None) -> list[str]:
    """Return the names of the quantized parts: weights, keys and values, the vision tower.

    The checkpoint's quantization wins over vLLM's setting, which has the same name for int8 and fp8.
    """
    values = {**merged, "quantization": quantized or merged.get("quantization")}
    return [
        f"{part}{value}"
        for part, name in QUANTIZED.items()
        if (value := values.get(name)) not in (None, "auto", merged["dtype"])
    ]
