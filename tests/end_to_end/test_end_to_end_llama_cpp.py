"""The benchmarks' llama.cpp: its GGUF file holds the checkpoint's numbers, and its vectors are the published model's.

The bindings are built from source, so they are no part of the installation; without them the file alone is tested.
"""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Figure, Golden
from gguf import GGMLQuantizationType, GGUFReader
from safetensors import safe_open
from wire import TASK, TEXTS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BOUND = 1e-5  # 1 - cosine; its keys and values are float16
HAS_BINDINGS = importlib.util.find_spec("llama_cpp") is not None
NEEDS_BINDINGS = pytest.mark.skipif(not HAS_BINDINGS, reason="pip install llama-cpp-python, ten minutes from source")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of benchmarks/, which is a folder of scripts."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def language_model(checkpoint: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in checkpoint.glob("model-*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys() if not name.startswith("visual.")}  # noqa: SIM118 - no dict
    return tensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_file_holds_every_number_of_the_language_model(
    module: Any, folded: Callable[[str], Path], tmp_path: Path, dtype: str
) -> None:
    checkpoint = folded(dtype) / f"jina-embeddings-v4-{TASK}"
    assert module("_gguf").write_gguf(checkpoint, tmp_path / "model.gguf") == dtype
    written = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "model.layers": "blk",
    }
    tensors = language_model(checkpoint)
    assert len(written) == len(tensors)
    for name, tensor in tensors.items():
        place = name
        for theirs, ours in names.items():
            place = place.replace(theirs, ours)
        found = written[place]
        assert found.shape.tolist() == list(tensor.shape)[::-1]  # the fastest dimension first
        one_row = tensor.ndim == 1
        assert found.tensor_type == (GGMLQuantizationType.F32 if one_row else GGMLQuantizationType[short(dtype)])
        numbers = found.data if found.data.dtype == np.float32 else found.data.view(np.uint16).astype("<u4") << 16
        np.testing.assert_array_equal(numbers.view(np.float32).reshape(tensor.shape), tensor.float().numpy())


def short(dtype: str) -> str:
    return {"float32": "F32", "bfloat16": "BF16"}[dtype]


def test_the_file_says_what_the_configuration_says(module: Any, folded: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = folded("float32") / f"jina-embeddings-v4-{TASK}"
    module("_gguf").write_gguf(checkpoint, tmp_path / "model.gguf")
    fields = GGUFReader(tmp_path / "model.gguf").fields
    said = {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
    text = json.loads((checkpoint / "config.json").read_text())["text_config"]
    assert said == {
        "general.architecture": "qwen2vl",
        "qwen2vl.context_length": text["max_position_embeddings"],
        "qwen2vl.embedding_length": text["hidden_size"],
        "qwen2vl.block_count": text["num_hidden_layers"],
        "qwen2vl.feed_forward_length": text["intermediate_size"],
        "qwen2vl.attention.head_count": text["num_attention_heads"],
        "qwen2vl.attention.head_count_kv": text["num_key_value_heads"],
        "qwen2vl.attention.layer_norm_rms_epsilon": pytest.approx(text["rms_norm_eps"]),
        "qwen2vl.rope.freq_base": text["rope_theta"],
        "qwen2vl.rope.dimension_sections": [16, 24, 24, 0],
        "qwen2vl.vocab_size": text["vocab_size"],
        "tokenizer.ggml.model": "none",
    }


def test_a_tensor_without_a_place_is_refused(module: Any, folded: Callable[[str], Path], tmp_path: Path) -> None:
    source, checkpoint = folded("float32") / f"jina-embeddings-v4-{TASK}", tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text((source / "config.json").read_text())
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"] = {"model.layers.0.self_attn.q_norm_of_another.weight": "model-00001-of-00002.safetensors"}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=r"q_norm_of_another\.weight of model-00001-of-00002\.safetensors has no place"
    ):
        module("_gguf").write_gguf(checkpoint, tmp_path / "model.gguf")


def test_the_side_is_left_out_with_the_reason_where_its_package_is_missing(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = module("_sides")
    assert "llama.cpp" in sides.SIDES
    monkeypatch.setattr(sides, "find_spec", lambda _: None)
    assert "pip install llama-cpp-python" in sides.missing_sides()["llama.cpp"]
    monkeypatch.setattr(sides, "find_spec", lambda name: SimpleNamespace(name=name))
    assert sides.missing_sides() == {}


@NEEDS_BINDINGS
def test_llama_cpp_gives_the_golden_rows_of_texts(
    module: Any, folded: Callable[[str], Path], golden: Golden, figure: Figure
) -> None:
    side = module("_llama_cpp").LlamaCpp(folded("float32") / f"jina-embeddings-v4-{TASK}")
    texts = [*TEXTS, TEXTS[3] * 8, *[TEXTS[0]] * 40]  # one longer than a batch, and more than a batch's sequences
    vectors = side.embed("text", texts, "dense")["dense"]
    rows = [golden.rows[f"{TASK}/query/{i}/dense"] for i in range(len(TEXTS))]
    worst = max(1 - float(a.astype(np.float64) @ b) for a, b in zip(vectors, rows, strict=False))
    figure(f"largest 1 - cosine to the golden rows {worst:.1e}")
    assert worst <= BOUND
    assert all(abs(1 - float(vector @ rows[0])) <= BOUND for vector in vectors[-40:])
    assert (
        len(side.tokenizer.encode("Query: " + TEXTS[3] * 8, add_special_tokens=False).ids)
        > module("_llama_cpp").BATCH_TOKENS
    )
