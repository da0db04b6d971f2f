"""`verify --against`: what somebody else merged is equal, differs by rounding, or is named for what it is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN
from damage import change_json
from jina_v4_merge.errors import LayoutError, SourceError
from jina_v4_merge.export.adapters import export_adapters
from jina_v4_merge.fold import fold
from jina_v4_merge.reading.model import open_model
from jina_v4_merge.verify.against import Compared, compare_with
from jina_v4_merge.verify.checks import verify
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

pytestmark = pytest.mark.proof

BASE = GOLDEN / "checkpoint"
TASK = "retrieval"
PROJECTOR = "multi_vector_projector.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
)

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def ours(folded: Callable[[str], Path]) -> Path:
    return folded("bfloat16") / f"jina-embeddings-v4-{TASK}"


@pytest.fixture
def other(ours: Path, tmp_path: Path) -> Path:
    """A copy of ours, without what tells that it is ours."""
    copy = Path(shutil.copytree(ours, tmp_path / "other"))
    (copy / "manifest.json").unlink()
    return copy


@pytest.fixture(scope="module")
def peft_merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What PEFT merges in bfloat16 and transformers saves: the usual way of somebody else."""
    folder = tmp_path_factory.mktemp("peft")
    export_adapters(str(BASE), folder / "exported", [TASK], with_base=True)
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "exported" / "base", dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, folder / "exported" / TASK, autocast_adapter_dtype=False)
    model.merge_and_unload().save_pretrained(folder / "merged")
    for path in (folder / "exported" / "base").glob("*"):
        if "token" in path.name or "template" in path.name or path.name == "preprocessor_config.json":
            shutil.copy(path, folder / "merged")
    return folder / "merged"


def beside(ours: Path, other: Path, base: Path | None = BASE) -> Compared:
    (checkpoint,) = verify([ours])
    assert checkpoint.problems == []
    return compare_with(checkpoint, other, None if base is None else open_model(str(base)))


def counts(compared: Compared) -> tuple[int, int, int]:
    return compared.n_equal, compared.n_rounding, len(compared.differing)


def looks_like(compared: Compared) -> set[str | None]:
    return {difference.looks_like for difference in compared.differing}


def edit(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Change one tensor; None takes it away."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][name]
    tensors = load_file(path)
    changed = change(tensors.pop(name))
    if changed is None:
        del index["weight_map"][name]
    else:
        tensors[name] = changed
    save_file(tensors, path)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("base", [None, BASE], ids=["alone", "with the base"])
def test_a_checkpoint_is_equal_to_itself(base: Path | None, ours: Path, other: Path) -> None:
    compared = beside(ours, other, base)
    assert counts(compared) == (70, 0, 0)
    assert compared.same_vectors
    assert compared.missing == compared.unknown == compared.settings == []


@pytest.mark.parametrize("original", [True, False], ids=["published names", "names of transformers 5"])
def test_what_transformers_saves_of_ours_is_equal(original: bool, ours: Path, tmp_path: Path) -> None:
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(ours, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved", save_original_format=original)
    names = load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert any(name.startswith("model.language_model.") for name in names) != original
    compared = beside(ours, tmp_path / "saved", None)
    assert counts(compared) == (68, 0, 0)
    assert compared.missing == ["multi_vector_projector.bias", "multi_vector_projector.weight"]
    assert [setting for setting in compared.settings if "config.json:" in setting] == []


@pytest.mark.parametrize("base", [None, BASE], ids=["alone", "with the base"])
def test_what_peft_merges_in_bfloat16_differs_by_rounding(base: Path | None, ours: Path, peft_merged: Path) -> None:
    compared = beside(ours, peft_merged, base)
    assert counts(compared) == (47, 21, 0)
    assert compared.missing == ["multi_vector_projector.bias", "multi_vector_projector.weight"]
    assert compared.settings == []
    assert compared.same_vectors


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16 saved in float32"])
@pytest.mark.parametrize("ours_dtype", ["float32", "bfloat16"])
def test_other_dtypes_differ_by_rounding_at_most(
    dtype: str, ours_dtype: str, folded: Callable[[str], Path], other: Path
) -> None:
    name = f"jina-embeddings-v4-{TASK}"
    if dtype.startswith("bfloat16"):
        for path in other.glob("m*.safetensors"):
            save_file({name: tensor.float() for name, tensor in load_file(path).items()}, path)
    else:
        other = folded(dtype) / name
    compared = beside(folded(ours_dtype) / name, other)
    assert compared.differing == []
    assert compared.n_equal + compared.n_rounding == 70
    assert (compared.n_rounding > 0) != (dtype.startswith(ours_dtype))


@pytest.mark.parametrize(("alpha", "scaling"), [(16, "0.5"), (64, "2")])
def test_a_wrong_scaling_is_named(alpha: int, scaling: str, ours: Path, base: Path, out: Path) -> None:
    change_json(base / "adapters" / "adapter_config.json", lambda config: config.update(lora_alpha=alpha))
    made = fold(str(base), out, [TASK])[0].folder
    compared = beside(ours, made)
    assert counts(compared) == (48, 0, 22)
    assert looks_like(compared) == {f"this task's adapter with a scaling of {scaling}; it must be 1"}
    assert len(beside(ours, made, None).differing) == 22


def test_a_missing_adapter_is_named(ours: Path, tmp_path: Path) -> None:
    export_adapters(str(BASE), tmp_path / "exported", ["code"], with_base=True)
    compared = beside(ours, tmp_path / "exported" / "base")
    assert counts(compared) == (47, 0, 21)
    assert looks_like(compared) == {"the base, with no adapter"}
    assert len(beside(ours, tmp_path / "exported" / "base", None).differing) == 21


def test_a_single_layer_without_its_adapter_is_named(ours: Path, other: Path) -> None:
    weight = {name: tensor for path in BASE.glob("model-*") for name, tensor in load_file(path).items()}[UP]
    edit(other, UP, lambda _: weight)
    compared = beside(ours, other)
    assert [(each.name, each.looks_like) for each in compared.differing] == [(UP, "the base, with no adapter")]


def test_another_task_s_adapter_is_named(ours: Path, folded: Callable[[str], Path]) -> None:
    compared = beside(ours, folded("bfloat16") / "jina-embeddings-v4-code")
    assert looks_like(compared) == {"the base with the adapter of code"}
    assert len(compared.differing) == 22


def test_two_adapters_at_once_are_named(ours: Path, base: Path, other: Path) -> None:
    model = open_model(str(base))
    (a, b, scaling) = model.lora("code", UP)
    edit(other, UP, lambda weight: (weight.double() + scaling * b @ a).bfloat16())
    (difference,) = beside(ours, other).differing
    assert difference.looks_like == "the base with the adapter of retrieval and that of code"


def test_parts_of_several_adapters_are_named(ours: Path, base: Path, other: Path) -> None:
    model = open_model(str(base))
    (a, b, scaling) = model.lora("code", UP)
    edit(other, UP, lambda weight: (weight.double() + 0.5 * scaling * b @ a).bfloat16())
    (difference,) = beside(ours, other).differing
    parts = "1.00 times the adapter of retrieval + 0.50 times the adapter of code"
    assert difference.looks_like == f"the base and {parts}"


def test_other_weights_are_told_from_adapters(ours: Path, other: Path) -> None:
    edit(other, UP, lambda weight: weight + 0.3 * weight.std() * torch.randn(weight.shape).bfloat16())
    edit(other, "visual.blocks.0.attn.qkv.weight", lambda weight: weight * 1.1)
    compared = beside(ours, other)
    said = {difference.name: difference.looks_like for difference in compared.differing}
    assert said == {
        "visual.blocks.0.attn.qkv.weight": None,
        UP: "neither the base nor made of its adapters",
    }


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("base", [None, BASE], ids=["alone", "with the base"])
def test_a_value_that_is_not_finite_is_named(base: Path | None, value: float, ours: Path, other: Path) -> None:
    def change(weight: torch.Tensor) -> torch.Tensor:
        weight[3, 4] = value
        return weight

    edit(other, UP, change)
    assert looks_like(beside(ours, other, base)) == {"values that are not finite"}


def test_a_single_value_is_found(ours: Path, other: Path) -> None:
    def change(weight: torch.Tensor) -> torch.Tensor:
        weight[3, 4] += 2 * weight.std()
        return weight

    edit(other, UP, change)
    (difference,) = beside(ours, other).differing
    assert difference.looks_like == "this task's adapter, but for single values"


def test_an_adapter_that_is_less_than_rounding_is_seen_with_the_base(
    base: Path, out: Path, tmp_path: Path, edit_adapters: Callable[..., None]
) -> None:
    edit_adapters(base, lambda tensors: [tensors[name].mul_(2**-8) for name in tensors if ".lora_B." in name])
    made = fold(str(base), out, [TASK])[0].folder
    export_adapters(str(base), tmp_path / "exported", [TASK], with_base=True)
    assert beside(made, tmp_path / "exported" / "base", None).differing == []
    compared = beside(made, tmp_path / "exported" / "base", base)
    assert looks_like(compared) == {"the base, with no adapter"}
    assert len(compared.differing) == 21


def test_tensors_that_only_one_has_are_named(ours: Path, other: Path) -> None:
    edit(other, "model.norm.weight", lambda _: None)
    edit(other, UP, lambda weight: weight[:-1].clone())
    save_file({"model.extra.weight": torch.ones(2), "lm_head.weight": torch.ones(2)}, other / "model-more.safetensors")
    change_json(
        other / "model.safetensors.index.json",
        lambda index: index["weight_map"].update(
            dict.fromkeys(("model.extra.weight", "lm_head.weight"), "model-more.safetensors")
        ),
    )
    (other / PROJECTOR).unlink()
    compared = beside(ours, other)
    assert compared.unknown == ["model.extra.weight"]
    projector = ["multi_vector_projector.bias", "multi_vector_projector.weight"]
    assert compared.missing == ["model.norm.weight", *projector]
    assert compared.misshapen == [f"{UP} is [511, 256] and ours [512, 256]"]
    assert not compared.same_vectors


def test_the_projector_may_be_among_the_weights(ours: Path, other: Path) -> None:
    (other / PROJECTOR).rename(other / "model-projector.safetensors")
    names = ["multi_vector_projector.weight", "multi_vector_projector.bias"]
    change_json(
        other / "model.safetensors.index.json",
        lambda index: index["weight_map"].update(dict.fromkeys(names, "model-projector.safetensors")),
    )
    assert counts(beside(ours, other)) == (70, 0, 0)


def into_processor_config(other: Path) -> None:
    """What transformers 5 makes of the preprocessor's settings."""
    settings = json.loads((other / "preprocessor_config.json").read_text())
    size = {"shortest_edge": settings.pop("min_pixels"), "longest_edge": settings.pop("max_pixels")}
    (other / "processor_config.json").write_text(json.dumps({"image_processor": settings | {"size": size}}))
    (other / "preprocessor_config.json").unlink()


def into_rope_parameters(config: dict[str, Any]) -> None:
    text = config["text_config"]
    text["rope_parameters"] = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}


SAME = {
    "settings of the processor of transformers 5": into_processor_config,
    "rope parameters of transformers 5": lambda o: change_json(o / "config.json", into_rope_parameters),
    "a text config at the top": lambda o: change_json(
        o / "config.json",
        lambda c: c.update({key: value for key, value in c.pop("text_config").items() if value is not None}),
    ),
    "merges as text": lambda o: change_json(
        o / "tokenizer.json", lambda t: t["model"].update(merges=[" ".join(pair) for pair in t["model"]["merges"]])
    ),
    "other offsets": lambda o: change_json(
        o / "tokenizer.json", lambda t: t["pre_tokenizer"].update(trim_offsets=False)
    ),
    "a template in the tokenizer's settings": lambda o: change_json(
        o / "tokenizer_config.json",
        lambda c: c.update(chat_template=(o / "chat_template.jinja").rename(o / "moved").read_text()),
    ),
    "a tokenizer's settings as transformers 5 saves them": lambda o: change_json(
        o / "tokenizer_config.json", lambda c: c.update(tokenizer_class="Qwen2Tokenizer", add_prefix_space=None)
    ),
    "a tokenizer that does what its file says": lambda o: change_json(
        o / "tokenizer_config.json", lambda c: c.update(tokenizer_class="PreTrainedTokenizerFast", add_bos_token=False)
    ),
    "no settings of the tokenizer": lambda o: (o / "tokenizer_config.json").unlink(),
    "settings that are the processor's defaults": lambda o: change_json(
        o / "preprocessor_config.json",
        lambda c: [c.pop(key, None) for key in ("do_resize", "do_rescale", "resample", "rescale_factor", "image_std")],
    ),
    "a post-processor without a token": lambda o: change_json(
        o / "tokenizer.json",
        lambda t: t.update(post_processor={"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}]}),
    ),
    "no prompts": lambda o: (o / "config_sentence_transformers.json").unlink(),
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_settings_in_another_form_are_the_same(change: Callable[[Path], object], ours: Path, other: Path) -> None:
    change(other)
    assert beside(ours, other, None).settings == []


DIFFERENT = {
    "max_pixels": (
        lambda o: change_json(o / "preprocessor_config.json", lambda c: c.update(max_pixels=12845056)),
        "preprocessor_config.json: max_pixels is 12845056 and ours 602112; larger images are reduced to this many",
    ),
    "resampling": (
        lambda o: change_json(o / "preprocessor_config.json", lambda c: c.update(resample=2)),
        "preprocessor_config.json: resample is 2 and ours 3",
    ),
    "another image size in the file of transformers 5": (
        lambda o: change_json(
            shutil.copy(o / "preprocessor_config.json", o / "processor_config.json"),
            lambda c: c.update(image_processor=c | {"max_pixels": 12845056}),
        ),
        "processor_config.json: max_pixels is 12845056 and ours 602112",
    ),
    "no preprocessor": (
        lambda o: (o / "preprocessor_config.json").unlink(),
        "preprocessor_config.json is missing, so its settings are not compared",
    ),
    "rope": (
        lambda o: change_json(o / "config.json", lambda c: c["text_config"].update(rope_theta=1e4)),
        "config.json: rope_theta is 10000.0 and ours 1000000.0",
    ),
    "windows": (
        lambda o: change_json(o / "config.json", lambda c: c["vision_config"].update(fullatt_block_indexes=[0])),
        "config.json: vision_config.fullatt_block_indexes is [0] and ours [1]",
    ),
    "vocabulary": (
        lambda o: change_json(o / "tokenizer.json", lambda t: t["model"]["vocab"].pop("!")),
        "tokenizer.json: another vocabulary",
    ),
    "merges": (
        lambda o: change_json(o / "tokenizer.json", lambda t: t["model"]["merges"].reverse()),
        "tokenizer.json: another list of merges",
    ),
    "a tokenizer of another class": (
        lambda o: change_json(o / "tokenizer_config.json", lambda c: c.update(tokenizer_class="LlamaTokenizerFast")),
        "tokenizer_config.json: tokenizer_class is 'LlamaTokenizer' and ours 'Qwen2Tokenizer'",
    ),
    **{
        key: (
            lambda o, key=key: change_json(o / "tokenizer_config.json", lambda c: c.update({key: True})),
            f"tokenizer_config.json: {key} is True and ours False",
        )
        for key in ("add_prefix_space", "split_special_tokens", "add_bos_token", "add_eos_token")
    },
    "words": (
        lambda o: change_json(o / "tokenizer.json", lambda t: t["pre_tokenizer"].update(use_regex=False)),
        "tokenizer.json: another pre-tokenizer",
    ),
    "normal form": (
        lambda o: change_json(o / "tokenizer.json", lambda t: t.update(normalizer={"type": "NFC"})),
        "tokenizer.json: another normalizer",
    ),
    "a token at the end": (
        lambda o: change_json(
            o / "tokenizer.json",
            lambda t: t.update(
                post_processor={
                    "type": "TemplateProcessing",
                    "single": [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "<|endoftext|>"}}],
                }
            ),
        ),
        "tokenizer.json: another post-processor",
    ),
    "truncation": (
        lambda o: change_json(o / "tokenizer.json", lambda t: t.update(truncation={"max_length": 8})),
        "tokenizer.json: another truncation",
    ),
    "whole words first": (
        lambda o: change_json(o / "tokenizer.json", lambda t: t["model"].update(ignore_merges=True)),
        "tokenizer.json: another order of merges",
    ),
    "yarn": (
        lambda o: change_json(o / "config.json", lambda c: c["text_config"]["rope_scaling"].update(rope_type="yarn")),
        "config.json: rope_type is 'yarn' and ours None",
    ),
    "a sliding window": (
        lambda o: change_json(o / "config.json", lambda c: c["text_config"].update(use_sliding_window=True)),
        "config.json: use_sliding_window is True and ours False",
    ),
    "a template with a system message": (
        lambda o: (o / "chat_template.jinja").write_text(QWEN_TEMPLATE),
        "chat_template.jinja: the chat template makes '<|im_start|>system\\nYou are a helpful assistant.",
    ),
    "a template without the last newline": (
        lambda o: (o / "chat_template.jinja").write_text(
            "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Describe the image.<|im_end|>\n"
        ),
        "Describe the image.<|im_end|>' of an image, and the image prompt is",
    ),
    "a broken template": (
        lambda o: (o / "chat_template.jinja").write_text("{% for %}"),
        "chat_template.jinja: the chat template cannot be rendered",
    ),
    "no template": (lambda o: (o / "chat_template.jinja").unlink(), "no chat template: for images the caller"),
    "prompts": (
        lambda o: change_json(
            o / "config_sentence_transformers.json", lambda c: c["prompts"].update(passage="passage: ")
        ),
        'the prompt passage is "passage: " and ours "Passage: "',
    ),
}


@pytest.mark.parametrize(("change", "said"), DIFFERENT.values(), ids=DIFFERENT)
def test_settings_that_change_vectors_are_named(
    change: Callable[[Path], object], said: str, ours: Path, other: Path
) -> None:
    change(other)
    compared = beside(ours, other, None)
    assert [said in setting for setting in compared.settings] == [True], compared.settings
    assert counts(compared) == (70, 0, 0)
    assert not compared.same_vectors


def test_quantized_weights_are_refused(ours: Path, other: Path) -> None:
    edit(other, UP, lambda weight: weight.to(torch.int8))
    with pytest.raises(LayoutError, match=rf"{UP} has dtype I8; only BF16, F16, F32 are read"):
        beside(ours, other)


def test_a_folder_of_pickles_is_refused(ours: Path, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(SourceError, match=r"pytorch_model\.bin is there, which is a pickle"):
        beside(ours, tmp_path)


def test_the_command_says_what_differs_and_fails_then(
    ours: Path, other: Path, folded: Callable[[str], Path], run: Callable[..., Any]
) -> None:
    done = run("verify", ours, "--against", other)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1:-1] == [
        f"{other}: 70 tensors equal, 0 differ by rounding, 0 differ",
        "  so its dense vectors are ours but for rounding",
    ]
    change_json(other / "preprocessor_config.json", lambda c: c.update(max_pixels=12845056))
    shutil.copy(folded("bfloat16") / "jina-embeddings-v4-code" / PROJECTOR, other)
    done = run("verify", ours, "--against", other, "--base", BASE)
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()[1:-1]
    assert lines[0] == f"{other}: 69 tensors equal, 0 differ by rounding, 1 differ"
    assert lines[1].startswith("  differs by ")
    assert lines[1].endswith(" multi_vector_projector.weight: the base with the adapter of code")
    assert lines[2].startswith("  setting: preprocessor_config.json: max_pixels is 12845056 and ours 602112")
    assert len(lines) == 3


def test_one_checkpoint_is_compared_at_a_time(folded: Callable[[str], Path], run: Callable[..., Any]) -> None:
    done = run("verify", folded("bfloat16"), "--against", BASE)
    assert done.returncode == 1
    assert done.stderr.startswith("error: --against compares with one checkpoint of `jina-v4-merge fold`")
    done = run("verify", folded("bfloat16") / "jina-embeddings-v4-code", "--against", "/nowhere")
    assert done.stderr == "error: /nowhere: no such folder\n"
