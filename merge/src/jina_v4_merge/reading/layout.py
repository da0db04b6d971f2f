"""The tensors that base and adapters must hold, derived from the base's config.json: names and shapes, no files.

Everything is called by its published name (`model.layers.0...`, `visual...`). Transformers has other names for the same
layers, by version and by the class that was saved; `published_name` takes all of them. A tied `lm_head.weight` is not
part of an embedding model and counts as unknown.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jina_v4_merge.errors import ConfigError, LayoutError, named

Shape = tuple[int, ...]

PROJECTOR_WEIGHT = "multi_vector_projector.weight"
PROJECTOR_BIAS = "multi_vector_projector.bias"
PROJECTOR = (PROJECTOR_WEIGHT, PROJECTOR_BIAS)

_ADAPTED = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight")


# What a name begins with, and what the published one does. The first two are transformers' own names since 4.52, which
# 5.x also writes (`save_original_format=False`); the third is of the inner model, without the head, saved by itself.
_SPELLINGS = (
    ("model.language_model.", "model."),
    ("model.visual.", "visual."),
    ("language_model.", "model."),
)


def published_name(name: str) -> str:
    """Return the published name of a base tensor or module, whatever transformers called it."""
    for spelling, published in _SPELLINGS:
        if name.startswith(spelling):
            return published + name.removeprefix(spelling)
    return name


def is_adapted(name: str) -> bool:
    """Say whether each task has an adapter for the base tensor of this published name."""
    return name == PROJECTOR_WEIGHT or is_matrix(name)


def is_matrix(name: str) -> bool:
    """Say whether the base tensor of this published name is a matrix of the language model's layers."""
    return _ADAPTED.fullmatch(name) is not None


def is_language_model(name: str) -> bool:
    """Say whether the base tensor of this published name is the language model's."""
    return name.startswith("model.")


def base_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return every tensor that a base with this config.json holds, by published name.

    Raises:
        ConfigError: it is another model's, a size is missing or no positive whole number, the embeddings are untied, or
            a base is quantized.
    """
    if config.get("multi_vector_projector_dim") is None:
        raise ConfigError(
            "config.json has no multi_vector_projector_dim, so this is another model. The base is the published one, "
            "jinaai/jina-embeddings-v4, with its projector and adapters; the maker's checkpoints for vLLM have neither"
        )
    return stock_shapes(config) | projector_shapes(config, _Sizes(config, "")["multi_vector_projector_dim"])


def stock_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return the same without the projector, for which a stock checkpoint's config.json has no place."""
    text = _text_config(config)
    if not config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)):
        raise ConfigError("config.json does not tie the word embeddings; only the tied 3B model is known here")
    if config.get("quantization_config") or text.get("quantization_config"):
        raise ConfigError(
            "config.json has a quantization_config, and loaders would quantize the folded weights by it; use a base "
            "that is not quantized, or remove the key if the weights are the published ones"
        )
    return _text_shapes(text) | _vision_shapes(config)


def projector_shapes(config: Mapping[str, Any], dim: int) -> dict[str, Shape]:
    """Return the projector's tensors, of multi-vectors of so many dimensions."""
    hidden = _Sizes(_text_config(config), "text_config.")["hidden_size"]
    return {PROJECTOR_WEIGHT: (dim, hidden), PROJECTOR_BIAS: (dim,)}


def module_name(base_name: str) -> str:
    """Return what transformers, and so an adapter, calls the layer that has the weight of this published name."""
    module = base_name.removesuffix(".weight")
    return "model.language_model." + module.removeprefix("model.") if module.startswith("model.") else module


def adapter_name(task: str, base_name: str, side: str) -> str:
    """Return the published name of the adapter tensor of a task, base tensor and side, "A" or "B"."""
    return f"base_model.model.{module_name(base_name)}.lora_{side}.{task}.weight"


def peft_name(base_name: str, side: str) -> str:
    """Return what an ordinary PEFT adapter, of one task, calls the tensor of a base tensor and side, "A" or "B"."""
    return f"base_model.model.{module_name(base_name)}.lora_{side}.weight"


def adapter_shapes(
    base: Mapping[str, Shape], tasks: Iterable[str], rank_of: Callable[[str, str], int]
) -> dict[str, Shape]:
    """Return every adapter tensor that belongs to a base, by published name.

    Args:
        base: What `base_shapes` returns.
        tasks: Those that have an adapter.
        rank_of: Returns the rank of a task's adapter for a base tensor.

    Returns:
        Shapes (rank, n_in) for A, (n_out, rank) for B.
    """
    shapes: dict[str, Shape] = {}
    for task in tasks:
        for name in filter(is_adapted, base):
            rank = rank_of(task, name)
            n_out, n_in = base[name]
            shapes[adapter_name(task, name, "A")] = (rank, n_in)
            shapes[adapter_name(task, name, "B")] = (n_out, rank)
    return shapes


def check(what: str, found: Mapping[str, Shape], expected: Mapping[str, Shape], files: Mapping[str, str]) -> None:
    """Compare the tensors found with those expected.

    Args:
        what: Where they were found, for the message.
        found: By published name.
        expected: The same.
        files: In which file each was found, for the message.

    Raises:
        LayoutError: with a few of the unknown, missing and misshapen ones each.
    """
    misshapen = [
        f"{name} is {list(found[name])} and must be {list(expected[name])} ({files[name]})"
        for name in sorted(found.keys() & expected.keys())
        if found[name] != expected[name]
    ]
    problems = [
        f"{len(names)} {kind}: {named(names)}"
        for kind, names in (
            ("unknown", [f"{name} ({files[name]})" for name in sorted(found.keys() - expected.keys())]),
            ("missing", sorted(expected.keys() - found.keys())),
            ("misshapen", misshapen),
        )
        if names
    ]
    if problems:
        raise LayoutError(f"{what}: tensors do not match its config. {'; '.join(problems)}")


@dataclass(frozen=True)
class _Sizes:
    """Reads sizes from one section of config.json."""

    section: Mapping[str, Any]
    where: str

    def __getitem__(self, key: str) -> int:
        return self.optional(key, self.section.get(key))

    def optional(self, key: str, default: object) -> int:
        value = self.section.get(key) or default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"config.json: {self.where}{key} is {value!r}; it must be a whole number of at least 1")
        return value


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config", config)
    if not isinstance(text, Mapping):
        raise ConfigError("config.json: text_config must be an object; the base must be a jina-embeddings-v4")
    return text


def _text_shapes(text: Mapping[str, Any]) -> dict[str, Shape]:
    size = _Sizes(text, "text_config.")
    hidden, mlp = size["hidden_size"], size["intermediate_size"]
    head_dim = size.optional("head_dim", hidden // size["num_attention_heads"])
    query, key_value = size["num_attention_heads"] * head_dim, size["num_key_value_heads"] * head_dim
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (size["vocab_size"], hidden)}
    for i in range(size["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (query, hidden),
            f"{layer}.self_attn.q_proj.bias": (query,),
            f"{layer}.self_attn.k_proj.weight": (key_value, hidden),
            f"{layer}.self_attn.k_proj.bias": (key_value,),
            f"{layer}.self_attn.v_proj.weight": (key_value, hidden),
            f"{layer}.self_attn.v_proj.bias": (key_value,),
            f"{layer}.self_attn.o_proj.weight": (hidden, query),
            f"{layer}.mlp.gate_proj.weight": (mlp, hidden),
            f"{layer}.mlp.up_proj.weight": (mlp, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, mlp),
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
        }
    shapes["model.norm.weight"] = (hidden,)
    return shapes


def _vision_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping):
        raise ConfigError("config.json has no vision_config; the base must be a jina-embeddings-v4")
    size = _Sizes(vision, "vision_config.")
    hidden, mlp, patch = size["hidden_size"], size["intermediate_size"], size["patch_size"]
    channels = size.optional("in_channels", vision.get("in_chans"))
    merged = hidden * size["spatial_merge_size"] ** 2
    shapes: dict[str, Shape] = {
        "visual.patch_embed.proj.weight": (hidden, channels, size["temporal_patch_size"], patch, patch)
    }
    for i in range(size["depth"]):
        block = f"visual.blocks.{i}"
        shapes |= {
            f"{block}.norm1.weight": (hidden,),
            f"{block}.norm2.weight": (hidden,),
            f"{block}.attn.qkv.weight": (3 * hidden, hidden),
            f"{block}.attn.qkv.bias": (3 * hidden,),
            f"{block}.attn.proj.weight": (hidden, hidden),
            f"{block}.attn.proj.bias": (hidden,),
            f"{block}.mlp.gate_proj.weight": (mlp, hidden),
            f"{block}.mlp.gate_proj.bias": (mlp,),
            f"{block}.mlp.up_proj.weight": (mlp, hidden),
            f"{block}.mlp.up_proj.bias": (mlp,),
            f"{block}.mlp.down_proj.weight": (hidden, mlp),
            f"{block}.mlp.down_proj.bias": (hidden,),
        }
    return shapes | {
        "visual.merger.ln_q.weight": (hidden,),
        "visual.merger.mlp.0.weight": (merged, merged),
        "visual.merger.mlp.0.bias": (merged,),
        "visual.merger.mlp.2.weight": (size["out_hidden_size"], merged),
        "visual.merger.mlp.2.bias": (size["out_hidden_size"],),
    }
