"""The revision: what decides about the vectors of a server, in one short text that every reply carries."""

from collections.abc import Mapping
from typing import Any

from jina_v4_serve.checkpoint import Checkpoint
from jina_v4_serve.exported import Adapter

# What stands before the name of a coarser type, and vLLM's option that names it.
QUANTIZED = {"": "quantization", "kv_": "kv_cache_dtype", "vision_": "mm_encoder_attn_dtype"}


def revision(checkpoint: Checkpoint, precision: str, max_pixels: int | None, adapter: Adapter | None = None) -> str:
    """Return what decides about the vectors: the checkpoint's files, the precision, the largest image area.

    `max_pixels` is as the operator set it, None for the checkpoint's own; the `adapter` is beside an exported base.
    """
    digest = checkpoint.digest if adapter is None else adapter.digest
    return f"{digest[:16]}-{precision}-{max_pixels or checkpoint.max_pixels}"


def precision(merged: Mapping[str, Any], quantized: str | None = None) -> str:
    """Return what vLLM computes in: the dtype, and what is quantized, as in bfloat16+int8+kv_fp8.

    `merged` are vLLM's settings from our arguments and the user's options, `quantized` is of the checkpoint's matrices.
    """
    return "+".join([merged["dtype"], *quantized_parts(merged, quantized)])


def quantized_parts(merged: Mapping[str, Any], quantized: str | None = None) -> list[str]:
    """Return what has another type than the rest, each in its own words: weights, keys and values, the vision tower.

    What the checkpoint's matrices are goes before vLLM's setting, which has one word for all that is read from one.
    """
    values = {**merged, "quantization": quantized or merged.get("quantization")}
    return [
        f"{part}{value}"
        for part, name in QUANTIZED.items()
        if (value := values.get(name)) not in (None, "auto", merged["dtype"])
    ]
