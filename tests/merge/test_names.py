"""Every spelling of tensor names folds to the same bytes: those of transformers 4.52 to 5.19 and of PEFT.

`save_pretrained` of Qwen2_5_VLForConditionalGeneration wrote the published names with 4.52.4, 4.57.6, 5.0.0 and
5.19.0, and with 5.x and `save_original_format=False` its own; the inner Qwen2_5_VLModel wrote `language_model.` with
5.19.0. PEFT put `base_model.model.` before the module's own name, which depends on version and class too.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN
from damage import edit, split_adapters
from jina_v4_merge.errors import LayoutError
from jina_v4_merge.fold import fold
from jina_v4_merge.verify.checks import verify

TASK = "code"
PUBLISHED_MODULE = "base_model.model.model.language_model."

Tensors = dict[str, torch.Tensor]
Edit = Callable[[Path, Callable[[Tensors], object]], None]

# What stands for `model.` and `visual.` of the published names.
BASES = {
    "published: 4.x, and 5.x in the original format": ("model.", "visual."),
    "5.x, not in the original format": ("model.language_model.", "model.visual."),
    "the inner model of 5.x": ("language_model.", "visual."),
}

# What stands for `base_model.model.model.language_model.` and for `base_model.model.` of the projector.
ADAPTERS = {
    "published, and PEFT since 4.52": (PUBLISHED_MODULE, "base_model.model."),
    "PEFT before 4.52": ("base_model.model.model.", "base_model.model."),
    "PEFT around the inner model": ("base_model.model.language_model.", "base_model.model."),
    "without PEFT's prefix": ("model.language_model.", ""),
    "without PEFT's prefix, before 4.52": ("model.", ""),
    "without PEFT's prefix, of the inner model": ("language_model.", ""),
}


def rename(tensors: Tensors, spelling: Callable[[str], str]) -> None:
    for name in list(tensors):
        tensors[spelling(name)] = tensors.pop(name)


def respell_base(base: Path, names: tuple[str, str], edit_weights: Edit) -> None:
    language_model, vision = names

    def spelling(name: str) -> str:
        if name.startswith("visual."):
            return vision + name.removeprefix("visual.")
        return language_model + name.removeprefix("model.") if name.startswith("model.") else name

    edit_weights(base, lambda tensors: rename(tensors, spelling))


def respell_adapters(base: Path, names: tuple[str, str], folder_a_task: bool) -> None:
    module, projector = names

    def spelling(name: str) -> str:
        if name.startswith(PUBLISHED_MODULE):
            return module + name.removeprefix(PUBLISHED_MODULE)
        return projector + name.removeprefix("base_model.model.")

    edit(base / "adapters" / "adapter_model.safetensors", lambda tensors: rename(tensors, spelling))
    if folder_a_task:
        split_adapters(base / "adapters")


def weights_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}


@pytest.mark.parametrize("names", BASES.values(), ids=BASES)
def test_a_base_under_any_names_folds_to_the_same_bytes(
    names: tuple[str, str], base: Path, out: Path, edit_weights: Edit, folded: Callable[[str], Path]
) -> None:
    respell_base(base, names, edit_weights)
    index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    assert f"{names[0]}layers.0.mlp.up_proj.weight" in index
    made = fold(str(base), out, [TASK])[0].folder
    assert weights_of(made) == weights_of(folded("bfloat16") / f"jina-embeddings-v4-{TASK}")
    assert verify([made])[0].problems == []


@pytest.mark.parametrize("folder_a_task", [False, True], ids=["one file", "a folder a task"])
@pytest.mark.parametrize("names", ADAPTERS.values(), ids=ADAPTERS)
def test_adapters_under_any_names_fold_to_the_same_bytes(
    names: tuple[str, str], folder_a_task: bool, base: Path, out: Path, folded: Callable[[str], Path]
) -> None:
    respell_adapters(base, names, folder_a_task)
    made = fold(str(base), out, [TASK])[0].folder
    assert weights_of(made) == weights_of(folded("bfloat16") / f"jina-embeddings-v4-{TASK}")


def test_two_spellings_of_one_adapter_tensor_are_not_chosen_from(base: Path, out: Path, edit_adapters: Edit) -> None:
    name = f"{PUBLISHED_MODULE}layers.0.mlp.up_proj.lora_A.{TASK}.weight"
    other = name.removeprefix("base_model.model.")
    edit_adapters(base, lambda tensors: tensors.update({other: tensors[name].clone()}))
    with pytest.raises(LayoutError) as caught:
        fold(str(base), out)
    assert {name, other} <= set(str(caught.value).split())


def test_patterns_match_the_names_in_the_file(base: Path, out: Path, edit_json: Callable[..., None]) -> None:
    respell_adapters(base, ADAPTERS["without PEFT's prefix, before 4.52"], False)
    edit_json(base / "adapters" / "adapter_config.json", alpha_pattern={r"^model\.layers\.1\.mlp\.up_proj": 16})
    manifest = fold(str(base), out, [TASK])[0].folder / "manifest.json"
    scaling = json.loads(manifest.read_text())["scaling"]
    assert scaling == {"default": 1.0, "by_tensor": {"model.layers.1.mlp.up_proj.weight": 0.5}}


def test_a_config_of_transformers_5_is_read(base: Path, out: Path, folded: Callable[[str], Path]) -> None:
    config = json.loads((GOLDEN / "checkpoint" / "config.json").read_text())
    text = config["text_config"]
    text["rope_parameters"] = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
    text["dtype"] = text.pop("torch_dtype")
    config = {key: value for key, value in config.items() if key not in text or key == "tie_word_embeddings"}
    (base / "config.json").write_text(json.dumps(config))
    made = fold(str(base), out, [TASK])[0].folder
    assert weights_of(made) == weights_of(folded("bfloat16") / f"jina-embeddings-v4-{TASK}")
    written = json.loads((made / "config.json").read_text())["text_config"]
    assert written["rope_parameters"]["rope_theta"] == 1000000.0
    assert written["dtype"] == "bfloat16"
