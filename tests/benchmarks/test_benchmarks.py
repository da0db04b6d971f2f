"""What benchmarks count, without measuring: arithmetic, tokens, percentiles, how far sides differ."""

import importlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from PIL import Image
from tokenizers import Tokenizer
from torch.utils.flop_counter import FlopCounterMode

CHECKPOINT = GOLDEN / "checkpoint"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of benchmarks/, which is a folder of scripts."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module


def small_model(config: dict[str, Any]) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel  # here, because it takes seconds

    # Its own attention in products: torch counts no fused one on a CPU.
    return Qwen2_5_VLModel._from_config(Qwen2_5_VLConfig(**config), attn_implementation="eager").eval()


def small_config() -> dict[str, Any]:
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 1}
    text |= {"rope_scaling": {"mrope_section": [2, 3, 3], "rope_type": "default"}}
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112}
    vision |= {"fullatt_block_indexes": [1]}
    return {"text_config": text, "vision_config": vision, "image_token_id": 7, "vision_start_token_id": 8}


@pytest.mark.parametrize("n_tokens", [1, 37])
def test_the_arithmetic_of_a_text_is_what_torch_counts(module: Any, n_tokens: int) -> None:
    config = small_config()
    model = small_model(config)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(input_ids=torch.ones(1, n_tokens, dtype=torch.long), use_cache=False)
    # torch counts every score, also those that a causal mask leaves out.
    assert module("_flops").text_flop(config, n_tokens, causal=False) == counter.get_total_flops()


@pytest.mark.parametrize("grid", [(8, 8), (10, 14)], ids=["one-window", "windows-with-edges"])
def test_the_arithmetic_of_an_image_is_what_torch_counts(module: Any, grid: tuple[int, int]) -> None:
    config = small_config()
    vision = small_model(config).visual
    n_patches = grid[0] * grid[1]
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        vision(torch.randn(n_patches, 3 * 2 * 14 * 14), grid_thw=torch.tensor([[1, *grid]]))
    assert module("_flops").vision_flop(config, grid) == counter.get_total_flops()


@pytest.mark.parametrize("n_tokens", [16, 128, 512, 4096])
def test_a_text_has_exactly_the_tokens_that_were_asked_for(module: Any, n_tokens: int) -> None:
    data = module("_data")
    texts = data.make_texts(CHECKPOINT, [n_tokens] * 4)
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    assert [len(tokenizer.encode("Query: " + text, add_special_tokens=False).ids) for text in texts] == [n_tokens] * 4
    assert len(set(texts)) == 4


def test_images_have_their_sizes_and_none_is_like_another(module: Any) -> None:
    data = module("_data")
    for name, n_tokens in (("thumbnail", 64), ("photo", 391), ("page", 768)):
        inputs = data.make_inputs(CHECKPOINT, name, 2)
        assert inputs.items[0] != inputs.items[1]
        assert inputs.n_tokens == [n_tokens + 11] * 2
        assert Image.open(io.BytesIO(inputs.items[0])).size == data.IMAGES[name]


def test_mixed_lengths_are_mixed_and_each_block_has_the_same(module: Any) -> None:
    data = module("_data")
    lengths = data.mixed_lengths(4 * data.MIXED_BLOCK)
    assert (min(lengths), max(lengths), len(set(lengths))) == (23, 966, data.MIXED_BLOCK)
    assert 100 < np.median(lengths) < 200
    blocks = np.reshape(lengths, (4, -1))
    np.testing.assert_allclose(blocks.mean(axis=1), module("throughput").N_TOKENS[data.MIXED], atol=1)


def test_a_percentile_is_a_value_that_was_measured(module: Any) -> None:
    percentile = module("_results").percentile
    assert percentile(range(1, 101), 99) == 99
    assert percentile(range(1, 101), 50) == 50
    assert percentile([3.0], 99) == 3.0
    assert percentile([], 99) is None


def test_the_worst_pair_of_sides_is_found(module: Any) -> None:
    same, other = np.array([1, 0], np.float32), np.array([0.6, 0.8], np.float32)
    found = {"a": {"dense": [same]}, "b": {"dense": [same]}, "c": {"dense": [other]}}
    worst, between = module("_sides").largest_difference(found)
    assert worst == pytest.approx(0.4)
    assert between == "a and c, dense"


def test_of_the_sides_as_many_are_started_as_a_gpu_holds(module: Any) -> None:
    fitting, names = module("_sides").fitting, ["served", "stock", "in_process", "transformers-1"]
    assert fitting(names, 11 * 2**30, 24 * 2**30) == ["served", "stock"]
    assert fitting(names, 11 * 2**30, 80 * 2**30) == names
    assert fitting(names, 11 * 2**30, 8 * 2**30) == ["served"]  # and it says itself that it has too little
    assert fitting(names, 11 * 2**30, None) == names


def test_the_faster_dtype_is_that_of_the_faster_products(module: Any) -> None:
    faster = module("_peak").faster_dtype
    assert faster({"n_threads": 2, "bfloat16_tflop_per_s": 1.9, "float32_tflop_per_s": 0.3}) == "bfloat16"
    assert faster({"n_threads": 2, "bfloat16_tflop_per_s": 0.01, "float32_tflop_per_s": 0.2}) == "float32"
