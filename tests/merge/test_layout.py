"""The names and shapes that a base and its adapters must have."""

import math
from pathlib import Path
from typing import Any

import pytest
from conftest import GOLDEN, TASKS
from jina_v4_merge.errors import ConfigError, LayoutError
from jina_v4_merge.files import read_json
from jina_v4_merge.reading import layout
from jina_v4_merge.standin import config as standin_config
from safetensors import safe_open

SPECIAL_TOKENS = dict.fromkeys(
    [
        "<|endoftext|>",
        "<|im_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
    ],
    0,
)


def shapes_in(path: Path) -> dict[str, layout.Shape]:
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no dict


def test_a_real_layout_is_described_exactly() -> None:
    base = layout.base_shapes(read_json(GOLDEN / "checkpoint" / "config.json"))
    shards = sorted((GOLDEN / "checkpoint").glob("model-*.safetensors"))
    assert base == {name: shape for shard in shards for name, shape in shapes_in(shard).items()}
    adapters = layout.adapter_shapes(base, TASKS, lambda _task, _name: 32)
    assert adapters == shapes_in(GOLDEN / "checkpoint" / "adapters" / "adapter_model.safetensors")


def test_the_published_sizes_give_the_published_counts() -> None:
    base = layout.base_shapes(standin_config.model_config("full", 0, SPECIAL_TOKENS))
    adapters = layout.adapter_shapes(base, TASKS, lambda _task, _name: 32)
    assert len(adapters) == 1518
    assert sum(math.prod(shape) for shape in base.values()) == 3_754_885_248
    assert sum(math.prod(shape) for shape in (*base.values(), *adapters.values())) == 3_934_695_552


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("model.visual.blocks.1.norm1.weight", "visual.blocks.1.norm1.weight"),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("visual.merger.ln_q.weight", "visual.merger.ln_q.weight"),
        ("multi_vector_projector.bias", "multi_vector_projector.bias"),
    ],
)
def test_both_spellings_have_one_published_name(name: str, published: str) -> None:
    assert layout.published_name(name) == published


def test_differences_are_named_a_few_of_each_kind() -> None:
    expected = {f"wanted.{i}": (2,) for i in range(7)} | {"both": (3, 4)}
    with pytest.raises(LayoutError) as caught:
        layout.check("base", {"both": (4, 3), "odd": (1,)}, expected, {"both": "a", "odd": "b"})
    assert str(caught.value) == (
        "base: tensors do not match its config. 1 unknown: odd (b); 7 missing: wanted.0, wanted.1, wanted.2, wanted.3, "
        "wanted.4 and 2 more; 1 misshapen: both is [4, 3] and must be [3, 4] (a)"
    )


def test_the_sizes_of_the_text_are_in_text_config_alone_as_published() -> None:
    config: dict[str, Any] = read_json(GOLDEN / "checkpoint" / "config.json")
    published = {key: value for key, value in config.items() if key not in ("vocab_size", "model_type", "verbosity")}
    assert layout.base_shapes(published) == layout.base_shapes(config)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        (None, "tie_word_embeddings", False),
        (None, "multi_vector_projector_dim", None),
        (None, "vision_config", None),
        (None, "text_config", []),
        ("text_config", "num_hidden_layers", 0),
        ("text_config", "hidden_size", "256"),
        ("text_config", "vocab_size", None),
        ("vision_config", "depth", 1.5),
        ("vision_config", "patch_size", True),
    ],
)
def test_a_config_without_the_sizes_is_refused_by_key(section: str | None, key: str, value: object) -> None:
    config: dict[str, Any] = read_json(GOLDEN / "checkpoint" / "config.json")
    (config[section] if section else config)[key] = value
    with pytest.raises(ConfigError, match="word embeddings" if key.startswith("tie") else key):
        layout.base_shapes(config)
