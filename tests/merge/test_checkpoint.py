"""A checkpoint is stock, describes itself, and says the truth about its files."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, TASKS
from jina_v4_merge.fold import fold
from jinja2 import TemplateError
from transformers import AutoProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

IMAGE_PROMPT = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Describe the image.<|im_end|>\n"
IMAGE = {"type": "image"}
DESCRIBE = {"type": "text", "text": "Describe the image."}


def user(*content: object) -> dict[str, object]:
    return {"role": "user", "content": list(content)}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def checkpoint(task: str, folded: Callable[[str], Path]) -> Path:
    return folded("bfloat16") / f"jina-embeddings-v4-{task}"


@pytest.mark.proof
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_plain_transformers_loads_it_with_every_tensor_in_its_place(dtype: str, folded: Callable[[str], Path]) -> None:
    folder = folded(dtype) / "jina-embeddings-v4-code"
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == getattr(torch, dtype)
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_tokenizer_and_processor_load_as_stock(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint)
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    assert dict(processor.image_processor.size) == {"shortest_edge": 3136, "longest_edge": 602112}
    for loaded in (tokenizer, processor):
        assert loaded.apply_chat_template([user(IMAGE)], tokenize=False) == IMAGE_PROMPT


@pytest.mark.parametrize(
    "content",
    [[IMAGE], [{"type": "image_url"}], [IMAGE, DESCRIBE], [{"type": "image_url", "image_url": {"url": "x"}}, DESCRIBE]],
    ids=["image", "image_url", "image and text", "image_url and text"],
)
def test_the_chat_template_renders_exactly_the_image_prompt(content: list[object], checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.apply_chat_template([user(*content)], tokenize=False) == IMAGE_PROMPT


@pytest.mark.parametrize(
    ("messages", "options"),
    [
        ([{"role": "user", "content": "Describe the image."}], {}),
        ([{"role": "user", "content": ""}], {}),
        ([user()], {}),
        ([user(DESCRIBE)], {}),
        ([user(IMAGE, {"type": "text", "text": "What is this?"})], {}),
        ([user(IMAGE, {"type": "text", "text": "Describe the image.\n"})], {}),
        ([user(IMAGE, DESCRIBE, DESCRIBE)], {}),
        ([user(IMAGE, IMAGE)], {}),
        ([user({"type": "video"})], {}),
        ([user(IMAGE), user(IMAGE)], {}),
        ([{"role": "system", "content": [DESCRIBE]}, user(IMAGE)], {}),
        ([{"role": "assistant", "content": [IMAGE]}], {}),
        ([user(IMAGE)], {"add_generation_prompt": True}),
    ],
    ids=[
        "text", "empty text", "no part", "no image", "another text", "almost the text", "the text twice", "two images",
        "video", "two messages", "system message", "assistant", "generation prompt",
    ],
)  # fmt: skip
def test_the_chat_template_refuses_any_other_chat(
    messages: list[object], options: dict[str, bool], folded: Callable[[str], Path]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folded("bfloat16") / "jina-embeddings-v4-code")
    with pytest.raises(TemplateError, match="exactly one user message whose content is a list of one image part"):
        tokenizer.apply_chat_template(messages, tokenize=False, **options)


def test_vllm_sees_that_contents_are_lists_of_parts(checkpoint: Path) -> None:
    loops = re.findall(r"for (\w+) in (\S+) -%}", (checkpoint / "chat_template.jinja").read_text())
    assert loops == [("message", "messages"), ("part", "message['content']")]


def test_the_config_is_stock(checkpoint: Path) -> None:
    base, config = read(GOLDEN / "checkpoint" / "config.json"), read(checkpoint / "config.json")
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    assert config["model_type"] == "qwen2_5_vl"
    assert config["matryoshka_dimensions"] == [128, 256]
    assert config["tie_word_embeddings"] is True
    published_only = {"auto_map", "task_names", "matryoshka_dims", "truncate_dim", "multi_vector_projector_dim"}
    published_only |= {"single_vector_pool_strategy", "verbosity", "_attn_implementation"}
    assert base.keys() - config.keys() == published_only
    kept = base.keys() - published_only - {"architectures"}
    assert {key: config[key] for key in kept} == {key: base[key] for key in kept}


def test_every_dtype_in_the_config_is_that_of_the_weights(folded: Callable[[str], Path]) -> None:
    config = read(folded("float16") / "jina-embeddings-v4-code" / "config.json")
    assert [section["torch_dtype"] for section in (config, config["text_config"], config["vision_config"])] == [
        "float16"
    ] * 3


def test_no_file_refers_to_code(checkpoint: Path) -> None:
    for path in checkpoint.glob("*.json"):
        assert "auto_map" not in path.read_text(), path.name
        assert "Jina" not in path.read_text(), path.name


@pytest.mark.parametrize("stays", [True, False], ids=["into the old folder", "into a new folder"])
def test_a_base_whose_processor_transformers_5_saved_has_the_image_settings_of_that_file(
    stays: bool, base: Path, out: Path, run: Callable[..., Any]
) -> None:
    Qwen2_5_VLProcessor.from_pretrained(base).save_pretrained(out / "saved")
    saved = read(out / "saved" / "processor_config.json")
    if not stays:
        (base / "preprocessor_config.json").unlink()
        saved["image_processor"]["size"]["longest_edge"] = 301056
    (base / "processor_config.json").write_text(json.dumps(saved))
    done = run("fold", "--base", base, "--out", out, "--task", "code")
    assert done.returncode == 0, done.stderr
    folder = out / "jina-embeddings-v4-code"
    assert not (folder / "processor_config.json").exists()
    processor = AutoProcessor.from_pretrained(folder)
    assert dict(processor.image_processor.size) == saved["image_processor"]["size"]
    sources = read(folder / "manifest.json")["sources"]["base"]["files"]
    digest = hashlib.sha256((base / "processor_config.json").read_bytes()).hexdigest()
    assert sources["processor_config.json"]["sha256"] == digest
    assert ("preprocessor_config.json" in sources) == stays
    done = run("verify", folder, "--base", base)
    assert done.returncode == 0, done.stderr


def test_a_template_of_the_tokenizer_config_does_not_come_along(
    base: Path, out: Path, edit_json: Callable[..., None]
) -> None:
    edit_json(
        base / "tokenizer_config.json", chat_template="{{ messages }}", processor_class="JinaEmbeddingsV4Processor"
    )
    folder = fold(str(base), out, ["code"])[0].folder
    config = read(folder / "tokenizer_config.json")
    assert "chat_template" not in config
    assert config["processor_class"] == "Qwen2_5_VLProcessor"


def test_the_prompts_travel_with_it(checkpoint: Path, task: str) -> None:
    passage = "Query: " if task == "text-matching" else "Passage: "
    prompts = {"query": "Query: ", "passage": passage}
    written = read(checkpoint / "config_sentence_transformers.json")
    assert written == {"prompts": prompts, "default_prompt_name": "query"}
    assert read(checkpoint / "manifest.json")["prompts"] == prompts


def test_the_manifest_lists_every_other_file_truly(checkpoint: Path) -> None:
    listed = read(checkpoint / "manifest.json")["files"]
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != "manifest.json"}
    assert listed == {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)} for name, content in files.items()
    }


def test_the_manifest_says_what_it_was_made_from(checkpoint: Path, task: str) -> None:
    manifest = read(checkpoint / "manifest.json")
    assert {
        key: manifest[key] for key in ("format", "model", "task", "dtype", "scaling", "dimensions", "image_prompt")
    } == {
        "format": 1,
        "model": "jina-embeddings-v4",
        "task": task,
        "dtype": "bfloat16",
        "scaling": 1.0,
        "dimensions": [128, 256],
        "image_prompt": IMAGE_PROMPT,
    }
    assert manifest["tool"].keys() == {"name", "version"}
    base, adapters = manifest["sources"]["base"], manifest["sources"]["adapters"]
    assert base.keys() == adapters.keys() == {"name", "revision", "files"}
    assert (base["name"], base["revision"]) == (str(GOLDEN / "checkpoint"), None)
    assert adapters["files"].keys() == {"adapters/adapter_config.json", "adapters/adapter_model.safetensors"}
    assert {"config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"} <= base["files"].keys()
    for name, digest in (base["files"] | adapters["files"]).items():
        content = (GOLDEN / "checkpoint" / name).read_bytes()
        assert digest == {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}, name
