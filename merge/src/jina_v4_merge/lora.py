"""The maths of folding a LoRA adapter into a weight; no files here.

A linear layer with an adapter computes `x W' + scaling * (x A') B'`; the same layer without one computes it with
`W + scaling * (B @ A)` as its weight. The sum is taken in float64 and rounded once, to the output dtype.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from jina_v4_merge.errors import ConfigError, named

_Number = TypeVar("_Number", int, float)

# Settings that change what an adapter computes. peft knows how to apply them, this program does not: each must be
# absent or off. Anything else in the config concerns training only.
_MUST_BE_OFF = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)


@dataclass(frozen=True)
class LoraConfig:
    """What an adapter_config.json says about rank and scaling.

    Attributes:
        rank: Of every module that no key of `rank_pattern` matches.
        alpha: Of every module that no key of `alpha_pattern` matches.
        use_rslora: Whether alpha is divided by the root of the rank, not by the rank.
        rank_pattern: Regular expression to rank.
        alpha_pattern: Regular expression to alpha.
    """

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def rank_of(self, module: str) -> int:
        """Return the rank of a module, by its dotted name as it is in the adapter's file."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """Return the factor on `B @ A` of a module: alpha / rank, or alpha / sqrt(rank) with `use_rslora`."""
        return self._scaling(_by_pattern(self.alpha_pattern, module, self.alpha), self.rank_of(module))

    @property
    def scaling(self) -> float:
        """The factor of every module that no pattern matches."""
        return self._scaling(self.alpha, self.rank)

    def _scaling(self, alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def lora_config(config: Mapping[str, Any]) -> LoraConfig:
    """Read an adapter_config.json, and refuse what plain LoRA folding would get wrong.

    Raises:
        ConfigError: the adapter is not plain LoRA, or a rank or alpha is missing or out of range.

    Source: Hu et al., LoRA (2021); Kalajdzievski, A Rank Stabilization Scaling Factor (2023).
    """
    refused = [f"{key}={config[key]!r}" for key in _MUST_BE_OFF if config.get(key)]
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        refused.insert(0, f"peft_type={config['peft_type']!r}")
    if config.get("bias", "none") != "none":
        refused.append(f"bias={config['bias']!r}")
    if refused:
        raise ConfigError(f"adapter config sets {named(refused)}; only plain LoRA can be folded")
    return LoraConfig(
        _rank("r", config.get("r")),
        _alpha("lora_alpha", config.get("lora_alpha")),
        bool(config.get("use_rslora")),
        {key: _rank(f"rank_pattern[{key!r}]", value) for key, value in _pattern(config, "rank_pattern")},
        {key: _alpha(f"alpha_pattern[{key!r}]", value) for key, value in _pattern(config, "alpha_pattern")},
    )


def fold(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, dtype: torch.dtype) -> torch.Tensor:
    """Return `weight + scaling * (b @ a)`, computed in float64 and rounded once.

    Args:
        weight: (n_out, n_in), any float dtype; may be some rows of a weight, with `b` cut to the same rows.
        a: (rank, n_in), any float dtype.
        b: (n_out, rank), any float dtype.
        scaling: The factor on `b @ a`.
        dtype: Of the result.

    Returns:
        (n_out, n_in), `dtype`. Not finite where an input is not, or where the sum does not fit `dtype`.
    """
    return torch.addmm(weight.double(), b.double(), a.double(), alpha=scaling).to(dtype)


def _by_pattern(pattern: Mapping[str, _Number], module: str, default: _Number) -> _Number:
    """Return the value of the first key that matches the end of a module's name, from a dot on, as PEFT does."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _pattern(config: Mapping[str, Any], name: str) -> Iterator[tuple[str, object]]:
    pattern = config.get(name) or {}
    if not isinstance(pattern, Mapping):
        raise ConfigError(f"adapter config says {name}={pattern!r}; it must be an object of module names and numbers")
    for key, value in pattern.items():
        try:
            re.compile(key)
        except re.error as error:
            raise ConfigError(f"adapter config says {name}[{key!r}], no regular expression: {error}") from error
        yield key, value


def _rank(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"adapter config says {name}={value!r}; it must be a whole number of at least 1")
    return value


def _alpha(name: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ConfigError(f"adapter config says {name}={value!r}; it must be a number")
    return value
