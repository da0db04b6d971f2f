"""The maths of folding a LoRA adapter into a weight; no files here.

A linear layer with an adapter computes `x W' + scaling * (x A') B'`; the same layer without one computes it with
`W + scaling * (B @ A)` as its weight. The sum is taken in float32 and rounded once, to the output dtype.
"""

import math
from typing import Any

import torch

from jina_v4_merge.errors import ConfigError, named

# Settings that change what an adapter computes. peft knows how to apply them, this program does not: each must be
# absent or off. Anything else in the config concerns training only.
_MUST_BE_OFF = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)


def rank_and_scaling(config: dict[str, Any]) -> tuple[int, float]:
    """Read rank and scaling from an adapter_config.json, and refuse what plain LoRA folding would get wrong.

    Returns:
        The rank, and the factor on `B @ A`: alpha / rank, or alpha / sqrt(rank) with `use_rslora`.

    Raises:
        ConfigError: the adapter is not plain LoRA, or rank or alpha are missing or out of range.

    Source: Hu et al., LoRA (2021); Kalajdzievski, A Rank Stabilization Scaling Factor (2023).
    """
    refused = [f"{key}={config[key]!r}" for key in _MUST_BE_OFF if config.get(key)]
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        refused.insert(0, f"peft_type={config['peft_type']!r}")
    if config.get("bias", "none") != "none":
        refused.append(f"bias={config['bias']!r}")
    if refused:
        raise ConfigError(f"adapter config sets {named(refused)}; only plain LoRA can be folded")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ConfigError(f"adapter config says r={rank!r}; it must be a whole number of at least 1")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise ConfigError(f"adapter config says lora_alpha={alpha!r}; it must be a number")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def fold(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, dtype: torch.dtype) -> torch.Tensor:
    """Return `weight + scaling * (b @ a)`, computed in float32 and rounded once.

    Args:
        weight: (n_out, n_in), any float dtype; may be some rows of a weight, with `b` cut to the same rows.
        a: (rank, n_in), any float dtype.
        b: (n_out, rank), any float dtype.
        scaling: The factor on `b @ a`.
        dtype: Of the result.

    Returns:
        (n_out, n_in), `dtype`. Not finite where an input is not, or where the sum does not fit `dtype`.
    """
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scaling).to(dtype)
