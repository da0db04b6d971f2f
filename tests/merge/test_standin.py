"""A stand-in has the published layout, and what its name says: random weights, the same for the same seed."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN
from damage import files_of
from jina_v4_merge.standin.config import SIZES, model_config
from jina_v4_merge.standin.tokenizer import SPECIAL_TOKENS, tokenizer_files
from jina_v4_merge.standin.weights import standin
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer

IMAGE_PROMPT = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Describe the image.<|im_end|>\n"


def keys_of(content: Any) -> Any:
    return {key: keys_of(value) for key, value in content.items()} if isinstance(content, dict) else None


def test_it_has_the_published_files(tiny: Path) -> None:
    assert files_of(tiny).keys() == files_of(GOLDEN / "checkpoint").keys() | {"README.md"}


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "adapters/adapter_config.json"])
def test_its_configs_have_the_published_keys(name: str, tiny: Path) -> None:
    published, own = (keys_of(json.loads((folder / name).read_text())) for folder in (GOLDEN / "checkpoint", tiny))
    own.pop("standin", None)
    assert own == published


def test_it_is_small_and_keeps_what_serving_depends_on(tiny: Path) -> None:
    assert sum(len(content) for content in files_of(tiny).values()) < 80e6
    config = json.loads((tiny / "config.json").read_text())
    assert config["matryoshka_dims"] == [128, 256, 512, 1024, 2048]
    text = config["text_config"]
    assert (text["hidden_size"], text["num_attention_heads"], text["num_key_value_heads"]) == (2048, 16, 2)
    assert len(config["vision_config"]["fullatt_block_indexes"]) < config["vision_config"]["depth"]


def test_it_says_that_its_weights_are_random(tiny: Path, tiny_folded: dict[str, Path]) -> None:
    assert "Random weights" in (tiny / "README.md").read_text()
    for folder in tiny_folded.values():
        sources = json.loads((folder / "manifest.json").read_text())["sources"]
        assert sources["base"]["standin"] == {"seed": 0, "size": "tiny"}
        assert "standin" not in json.loads((folder / "config.json").read_text())


@pytest.mark.long
def test_the_same_seed_gives_the_same_bytes_and_another_one_others(tiny: Path, tmp_path: Path) -> None:
    again = "from pathlib import Path; from jina_v4_merge.standin.weights import standin; standin(Path('again'))"
    env = os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", again], cwd=tmp_path, env=env, check=True)
    standin(tmp_path / "other", seed=1)
    one, same, other = files_of(tiny), files_of(tmp_path / "again"), files_of(tmp_path / "other")
    assert one == same
    assert {name for name in one if one[name] != other[name]} == {
        "README.md",
        "adapters/adapter_model.safetensors",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }


def test_its_weights_have_the_spread_of_a_fresh_model(tiny: Path) -> None:
    tensors = {name: t for path in tiny.rglob("*.safetensors") for name, t in load_file(path).items()}
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        centre, spread = (1.0, 0.05) if "norm" in name or "ln_q" in name else (0.0, 0.05 if "lora_B" in name else 0.02)
        error = 6 * spread / math.sqrt(tensor.numel()) + 0.004 * centre  # six sigma, and a step of bfloat16
        assert abs(tensor.float().mean().item() - centre) < error, name
        assert tensor.float().std().item() == pytest.approx(spread, rel=0.2), name


def test_the_tokenizer_is_the_same_by_file_and_by_transformers(tiny: Path, tiny_folded: dict[str, Path]) -> None:
    texts = ["Query: a b", "Passage: 浜辺 évident 1234\n\tfoo_bar()", "x" * 50, "غروب", IMAGE_PROMPT, "'s  \r\n  ①"]
    plain = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    loaded = AutoTokenizer.from_pretrained(tiny_folded["code"])
    for text in texts:
        assert loaded(text)["input_ids"] == plain.encode(text).ids
        assert plain.decode(plain.encode(text).ids, skip_special_tokens=False) == text


def test_the_image_prompt_is_as_long_as_the_real_one(tiny: Path) -> None:
    tokens = Tokenizer.from_file(str(tiny / "tokenizer.json")).encode(IMAGE_PROMPT).tokens
    assert tokens == [
        *("<|im_start|>", "user", "Ċ", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
        *("Describe", "Ġthe", "Ġimage", ".", "<|im_end|>", "Ċ"),
    ]


@pytest.mark.parametrize("size", SIZES)
def test_every_token_has_an_embedding(size: str) -> None:
    files, ids = tokenizer_files()
    config = model_config(size, 0, ids)
    vocabulary = {**json.loads(files["vocab.json"]), **ids}
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert len(vocabulary) <= config["text_config"]["vocab_size"]
    assert list(ids) == list(SPECIAL_TOKENS)
    assert config["image_token_id"] == ids["<|image_pad|>"]
    assert config["vision_start_token_id"] == ids["<|vision_start|>"]
    assert config["vision_end_token_id"] == ids["<|vision_end|>"]
