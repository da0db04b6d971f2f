"""Reading an adapter_config.json, and refusing an adapter that is more than plain LoRA on the published base.

The file has the fields of PEFT's LoraConfig. `FIELDS` says of each which values leave the arithmetic plain. What is not
known to be plain is refused, for a wrong fold embeds plausibly: also a field that a later PEFT adds, unless it is off.
"""

import math
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jina_v4_merge.errors import ConfigError, named
from jina_v4_merge.files import read_json

_Number = TypeVar("_Number", int, float)

_ANY = None
_OFF: Sequence[object] = (None, False, [], {})
_NOT_SET = (None, False)  # PEFT takes {} for the defaults of a config
_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")

# The values with which an adapter is plain LoRA, by field of PEFT's LoraConfig. Any value is plain where a field is
# read below, concerns training only, or says which layers are adapted: the tensors say that too, and are all checked.
FIELDS: Mapping[str, Sequence[object] | None] = {
    "alora_invocation_tokens": _OFF,
    "alpha_pattern": _ANY,
    "arrow_config": _NOT_SET,
    "auto_mapping": _ANY,
    "base_model_name_or_path": _ANY,
    "bias": ("none",),
    "corda_config": _ANY,  # init_lora_weights decides
    "ensure_weight_tying": _ANY,  # of the embeddings' adapter, whose tensors are refused
    "eva_config": _ANY,  # init_lora_weights decides
    "exclude_modules": _ANY,
    "fan_in_fan_out": _OFF,
    "inference_mode": _ANY,
    "init_lora_weights": _INITS,  # PEFT's others change the base
    "kasa_config": _NOT_SET,
    "layer_replication": _OFF,
    "layers_pattern": _ANY,
    "layers_to_transform": _ANY,
    "loftq_config": _ANY,  # init_lora_weights decides
    "lora_alpha": _ANY,
    "lora_bias": _OFF,
    "lora_dropout": _ANY,
    "lora_ga_config": _ANY,  # init_lora_weights decides
    "megatron_config": _OFF,
    "megatron_core": _ANY,  # megatron_config decides
    "modules_to_save": _OFF,
    "monteclora_config": _NOT_SET,
    "peft_type": ("LORA",),
    "peft_version": _ANY,
    "qalora_group_size": _ANY,  # use_qalora decides
    "r": _ANY,
    "rank_pattern": _ANY,
    "revision": _ANY,
    "runtime_config": _ANY,
    "target_modules": _ANY,
    "target_parameters": _OFF,
    "task_type": _ANY,
    "trainable_token_indices": _OFF,
    "use_bdlora": _NOT_SET,
    "use_dora": _OFF,
    "use_qalora": _OFF,
    "use_rslora": (None, False, True),
    "velora_config": _NOT_SET,
}


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


def read_lora_config(path: Path) -> LoraConfig:
    """Read an adapter_config.json, and refuse what plain LoRA folding would get wrong.

    Raises:
        SourceError: there is no such file, or it cannot be read.
        ConfigError: as of `lora_config`, with the file's path.
    """
    config = read_json(path)
    try:
        return lora_config(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def lora_config(config: Mapping[str, Any]) -> LoraConfig:
    """Return what the content of an adapter_config.json says about rank and scaling.

    Raises:
        ConfigError: the adapter is not plain LoRA, or a rank or alpha is missing or out of range.

    Source: Hu et al., LoRA (2021); Kalajdzievski, A Rank Stabilization Scaling Factor (2023).
    """
    _require_plain(config)
    return LoraConfig(
        _rank("r", config.get("r")),
        _alpha("lora_alpha", config.get("lora_alpha")),
        bool(config.get("use_rslora")),
        {key: _rank(f"rank_pattern[{key!r}]", value) for key, value in _pattern(config, "rank_pattern")},
        {key: _alpha(f"alpha_pattern[{key!r}]", value) for key, value in _pattern(config, "alpha_pattern")},
    )


def _require_plain(config: Mapping[str, Any]) -> None:
    values = {"peft_type": None, **config}  # PEFT requires this field; the defaults of all others are plain
    if refused := [key for key, value in values.items() if not _is_plain(key, value)]:
        settings = named([f"{key}={reprlib.repr(values[key])}" for key in refused])
        ways = " ".join(dict.fromkeys(map(_way, refused)))
        raise ConfigError(f"adapter config sets {settings}; only plain LoRA can be folded. {ways}")


def _is_plain(key: str, value: object) -> bool:
    plain = FIELDS.get(key, _OFF)
    return plain is _ANY or any(type(value) is type(one) and value == one for one in plain)


def _way(key: str) -> str:
    """Return what to do about a field that is not plain."""
    if key == "init_lora_weights":
        return (
            f"Unless init_lora_weights is one of {_INITS}, PEFT changes the base too, and the adapter does not fit the "
            "published base. PEFT can write the adapter as plain LoRA: call save_pretrained with "
            "path_initial_model_for_weight_conversion (see docs/merge.md)."
        )
    if key not in FIELDS:
        return f"If {key} does not change what the adapter computes, remove it from the file: it is not known here."
    return "Train the adapter without this setting."


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
