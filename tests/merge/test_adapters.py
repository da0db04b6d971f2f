"""Adapters wherever they lie, in either layout, and with ranks and alphas by pattern."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN
from damage import split_adapters, weights_of
from jina_v4_merge.errors import ConfigError, LayoutError, SourceError
from jina_v4_merge.fold import fold
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.proof

BASE = GOLDEN / "checkpoint"
Tensors = dict[str, torch.Tensor]
Edit = Callable[[Path, Callable[[Tensors], object]], None]


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def manifest_of(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize("layout", ["one file", "a folder a task"])
@pytest.mark.parametrize("place", ["itself", "adapters/ in it"])
def test_adapters_elsewhere_give_the_same_checkpoint_and_their_place_is_recorded(
    layout: str, place: str, base: Path, out: Path, tmp_path: Path, folded: Callable[[str], Path]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    holder = elsewhere / "adapters" if place == "adapters/ in it" else elsewhere
    holder.parent.mkdir(exist_ok=True)
    (base / "adapters").rename(holder)
    if layout == "a folder a task":
        split_adapters(holder)
    made = fold(str(base), out, ["code"], adapters=str(elsewhere))[0].folder
    expected = folded("bfloat16") / "jina-embeddings-v4-code"
    assert content_of(made) == content_of(expected)
    sources = manifest_of(made)["sources"]
    assert (sources["base"]["name"], sources["adapters"]["name"]) == (str(base), str(elsewhere))
    folder = ("adapters/" if holder != elsewhere else "") + ("code/" if layout == "a folder a task" else "")
    assert list(sources["adapters"]["files"]) == [f"{folder}adapter_config.json", f"{folder}adapter_model.safetensors"]


def test_adapters_elsewhere_are_taken_instead_of_those_beside_the_base(
    base: Path, out: Path, tmp_path: Path, edit_adapters: Edit, folded: Callable[[str], Path]
) -> None:
    edit_adapters(base, lambda tensors: [tensor.zero_() for tensor in tensors.values()])
    made = fold(str(base), out, ["retrieval"], adapters=str(BASE))[0].folder
    assert content_of(made) == content_of(folded("bfloat16") / "jina-embeddings-v4-retrieval")


def test_a_folder_a_task_may_lack_the_tasks_that_are_not_asked_for(base: Path, out: Path) -> None:
    split_adapters(base / "adapters", ("code", "retrieval"))
    made = fold(str(base), out, ["code"])
    assert [checkpoint.task for checkpoint in made] == ["code"]
    with pytest.raises(ConfigError, match=f"{base} has no adapter of task text-matching; it has retrieval, code"):
        fold(str(base), out.with_name("other"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapters": "/nowhere/at/all"}, "/nowhere/at/all: no such folder"),
        ({"adapters": str(BASE / "img")}, "img: no such folder"),
        ({"adapters": str(GOLDEN)}, "adapter_model.safetensors: no such file"),
        ({"adapters": str(BASE), "adapters_revision": "main"}, "--adapters-revision is for a model on the hub"),
        ({"adapters_revision": "main"}, "--adapters-revision is for --adapters from the hub"),
    ],
    ids=["no folder", "no relative folder", "no adapters", "revision of a folder", "revision of nothing"],
)
def test_adapters_that_cannot_be_found_are_an_error(options: dict[str, str], message: str, out: Path) -> None:
    with pytest.raises(SourceError, match=message):
        fold(str(BASE), out, **options)
    assert not out.exists()


@pytest.mark.parametrize("other", ["adapters/code", "", "code"], ids=["beside the file", "above", "a folder above"])
def test_adapters_in_two_places_are_not_chosen_from(other: str, base: Path, out: Path) -> None:
    shutil.copytree(base / "adapters", base / "copy")
    (base / other).mkdir(exist_ok=True)
    for path in (base / "copy").iterdir():
        shutil.copy(path, base / other)
    with pytest.raises(SourceError, match=f"there are adapters in {base}/adapters and in {base / other}; remove those"):
        fold(str(base), out)
    assert not out.exists()


def test_a_folder_that_only_has_the_name_of_a_task_is_no_adapter(
    base: Path, out: Path, folded: Callable[[str], Path]
) -> None:
    (base / "code").mkdir()
    (base / "code" / "train.py").touch()
    made = fold(str(base), out, ["code"])[0].folder
    assert content_of(made) == content_of(folded("bfloat16") / "jina-embeddings-v4-code")


def test_a_folder_with_another_task_s_adapter_is_refused(base: Path, out: Path) -> None:
    tensors = load_file(base / "adapters" / "adapter_model.safetensors")
    split_adapters(base / "adapters")
    for task, other in (("code", "retrieval"), ("retrieval", "code")):
        own = {name: tensor for name, tensor in tensors.items() if f".{other}." in name}
        save_file(own, base / "adapters" / task / "adapter_model.safetensors")
    with pytest.raises(LayoutError, match=r"retrieval/adapter_model.* is not of task retrieval, which"):
        fold(str(base), out)
    assert not out.exists()


def test_adapters_of_a_larger_model_are_refused(out: Path, tiny: Path) -> None:
    with pytest.raises(LayoutError, match=rf"{tiny}: .*lora_A\.code\.weight is \[32, 2048\] and must be \[32, 256\]"):
        fold(str(BASE), out, adapters=str(tiny))
    assert not out.exists()


RANKS = {r"layers.1.mlp.\w+": 8, "multi_vector_projector": 4}
ALPHAS = {"q_proj": 16, "up_proj|multi_vector_projector": 5}


def rank_and_alpha(name: str) -> tuple[int, float]:
    rank = 8 if "layers.1.mlp" in name else 4 if "projector" in name else 32
    return rank, 16 if "q_proj" in name else 5 if "up_proj" in name or "projector" in name else 32


@pytest.mark.parametrize("use_rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("layout", ["one file", "a folder a task"])
def test_ranks_and_alphas_by_pattern_are_folded_and_recorded(
    layout: str, use_rslora: bool, base: Path, out: Path, edit_json: Callable[..., None], edit_adapters: Edit
) -> None:
    def cut(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            rank, _ = rank_and_alpha(name)
            tensors[name] = (tensor[:rank] if ".lora_A." in name else tensor[:, :rank]).contiguous()

    edit_adapters(base, cut)
    changes = {"rank_pattern": RANKS, "alpha_pattern": ALPHAS, "use_rslora": use_rslora}
    edit_json(base / "adapters" / "adapter_config.json", **changes)
    lora = load_file(base / "adapters" / "adapter_model.safetensors")
    if layout == "a folder a task":
        split_adapters(base / "adapters")
    made = fold(str(base), out, ["code"], "float32")[0].folder
    plain, weights = weights_of(base), weights_of(made)
    default, by_tensor = (manifest_of(made)["scaling"][key] for key in ("default", "by_tensor"))
    assert default == pytest.approx(math.sqrt(32) if use_rslora else 1, rel=1e-15)
    n_others = 0
    for name, weight in plain.items():
        module = name.removesuffix(".weight").replace("model.layers", "model.language_model.layers")
        if (a := lora.get(f"base_model.model.{module}.lora_A.code.weight")) is None:
            continue
        b = lora[f"base_model.model.{module}.lora_B.code.weight"]
        rank, alpha = rank_and_alpha(name)
        scaling = alpha / (math.sqrt(rank) if use_rslora else rank)
        exact = weight.double() + scaling * (b.double() @ a.double())
        torch.testing.assert_close(weights[name].double(), exact, atol=1e-6, rtol=1e-6)
        assert by_tensor.get(name, default) == pytest.approx(scaling, rel=1e-15), name
        n_others += name in by_tensor
    assert n_others == len(by_tensor) > 0


def test_a_rank_that_is_not_that_of_its_pattern_names_the_tensor(
    base: Path, out: Path, edit_json: Callable[..., None]
) -> None:
    edit_json(base / "adapters" / "adapter_config.json", rank_pattern={"layers.2.mlp.up_proj": 8})
    name = r"base_model.model.model.language_model.layers.2.mlp.up_proj.lora_A.code.weight"
    with pytest.raises(LayoutError, match=rf"{name} is \[32, 256\] and must be \[8, 256\]"):
        fold(str(base), out)
    assert not out.exists()
