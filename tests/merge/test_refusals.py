"""What stops a fold: each by name, and with nothing left behind."""

import builtins
import errno
import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, TASKS
from damage import change_json, edit, edit_json
from jina_v4_merge.errors import ConfigError, LayoutError, MergeError, OutputError, SourceError, WeightError
from jina_v4_merge.export.adapters import export_adapters
from jina_v4_merge.export.gguf import export_gguf
from jina_v4_merge.files import hashing
from jina_v4_merge.fold import fold
from jina_v4_merge.reading import weights

Tensors = dict[str, torch.Tensor]
Edit = Callable[[Path, Callable[[Tensors], object]], None]

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
LORA_A = "base_model.model.model.language_model.layers.2.mlp.up_proj.lora_A.code.weight"
PROJECTOR_LORA_B = "base_model.model.multi_vector_projector.lora_B.retrieval.weight"


@pytest.fixture(autouse=True)
def nothing_is_left_behind(out: Path) -> Iterator[None]:
    yield
    assert not out.exists()


def refusal(base: Path | str, out: Path, kind: type[MergeError], **options: str) -> str:
    with pytest.raises(kind) as caught:
        fold(str(base), out, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.3.mlp.up_proj.weight", "visual.extra"])
def test_an_unknown_tensor_of_the_base_is_named(name: str, base: Path, out: Path, edit_weights: Edit) -> None:
    edit_weights(base, lambda tensors: tensors.update({name: torch.ones(2, 2)}))
    assert f"1 unknown: {name} (model" in refusal(base, out, LayoutError)


@pytest.mark.parametrize(
    "name", [Q_PROJ, "model.norm.weight", "visual.merger.mlp.2.bias", "multi_vector_projector.bias"]
)
def test_a_missing_tensor_of_the_base_is_named(name: str, base: Path, out: Path, edit_weights: Edit) -> None:
    edit_weights(base, lambda tensors: tensors.pop(name))
    assert f"1 missing: {name}" in refusal(base, out, LayoutError)


def test_a_misshapen_tensor_of_the_base_is_named(base: Path, out: Path, edit_weights: Edit) -> None:
    edit_weights(base, lambda tensors: tensors.update({Q_PROJ: torch.ones(256, 128)}))
    assert f"{Q_PROJ} is [256, 128] and must be [256, 256] (model" in refusal(base, out, LayoutError)


def test_a_tensor_under_both_spellings_is_refused(base: Path, out: Path, edit_weights: Edit) -> None:
    other = "model.language_model.norm.weight"
    edit_weights(base, lambda tensors: tensors.update({other: tensors["model.norm.weight"].clone()}))
    assert {"model.norm.weight", other} <= set(refusal(base, out, LayoutError).split())


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.clustering.weight",
        "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.weight",
        "base_model.model.visual.blocks.0.attn.qkv.lora_A.code.weight",
        "base_model.model.single_vector_projector.lora_A.code.weight",
        "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_magnitude_vector",
    ],
)
def test_an_unknown_tensor_of_the_adapters_is_named(name: str, base: Path, out: Path, edit_adapters: Edit) -> None:
    edit_adapters(base, lambda tensors: tensors.update({name: torch.ones(32, 256)}))
    assert f"1 unknown: {name} (adapters/adapter_model.safetensors)" in refusal(base, out, LayoutError)


@pytest.mark.parametrize("name", [LORA_A, PROJECTOR_LORA_B])
def test_a_missing_tensor_of_an_adapter_that_is_not_asked_for_is_named(
    name: str, base: Path, out: Path, edit_adapters: Edit
) -> None:
    edit_adapters(base, lambda tensors: tensors.pop(name))
    with pytest.raises(LayoutError, match=f"1 missing: {name}"):
        fold(str(base), out, ["text-matching"])


def test_a_misshapen_tensor_of_the_adapters_is_named(base: Path, out: Path, edit_adapters: Edit) -> None:
    edit_adapters(base, lambda tensors: tensors.update({LORA_A: torch.ones(16, 256)}))
    assert f"{LORA_A} is [16, 256] and must be [32, 256] (adapters/adapter_model.safetensors)" in refusal(
        base, out, LayoutError
    )


def test_the_tensors_of_a_missing_task_are_counted(base: Path, out: Path, edit_adapters: Edit) -> None:
    def drop(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".code." in name]:
            del tensors[name]

    edit_adapters(base, drop)
    assert "44 missing: base_model.model.model.language_model.layers.0" in refusal(base, out, LayoutError)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", Q_PROJ, "multi_vector_projector.weight"])
def test_a_weight_that_is_not_finite_is_refused(
    name: str, value: float, base: Path, out: Path, edit_weights: Edit
) -> None:
    edit_weights(base, lambda tensors: tensors[name].view(-1)[-1].fill_(value))
    message = refusal(base, out, WeightError)
    assert message.startswith(f"{base}/model-0000")
    assert f"safetensors: {name} holds a value that is not finite" in message


def test_an_adapter_that_is_not_finite_is_refused(base: Path, out: Path, edit_adapters: Edit) -> None:
    edit_adapters(base, lambda tensors: tensors[PROJECTOR_LORA_B].view(-1)[7].fill_(torch.nan))
    message = refusal(base, out, WeightError)
    assert f"adapter_model.safetensors: {PROJECTOR_LORA_B} holds a value that is not finite" in message


@pytest.mark.parametrize("name", [Q_PROJ, "visual.patch_embed.proj.weight", "multi_vector_projector.weight"])
def test_a_weight_that_a_broken_download_left_zero(name: str, base: Path, out: Path, edit_weights: Edit) -> None:
    edit_weights(base, lambda tensors: tensors[name].zero_())
    message = refusal(base, out, WeightError)
    assert f"safetensors: {name} is all zero from row 0 to " in message
    assert "was not downloaded or copied whole; download or copy it again" in message


def test_an_adapter_that_a_broken_download_left_zero(base: Path, out: Path, edit_adapters: Edit) -> None:
    edit_adapters(base, lambda tensors: tensors[LORA_A.replace("lora_A", "lora_B")].zero_())
    assert fold(str(base), out.with_name("first"), ["code"]), "B is zero where training begins"
    edit_adapters(base, lambda tensors: tensors[LORA_A].zero_())
    assert f"adapter_model.safetensors: {LORA_A} is all zero" in refusal(base, out, WeightError)


def test_a_damaged_file_in_the_cache_of_the_hub(base: Path, out: Path, edit_weights: Edit) -> None:
    shard = base / "model-00002-of-00002.safetensors"
    blob = base.parent / "blobs" / hashlib.sha256(shard.read_bytes()).hexdigest()
    blob.parent.mkdir()
    shard.rename(blob)
    shard.symlink_to(blob)
    fold(str(base), out.with_name("first"), ["code"])
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    message = refusal(base, out, SourceError)
    assert message == (
        f"{shard}: its content does not have the sha256 of its name, so the download is damaged: remove {blob} and "
        "download it again"
    )


@pytest.mark.parametrize("name", ["model.norm.weight", Q_PROJ])
def test_a_value_too_large_for_float16_is_refused(name: str, base: Path, out: Path, edit_weights: Edit) -> None:
    edit_weights(base, lambda tensors: tensors[name].view(-1)[3].fill_(1e5))
    message = refusal(base, out, WeightError, dtype="float16")
    assert name in message
    assert "does not fit torch.float16" in message


def test_a_value_too_large_for_float16_fits_into_bfloat16(base: Path, tmp_path: Path, edit_weights: Edit) -> None:
    edit_weights(base, lambda tensors: tensors[Q_PROJ].view(-1)[3].fill_(1e5))
    assert fold(str(base), tmp_path / "elsewhere", ["code"])


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_dora", True), ("bias", "all"), ("r", 0), ("modules_to_save", ["norm"]), ("peft_type", "LOHA")],
)
def test_an_adapter_config_that_is_not_plain_lora_is_refused(key: str, value: object, base: Path, out: Path) -> None:
    edit_json(base / "adapters" / "adapter_config.json", **{key: value})
    message = refusal(base, out, ConfigError)
    assert f"{key}=" in message
    assert "adapter_config.json" in message


def replaced(base: Path, name: str, by: Callable[[Path], object]) -> None:
    (base / name).unlink()
    by(base / name)


def disagreeing(base: Path) -> None:
    settings = json.loads((base / "preprocessor_config.json").read_text())
    settings |= {"max_pixels": None, "size": {"shortest_edge": 3136, "longest_edge": 1204224}}
    (base / "processor_config.json").write_text(json.dumps({"image_processor": settings}))


FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
INDEX = "model.safetensors.index.json"
ADAPTERS = ("adapters/adapter_config.json", "adapters/adapter_model.safetensors")
FILES = ["config.json", "tokenizer.json", "preprocessor_config.json", INDEX, FIRST, *ADAPTERS]
QUANTIZED = {"quantization_config": {"quant_method": "bitsandbytes"}}
# What is done to a base, the error, and what its message holds.
SPOILT: dict[str, tuple[Callable[[Path], object], type[MergeError], tuple[str, ...]]] = {
    "a config that quantises": (
        lambda b: edit_json(b / "config.json", **QUANTIZED), ConfigError, ("config.json has a quantization_config",)
    ),
    "a config that quantises the text": (
        lambda b: change_json(b / "config.json", lambda config: config["text_config"].update(QUANTIZED)),
        ConfigError, ("config.json has a quantization_config",),
    ),
    "a config of more layers": (
        lambda b: change_json(b / "config.json", lambda config: config["text_config"].update(num_hidden_layers=4)),
        LayoutError, ("12 missing: model.layers.3.input_layernorm.weight",),
    ),
    "a config of a larger vocabulary": (
        lambda b: change_json(b / "config.json", lambda config: config["text_config"].update(vocab_size=9999)),
        LayoutError, ("model.embed_tokens.weight is [",),
    ),
    "two files that disagree about images": (disagreeing, ConfigError, (
        "processor_config.json and preprocessor_config.json have different settings of images",
        "max_pixels (1204224 and 602112). Loaders differ",
    )),
    "image settings that are a string": (
        lambda b: (b / "processor_config.json").write_text('{"image_processor": "Qwen2VLImageProcessor"}'),
        ConfigError, ("processor_config.json: image_processor must be a JSON object",),
    ),
    "an empty tokenizer": (
        lambda b: (b / "tokenizer.json").write_text("{}"), SourceError, ("tokenizer.json: no tokenizer: ",)
    ),
    "a missing shard": (
        lambda b: (b / SECOND).unlink(), SourceError,
        (f"{SECOND} is not there", "model.layers.2.input_layernorm.weight"),
    ),
    "a single file beside an index": (
        lambda b: (b / "model.safetensors").touch(), SourceError, (f"{INDEX} and model.safetensors are both there",)
    ),
    "an index with a tensor in the wrong shard": (
        lambda b: change_json(b / INDEX, lambda index: index["weight_map"].update({Q_PROJ: SECOND})),
        LayoutError, (f"disagree about {Q_PROJ}",),
    ),
    "a quantised weight": (
        lambda b: edit(b / FIRST, lambda tensors: tensors.update({Q_PROJ: torch.ones(256, 256, dtype=torch.int8)})),
        LayoutError, (Q_PROJ, "I8"),
    ),
    **{
        f"no {name}": (lambda b, name=name: (b / name).unlink(), SourceError, (name,))
        for name in ("tokenizer_config.json", *(name for name in FILES if name != FIRST))
    },
    **{
        f"a link to itself as {name}": (
            lambda b, name=name: replaced(b, name, lambda path: path.symlink_to(path)), SourceError, (Path(name).name,)
        )
        for name in FILES
    },
    **{
        f"a folder as {name}": (lambda b, name=name: replaced(b, name, Path.mkdir), SourceError, (Path(name).name,))
        for name in FILES
    },
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "kind", "said"), SPOILT.values(), ids=SPOILT)
def test_a_spoilt_base_is_refused_with_what_is_wrong(
    spoil: Callable[[Path], object], kind: type[MergeError], said: tuple[str, ...], base: Path, out: Path
) -> None:
    spoil(base)
    message = refusal(base, out, kind)
    assert [part for part in said if part not in message] == [], message


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])
def test_a_tokenizer_of_another_model_is_refused(token: str, base: Path, out: Path) -> None:
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    (added,) = (added for added in tokenizer["added_tokens"] if added["content"] == token)
    added["content"] = "<|other|>"
    (base / "tokenizer.json").write_text(json.dumps(tokenizer).replace(json.dumps(token), '"<|other|>"'))
    message = refusal(base, out, ConfigError)
    assert f"tokenizer.json: this tokenizer is of another model than config.json: {token} has id None and" in message


@pytest.mark.parametrize("key", ["task_names", "matryoshka_dims", "multi_vector_projector_dim", "vision_config"])
def test_a_config_of_another_model_is_refused(key: str, base: Path, out: Path) -> None:
    change_json(base / "config.json", lambda config: config.pop(key))
    assert key in refusal(base, out, ConfigError)


def test_a_task_that_the_base_does_not_have_is_refused(base: Path, out: Path, edit_adapters: Edit) -> None:
    edit_json(base / "config.json", task_names=["retrieval", "code"])
    edit_adapters(base, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".text-matching." in name])
    with pytest.raises(ConfigError, match="no adapter of task text-matching; it has retrieval, code"):
        fold(str(base), out, ["text-matching"])


@pytest.mark.parametrize("n_bytes", [0, 4, 1000, -1], ids=["empty", "no header", "half a header", "one byte short"])
@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "adapters/adapter_model.safetensors"])
def test_a_file_that_is_cut_short_is_named(name: str, n_bytes: int, base: Path, out: Path) -> None:
    size = (base / name).stat().st_size
    os.truncate(base / name, n_bytes % size)
    message = refusal(base, out, SourceError)
    assert name in message
    assert "cut short" in message


@pytest.mark.parametrize(
    "name", ["config.json", "adapters/adapter_config.json", "model.safetensors.index.json", "tokenizer_config.json"]
)
@pytest.mark.parametrize("content", ["", "{", "[1]", '"x"'], ids=["empty", "cut short", "a list", "a string"])
def test_a_file_that_is_not_the_json_expected_is_named(
    name: str, content: str, base: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (base / name).write_text(content)
    monkeypatch.setattr("jina_v4_merge.fold.staging", None)  # stopped before that
    assert Path(name).name in refusal(base, out, MergeError)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_named(name: str, base: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk that fails, or in a folder of somebody else's (root, which tests may be, can read those)."""
    for module, attribute in ((os, "open"), (builtins, "open"), (io, "open"), (weights, "safe_open")):
        real = getattr(module, attribute)

        def fail(path: object, *args: object, real: Callable[..., object] = real, **options: object) -> object:
            if str(path) == str(base / name):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(path, *args, **options)

        monkeypatch.setattr(module, attribute, fail)
    message = refusal(base, out, SourceError)
    assert str(base / name) in message
    assert "Permission denied" in message


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "adapters/adapter_model.safetensors"])
@pytest.mark.parametrize("place", [0, 7, 9, 200], ids=["length", "top of the length", "header", "an entry"])
def test_a_flipped_byte_in_a_header_is_found(place: int, name: str, base: Path, out: Path) -> None:
    content = bytearray((base / name).read_bytes())
    content[place] ^= 0x85
    (base / name).write_bytes(content)
    message = refusal(base, out, MergeError)
    assert str(base) in message
    assert name in message or "unknown" in message  # a name that has changed is another name


def test_a_file_that_becomes_shorter_meanwhile_is_named(base: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(folder: Path) -> bool:
        os.truncate(base / "adapters" / "adapter_model.safetensors", 100_000)
        return True

    monkeypatch.setattr("jina_v4_merge.fold.can_link", cut)
    message = refusal(base, out, SourceError)
    assert re.search(r"adapter_model\.safetensors: cannot read base_model\..*: the file has become shorter", message)


COMMANDS = {
    "fold": fold,
    "export.adapters": export_adapters,
    "export.gguf": functools.partial(export_gguf, task="code"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "name",
    [FIRST, *ADAPTERS],
)
@pytest.mark.parametrize("in_place", [True, False], ids=["written to", "replaced"])
def test_a_file_that_changes_meanwhile_is_named(
    in_place: bool, name: str, command: str, base: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change_and_hash(paths: Sequence[Path]) -> object:
        content = (base / name).read_bytes()
        (base / "new").write_bytes(content[:-2] + b"  ")
        if in_place:
            (base / name).write_bytes((base / "new").read_bytes())
        else:
            (base / "new").replace(base / name)
        return hashing(paths)

    monkeypatch.setattr(f"jina_v4_merge.{command}.hashing", change_and_hash)
    with pytest.raises(SourceError) as caught:
        COMMANDS[command](str(base), out)
    assert str(caught.value).startswith(f"{base / name}: changed while the base was read. Nothing was written")


def test_a_base_that_is_a_link_to_itself_is_named(tmp_path: Path, out: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert refusal(tmp_path / "loop", out, SourceError) == f"{tmp_path / 'loop'}: no such folder"


def test_a_base_whose_name_is_too_long_is_refused(tmp_path: Path, out: Path) -> None:
    assert "File name too long" in refusal(tmp_path / ("x" * 300), out, SourceError)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "~/nowhere/at/all", "a/b/c", "nowhere"])
def test_a_folder_that_does_not_exist_is_named(name: str, out: Path) -> None:
    assert refusal(name, out, SourceError).endswith("no such folder")


def test_a_revision_of_a_folder_is_refused(base: Path, out: Path) -> None:
    assert "--revision is for a model on the hub" in refusal(base, out, SourceError, revision="main")


def test_an_output_that_exists_is_named_and_stays(tmp_path: Path) -> None:
    target = tmp_path / f"jina-embeddings-v4-{TASKS[1]}"
    target.mkdir()
    (target / "precious").touch()
    with pytest.raises(OutputError, match=str(target)):
        fold(str(GOLDEN / "checkpoint"), tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == [target.name, "precious"]


def test_an_output_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write here"):
        fold(str(GOLDEN / "checkpoint"), tmp_path / "file")
