"""`export-gguf`: the file holds the folded language model to the last bit, or its q8_0, with the base's tokenizer."""

import json
import math
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import GOLDEN, TASKS
from damage import change_json, edit_json, flip, split_adapters, truncate
from gguf import GGMLQuantizationType, GGUFReader
from jina_v4_merge.errors import ConfigError, LayoutError, MergeError, OutputError, WeightError
from jina_v4_merge.export.gguf import export_gguf
from jina_v4_merge.export.gguf_file import GgufFile
from jina_v4_merge.export.gguf_tokenizer import GgufTokenizer, gguf_tokenizer
from jina_v4_merge.files import read_json
from jina_v4_merge.reading.configs import small_files
from jina_v4_merge.verify.checks import find_checkpoints, verify
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.proof

BASE = GOLDEN / "checkpoint"
TASK = "retrieval"
DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "q8_0": "float32"}
PROJECTOR = "multi_vector_projector.safetensors"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
PLACES = {
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


def file_of(folder: Path) -> Path:
    (path,) = folder.glob("*.gguf")
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the golden base's retrieval task, by dtype."""
    out = tmp_path_factory.mktemp("gguf")

    def export(dtype: str) -> Path:
        if not (out / dtype).exists():
            export_gguf(str(BASE), out / dtype, TASK, dtype)
        return out / dtype

    return export


@pytest.fixture
def copied(exported: Callable[[str], Path], tmp_path: Path) -> Path:
    """A folder of q8_0 that a test may damage."""
    return Path(shutil.copytree(exported("q8_0"), tmp_path / "copied"))


def language_model(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {name: tensor for path in folder.glob("model-*.safetensors") for name, tensor in load_file(path).items()}
    return {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}


def place_of(name: str) -> str:
    for theirs, ours in PLACES.items():
        name = name.replace(theirs, ours)
    return name


def bits(tensor: torch.Tensor) -> NDArray[np.uint8]:
    return tensor.contiguous().view(torch.uint8).reshape(-1).numpy()


def each_tensor(exported: Path, checkpoint: Path) -> Iterator[tuple[str, torch.Tensor, Any]]:
    """Yield the name of each tensor, the checkpoint's, and what the file has in its place."""
    written = {tensor.name: tensor for tensor in GGUFReader(file_of(exported)).tensors}
    tensors = language_model(checkpoint)
    assert written.keys() == {place_of(name) for name in tensors}
    for name, tensor in tensors.items():
        found = written[place_of(name)]
        assert found.shape.tolist() == list(tensor.shape)[::-1]  # the fastest dimension first
        yield name, tensor, found


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_the_file_holds_every_number_of_the_folded_language_model(
    dtype: str, exported: Callable[[str], Path], folded: Callable[[str], Path]
) -> None:
    originals = language_model(BASE)
    for name, tensor, found in each_tensor(exported(dtype), folded(DTYPES[dtype]) / f"jina-embeddings-v4-{TASK}"):
        one_row = tensor.ndim == 1  # norms and biases, which llama.cpp adds in float32
        expected = originals[name].float() if one_row else tensor
        assert found.tensor_type.name == ("F32" if one_row else dtype.upper())
        np.testing.assert_array_equal(found.data.view(np.uint8).reshape(-1), bits(expected))


def q8_0(row: list[float]) -> bytes:
    """Quantize one row: of each 32 values the largest is 127, each is the nearest whole number, .5 away from zero."""
    content = b""
    for start in range(0, len(row), 32):
        block = row[start : start + 32]
        scale = float32(max(abs(value) for value in block) / 127)
        inverse = float32(1 / scale) if scale else 0.0
        numbers = [float32(value * inverse) for value in block]
        content += struct.pack("<e", scale) + bytes(
            int(math.copysign(math.floor(abs(number) + 0.5), number)) & 0xFF for number in numbers
        )
    return content


def float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def test_q8_0_is_that_of_the_folded_float_sums(exported: Callable[[str], Path], folded: Callable[[str], Path]) -> None:
    for name, tensor, found in each_tensor(exported("q8_0"), folded("float32") / f"jina-embeddings-v4-{TASK}"):
        if tensor.ndim == 1:
            assert found.tensor_type == GGMLQuantizationType.F32
            continue
        assert found.tensor_type == GGMLQuantizationType.Q8_0
        blocks = found.data.reshape(-1, 34)
        scales = blocks[:, :2].copy().view(np.float16).astype(np.float64)  # (n_blocks, 1)
        values = tensor.double().numpy().reshape(-1, 32)
        largest = np.abs(values).max(-1, keepdims=True)
        np.testing.assert_allclose(scales, largest / 127, rtol=2**-11)
        # Within half a step, and of the scale's own rounding 127 times what that makes.
        off = np.abs(blocks[:, 2:].view(np.int8) * scales - values)
        assert (off <= largest / 127 * (0.5 + 127 * 2**-11)).all(), name
    written = {tensor.name: tensor for tensor in GGUFReader(file_of(exported("q8_0"))).tensors}
    checkpoint = language_model(folded("float32") / f"jina-embeddings-v4-{TASK}")
    for name in ("model.layers.2.self_attn.k_proj.weight", Q_PROJ):
        expected = b"".join(q8_0(row) for row in checkpoint[name].tolist())
        assert written[place_of(name)].data.tobytes() == expected


def test_q8_0_of_rounded_bfloat16_would_be_another(
    exported: Callable[[str], Path], folded: Callable[[str], Path]
) -> None:
    rounded = language_model(folded("bfloat16") / f"jina-embeddings-v4-{TASK}")[Q_PROJ]
    written = {tensor.name: tensor for tensor in GGUFReader(file_of(exported("q8_0"))).tensors}[place_of(Q_PROJ)]
    assert written.data.tobytes() != b"".join(q8_0(row) for row in rounded.float().tolist())


@pytest.mark.parametrize("task", TASKS)
def test_the_projector_is_the_folded_one(task: str, folded: Callable[[str], Path], tmp_path: Path) -> None:
    export_gguf(str(BASE), tmp_path / "out", task, "q8_0")
    expected = load_file(folded("float32") / f"jina-embeddings-v4-{task}" / PROJECTOR)
    found = load_file(tmp_path / "out" / PROJECTOR)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_file_says_what_config_and_task_are(exported: Callable[[str], Path]) -> None:
    fields = GGUFReader(file_of(exported("q8_0"))).fields
    said = {name: field.contents() for name, field in fields.items() if not name.startswith(("GGUF.", "tokenizer."))}
    text = read_json(BASE / "config.json")["text_config"]
    source = {"name": str(BASE), "revision": None}
    assert json.loads(said.pop("jina_v4.sources")) == {"base": source, "adapters": source}
    assert json.loads(said.pop("jina_v4.tool"))["name"] == "jina-v4-merge"
    assert said == {
        "general.architecture": "qwen2vl",
        "general.type": "model",
        "general.name": "jina-embeddings-v4 retrieval",
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q8_0,
        "general.quantization_version": 2,
        "qwen2vl.context_length": text["max_position_embeddings"],
        "qwen2vl.embedding_length": text["hidden_size"],
        "qwen2vl.block_count": text["num_hidden_layers"],
        "qwen2vl.feed_forward_length": text["intermediate_size"],
        "qwen2vl.attention.head_count": text["num_attention_heads"],
        "qwen2vl.attention.head_count_kv": text["num_key_value_heads"],
        "qwen2vl.attention.key_length": 128,
        "qwen2vl.attention.value_length": 128,
        "qwen2vl.attention.layer_norm_rms_epsilon": pytest.approx(text["rms_norm_eps"]),
        "qwen2vl.rope.freq_base": text["rope_theta"],
        "qwen2vl.rope.dimension_sections": [16, 24, 24, 0],
        "qwen2vl.vocab_size": text["vocab_size"],
        "qwen2vl.pooling_type": gguf.PoolingType.MEAN,
        "jina_v4.task": TASK,
        "jina_v4.prompt.query": "Query: ",
        "jina_v4.prompt.passage": "Passage: ",
        "jina_v4.image_prompt": json.loads((exported("q8_0") / "manifest.json").read_text())["image_prompt"],
        "jina_v4.dimensions": [128, 256],
        "jina_v4.scaling": "1.0",
    }


def test_a_config_of_transformers_5_gives_the_same_file(
    base: Path, tmp_path: Path, exported: Callable[[str], Path]
) -> None:
    def as_transformers_5(config: dict[str, Any]) -> None:
        text = config["text_config"]
        text["rope_parameters"] = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}

    change_json(base / "config.json", as_transformers_5)
    export_gguf(str(base), tmp_path / "out", TASK, "q8_0")
    for said, expected in zip(*(GGUFReader(file_of(f)).fields.values() for f in (tmp_path / "out", exported("q8_0")))):  # noqa: B905
        assert said.name == "jina_v4.sources" or said.contents() == expected.contents(), said.name


def test_the_folder_has_a_manifest_and_the_same_inputs_give_the_same_bytes(
    exported: Callable[[str], Path], tmp_path: Path
) -> None:
    manifest = json.loads((exported("q8_0") / "manifest.json").read_text())
    assert (manifest["task"], manifest["part"], manifest["dtype"]) == (TASK, "gguf", "q8_0")
    assert set(manifest["files"]) == {"jina-embeddings-v4-retrieval-Q8_0.gguf", PROJECTOR}
    assert "model-00001-of-00002.safetensors" in manifest["sources"]["base"]["files"]
    assert "adapters/adapter_model.safetensors" in manifest["sources"]["adapters"]["files"]
    export_gguf(str(BASE), tmp_path / "out", TASK, "q8_0")
    for path in exported("q8_0").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def tokenizer_of(base: Path) -> GgufTokenizer:
    return gguf_tokenizer(base / "tokenizer.json", small_files(base), read_json(base / "config.json"))


def test_the_tokenizer_of_qwen2_is_carried_over_whole(tiny: Path, tmp_path: Path) -> None:
    content, config = json.loads((tiny / "tokenizer.json").read_text()), read_json(tiny / "config.json")
    export_gguf(str(tiny), tmp_path / "out", "code", "q8_0")
    fields = GGUFReader(file_of(tmp_path / "out")).fields
    said = {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in fields.items()}
    assert (said["model"], said["pre"]) == ("gpt2", "qwen2")
    assert (said["add_bos_token"], said["add_eos_token"]) == (False, False)
    added = {token["id"]: token["content"] for token in content["added_tokens"]}
    ids = {token: number for number, token in enumerate(said["tokens"])}
    assert len(said["tokens"]) == len(said["token_type"]) == config["text_config"]["vocab_size"]
    assert {token: ids[token] for token in content["model"]["vocab"]} == content["model"]["vocab"]
    assert {number: said["tokens"][number] for number in added} == added
    assert {number for number, kind in enumerate(said["token_type"]) if kind == 3} == added.keys()
    assert said["merges"] == [" ".join(pair) for pair in content["model"]["merges"]]
    assert said["tokens"][said["eos_token_id"]] == "<|im_end|>"
    assert said["tokens"][said["padding_token_id"]] == "<|endoftext|>"


@pytest.fixture
def with_words(tiny: Path, tmp_path: Path) -> Path:
    """The small files of a base with the published tokenizer's rules."""
    base = tmp_path / "words"
    base.mkdir()
    for path in tiny.glob("*.json"):
        shutil.copy(path, base)
    return base


SAME_TOKENS = {
    "merges as text": lambda c: c["model"].update(merges=[" ".join(pair) for pair in c["model"]["merges"]]),
    "empty prefixes": lambda c: c["model"].update(continuing_subword_prefix="", end_of_word_suffix=""),
    "a template of the text alone": lambda c: c.update(
        post_processor={"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}]}
    ),
    "trimmed offsets": lambda c: c.update(post_processor={"type": "ByteLevel", "trim_offsets": False}),
}


@pytest.mark.parametrize("change", SAME_TOKENS.values(), ids=SAME_TOKENS)
def test_a_tokenizer_that_gives_the_same_tokens_is_accepted(
    change: Callable[[dict[str, Any]], object], with_words: Path
) -> None:
    before = tokenizer_of(with_words)
    change_json(with_words / "tokenizer.json", change)
    after = tokenizer_of(with_words)
    assert after == before
    assert after.words == "qwen2"


def test_an_added_token_that_is_not_special_is_found_in_any_text(with_words: Path) -> None:
    tool = {"id": 1019, "content": "<tool>", "special": False}
    change_json(with_words / "tokenizer.json", lambda content: content["added_tokens"].append(tool))
    tokenizer = tokenizer_of(with_words)
    assert (tokenizer.tokens[1019], tokenizer.types[1019]) == ("<tool>", gguf.TokenType.USER_DEFINED)


OTHER_TOKENS = {
    "other words": lambda c: c["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+"),
    "words of GPT-2 after Qwen2's": lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True),
    "no words": lambda c: c.update(pre_tokenizer=None),
    "a space before": lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
    "another normalizer": lambda c: c.update(normalizer={"type": "Lowercase"}),
    "whole words first": lambda c: c["model"].update(ignore_merges=True),
    "no text": lambda c: c.update(post_processor={"type": "TemplateProcessing", "single": []}),
    "a token at the end": lambda c: c.update(
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "<|endoftext|>"}}],
        }
    ),
}


@pytest.mark.parametrize("change", OTHER_TOKENS.values(), ids=OTHER_TOKENS)
def test_a_tokenizer_that_llama_cpp_has_not_is_refused(
    change: Callable[[dict[str, Any]], object], with_words: Path
) -> None:
    change_json(with_words / "tokenizer.json", change)
    with pytest.raises(ConfigError, match=r"tokenizer\.json: no tokenizer of Qwen2: it cuts text in a way"):
        tokenizer_of(with_words)


def test_more_tokens_than_rows_are_refused(with_words: Path) -> None:
    config = read_json(with_words / "config.json")
    config["text_config"]["vocab_size"] = 1000
    with pytest.raises(ConfigError, match=r"a token has id 1013, and the embedding has 1000 rows"):
        gguf_tokenizer(with_words / "tokenizer.json", small_files(with_words), config)


@pytest.fixture
def refused(base: Path, out: Path) -> Callable[..., str]:
    """Export what must be refused and leave nothing; return the message."""

    def refuse(kind: type[MergeError], dtype: str = "q8_0", task: str = TASK) -> str:
        with pytest.raises(kind) as caught:
            export_gguf(str(base), out, task, dtype)
        assert [path.name for path in out.parent.iterdir()] == ["base"]
        return str(caught.value)

    return refuse


Tensors = dict[str, torch.Tensor]
Edit = Callable[[Path, Callable[[Tensors], object]], None]


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [Q_PROJ, "model.embed_tokens.weight", "model.norm.weight"])
def test_a_weight_that_is_not_finite_is_refused(
    name: str, dtype: str, value: float, base: Path, edit_weights: Edit, refused: Callable[..., str]
) -> None:
    edit_weights(base, lambda tensors: tensors[name].view(-1)[-1].fill_(value))
    assert f"{name} holds a value that is not finite; the file is damaged" in refused(WeightError, dtype)


def test_an_adapter_that_is_not_finite_is_refused(base: Path, edit_adapters: Edit, refused: Callable[..., str]) -> None:
    name = "base_model.model.model.language_model.layers.2.mlp.up_proj.lora_B.retrieval.weight"
    edit_adapters(base, lambda tensors: tensors[name].view(-1)[7].fill_(torch.nan))
    assert f"adapter_model.safetensors: {name} holds a value that is not finite" in refused(WeightError)


@pytest.mark.parametrize(("dtype", "value"), [("f16", 1e5), ("q8_0", 1e7)])
def test_a_value_out_of_range_is_refused(
    dtype: str, value: float, base: Path, edit_weights: Edit, refused: Callable[..., str]
) -> None:
    edit_weights(base, lambda tensors: tensors[Q_PROJ].view(-1)[3].fill_(value))
    message = refused(WeightError, dtype)
    assert message == f"{Q_PROJ}: a value does not fit {dtype}; choose a --dtype of more range (bf16, f32)"


def test_a_task_without_an_adapter_is_refused(base: Path, refused: Callable[..., str]) -> None:
    split_adapters(base / "adapters", ["code"])
    assert "has no adapter of task retrieval; it has code" in refused(ConfigError)


def test_a_missing_file_is_named(base: Path, refused: Callable[..., str]) -> None:
    (base / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors is not there" in refused(MergeError)


def test_rows_that_are_no_whole_blocks_are_refused(with_words: Path) -> None:
    config = read_json(with_words / "config.json")
    shapes = {"model.embed_tokens.weight": (1024, 200)}
    with pytest.raises(ConfigError, match=r"q8_0 is not possible: .*200.*choose --dtype f16, bf16 or f32"):
        GgufFile(config, tokenizer_of(with_words), shapes, "q8_0", {})
    assert GgufFile(config, tokenizer_of(with_words), shapes, "f16", {}).n_value_bytes == 1024 * 200 * 2


@pytest.mark.parametrize("key", ["rope_scaling", "rope_theta", "rms_norm_eps", "max_position_embeddings"])
def test_a_config_without_a_needed_key_is_refused(key: str, base: Path, refused: Callable[..., str]) -> None:
    change_json(base / "config.json", lambda config: config["text_config"].pop(key))
    named = "mrope_section" if key == "rope_scaling" else key
    assert refused(ConfigError) == f"config.json: {named} missing in text_config, which a GGUF file has to say"


UNSAID = {
    "rope_type": lambda text: text["rope_scaling"].update(rope_type="yarn", factor=4.0),
    "hidden_act": lambda text: text.update(hidden_act="gelu"),
    "sliding_window": lambda text: text.update(use_sliding_window=True),
}


@pytest.mark.parametrize("key", UNSAID)
def test_a_config_of_another_model_is_refused(key: str, base: Path, refused: Callable[..., str]) -> None:
    change_json(base / "config.json", lambda config: UNSAID[key](config["text_config"]))
    assert f"config.json: {key} is " in refused(ConfigError)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_projector_that_is_not_finite_is_refused(
    part: str, base: Path, edit_weights: Edit, refused: Callable[..., str]
) -> None:
    name = f"multi_vector_projector.{part}"
    edit_weights(base, lambda tensors: tensors[name].view(-1)[5].fill_(torch.nan))
    assert f"{name} holds a value that is not finite" in refused(WeightError)


def test_a_tensor_without_a_place_is_refused(with_words: Path) -> None:
    config = read_json(with_words / "config.json")
    with pytest.raises(LayoutError, match=r"no place in a GGUF file of qwen2vl: model\.layers\.0\.other\.weight"):
        GgufFile(config, tokenizer_of(with_words), {"model.layers.0.other.weight": (2, 32)}, "f32", {})


def test_what_is_there_already_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(OutputError, match="notes exists already"):
        export_gguf(str(BASE), tmp_path / "notes", TASK)
    assert (tmp_path / "notes").read_text() == "mine"


def test_without_its_package_the_command_says_what_to_install(out: Path) -> None:
    program = (
        "import sys\nsys.modules['gguf'] = None\n"
        "from jina_v4_merge.cli import app\napp(['export-gguf', '--base', *sys.argv[1:], '--task', 'code'])"
    )
    command = [sys.executable, "-c", program, str(BASE), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: a GGUF file is written with the gguf package, which cannot be imported here")
    assert done.stderr.endswith("install jina-v4-merge[gguf]\n")


def test_the_command_says_what_it_wrote_and_verify_what_it_checked(out: Path, run: Callable[..., Any]) -> None:
    done = run("export-gguf", "--base", BASE, "--task", "code", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{out}: 0.00 GB, bf16\ndone in ")
    assert sorted(path.name for path in out.iterdir()) == [
        "jina-embeddings-v4-code-BF16.gguf",
        "manifest.json",
        PROJECTOR,
    ]
    done = run("verify", out, "--canary")
    assert (done.returncode, done.stderr) == (0, "")
    no_canary = f"{out}: no canary, since no server that reads one loads a GGUF file"
    assert done.stdout.startswith(f"{out}: 2 files, 0.00 GB, bf16\n{no_canary}\ndone in ")
    done = run("verify", out, "--base", BASE)
    assert done.stderr.startswith(f"error: {out} is part of an export, which --base compares with nothing")


SPOILT = {
    "a byte of the file flipped": (lambda e: flip(file_of(e)), "Q8_0.gguf: its sha256 is"),
    "a byte of the projector flipped": (lambda e: flip(e / PROJECTOR), f"{PROJECTOR}: its sha256 is"),
    "the file cut short": (lambda e: truncate(file_of(e), 32), "bytes; the manifest says"),
    "no file": (lambda e: file_of(e).unlink(), "Q8_0.gguf: is missing"),
    "no projector": (lambda e: (e / PROJECTOR).unlink(), f"{PROJECTOR}: is missing"),
    "a pointer": (
        lambda e: file_of(e).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "this is a Git LFS pointer",
    ),
    "another kind of file": (lambda e: file_of(e).write_bytes(b"GGML"), "this is no GGUF file of version 3"),
    "half a projector": (
        lambda e: save_file({"multi_vector_projector.bias": torch.zeros(128)}, e / PROJECTOR),
        "must hold multi_vector_projector.weight and multi_vector_projector.bias with the same number of rows",
    ),
    "a projector without rows": (
        lambda e: save_file({name: tensor[:0] for name, tensor in load_file(e / PROJECTOR).items()}, e / PROJECTOR),
        "multi_vector_projector.bias is missing or empty",
    ),
    "a projector of another dtype": (
        lambda e: save_file({name: tensor.half() for name, tensor in load_file(e / PROJECTOR).items()}, e / PROJECTOR),
        "its tensors must be float32",
    ),
    "a file too many": (lambda e: (e / "notes.txt").write_text(""), "notes.txt: does not belong"),
    "another checkpoint's canary": (
        lambda e: (e / "canary.json").write_text('{"manifest_sha256": "00"}'),
        "canary.json: belongs to another",
    ),
    "another task": (
        lambda e: edit_json(e / "manifest.json", task="code"),
        "code-Q8_0.gguf: the manifest does not list it",
    ),
    "a dtype of checkpoints": (lambda e: edit_json(e / "manifest.json", dtype="bfloat16"), "dtype bfloat16"),
    "other prompts": (lambda e: edit_json(e / "manifest.json", prompts={}), "manifest.json: prompts is {}"),
}


@pytest.mark.parametrize(("spoil", "said"), SPOILT.values(), ids=SPOILT)
def test_verify_names_what_is_wrong(spoil: Callable[[Path], object], said: str, copied: Path) -> None:
    assert verify(find_checkpoints(copied))[0].problems == []
    spoil(copied)
    problems = verify(find_checkpoints(copied))[0].problems
    assert [problem for problem in problems if said in problem], problems
