"""Exported adapters: PEFT with one of them on the stock base computes what the folded checkpoint does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, TASKS, Figure, Golden
from jina_v4_merge.errors import OutputError, SourceError, WeightError
from jina_v4_merge.export.adapters import export_adapters, peft_config
from jina_v4_merge.fold import fold
from jina_v4_merge.reading.model import open_model
from near import largest_difference
from oracle import _projector, _vectors
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

BASE = GOLDEN / "checkpoint"
BOUND = 1e-5
UP = "model.language_model.layers.1.mlp.up_proj"


def load_base(folder: Path) -> Any:
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    return model.eval()


@pytest.fixture(scope="module")
def adapted(one_export: Path) -> PeftModel:
    """The base with all three adapters, loaded by PEFT."""
    first, *others = TASKS
    model = PeftModel.from_pretrained(load_base(one_export / "base"), one_export / first, adapter_name=first)
    for task in others:
        report = model.load_adapter(one_export / task, adapter_name=task)
        assert [name for name in report.missing_keys if f".{task}." in name] == []
        assert report.unexpected_keys == []
    return model.eval()


@pytest.mark.proof
@pytest.mark.parametrize("task", TASKS)
def test_peft_computes_the_published_vectors(
    task: str, adapted: PeftModel, one_export: Path, golden: Golden, figure: Figure
) -> None:
    adapted.set_adapter(task)
    weights = load_file(one_export / task / "multi_vector_projector.safetensors")
    projector = _projector(weights["multi_vector_projector.weight"], weights["multi_vector_projector.bias"])
    found = _vectors(
        one_export / "base", adapted.base_model.model, projector, task, golden.texts, golden.images[:1], "query", None
    )
    names = [f"query/{i}" for i in range(len(golden.texts))]
    expected = [golden.rows[f"{task}/{name}/{kind}"] for kind in ("dense", "multi") for name in (*names, "image/0")]
    vectors = [*found.text_dense, *found.image_dense, *found.text_multi, *found.image_multi]
    difference = largest_difference(vectors, expected)
    figure(f"largest difference to the published vectors {difference:.1e}")
    assert difference <= BOUND


@pytest.mark.proof
def test_peft_merges_it_to_the_folded_weights(one_export: Path, folded: Callable[[str], Path], figure: Figure) -> None:
    model = PeftModel.from_pretrained(load_base(one_export / "base"), one_export / "code").merge_and_unload()
    expected = load_base(folded("float32") / "jina-embeddings-v4-code").state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    difference = largest_difference((found[name] for name in expected), expected.values())
    figure(f"largest difference of any weight {difference:.1e}")
    assert difference <= 1e-6


def test_only_the_language_model_is_adapted_and_every_layer_of_it(one_export: Path, adapted: PeftModel) -> None:
    layers = {name.rpartition(".lora_A")[0] for name, _ in adapted.named_modules() if name.endswith("lora_A")}
    assert len(layers) == 3 * 7
    assert all(".language_model.layers." in name for name in layers)
    names = load_file(one_export / "code" / "adapter_model.safetensors").keys()
    assert len(names) == 2 * 3 * 7
    assert f"base_model.model.{UP}.lora_A.weight" in names


def test_the_projector_is_the_folded_one(one_export: Path, folded: Callable[[str], Path]) -> None:
    for task in TASKS:
        expected = load_file(folded("float32") / f"jina-embeddings-v4-{task}" / "multi_vector_projector.safetensors")
        found = load_file(one_export / task / "multi_vector_projector.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_ranks_and_alphas_of_single_modules_are_carried_over(
    base: Path,
    tmp_path: Path,
    edit_json: Callable[..., None],
    edit_adapters: Callable[[Path, Callable[[dict[str, torch.Tensor]], object]], None],
    figure: Figure,
) -> None:
    edit_json(
        base / "adapters" / "adapter_config.json",
        rank_pattern={r"layers\.1\.mlp\.up_proj": 8},
        alpha_pattern={"q_proj": 16, r"layers\.1\.mlp\.up_proj": 4},
        use_rslora=True,
    )

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        for task in TASKS:
            a, b = (f"base_model.model.{UP}.lora_{side}.{task}.weight" for side in "AB")
            tensors[a], tensors[b] = tensors[a][:8].clone(), tensors[b][:, :8].clone()

    edit_adapters(base, cut)
    config = peft_config(open_model(str(base)), "code")
    assert config["rank_pattern"] == {UP: 8}
    q_projs = {f"model.language_model.layers.{i}.self_attn.q_proj": 16.0 for i in range(3)}
    assert config["alpha_pattern"] == pytest.approx({UP: 4.0} | q_projs)
    export_adapters(str(base), tmp_path / "exported", ["code"], with_base=True)
    (made,) = fold(str(base), tmp_path / "folded", ["code"], "float32")
    model = PeftModel.from_pretrained(load_base(tmp_path / "exported" / "base"), tmp_path / "exported" / "code")
    found, expected = model.merge_and_unload().state_dict(), load_base(made.folder).state_dict()
    difference = largest_difference((found[name] for name in expected), expected.values())
    figure(f"largest difference of any weight with rank and alpha patterns {difference:.1e}")
    assert difference <= 1e-6


def test_the_base_is_stock_and_its_weights_are_untouched(one_export: Path) -> None:
    config = json.loads((one_export / "base" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    index = json.loads((one_export / "base" / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {name: load_file(one_export / "base" / file)[name] for name, file in index.items()}
    original = {name: tensor for path in BASE.glob("model*.safetensors") for name, tensor in load_file(path).items()}
    assert original.keys() - tensors.keys() == {"multi_vector_projector.weight", "multi_vector_projector.bias"}
    assert all(torch.equal(tensor, original[name]) for name, tensor in tensors.items())


def test_what_is_there_already_is_left_alone(one_export: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "code").mkdir(parents=True)
    with pytest.raises(OutputError, match="code exists already"):
        export_adapters(str(BASE), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["code"]


def test_a_failed_export_leaves_nothing(base: Path, tmp_path: Path) -> None:
    shutil.rmtree(base / "adapters")
    with pytest.raises(SourceError, match=r"adapters/adapter_model.safetensors: no such file"):
        export_adapters(str(base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["adapter", "base"])
def test_a_value_that_is_not_finite_is_refused(
    part: str,
    base: Path,
    out: Path,
    edit_adapters: Callable[..., None],
    edit_weights: Callable[..., None],
) -> None:
    adapter = "base_model.model.model.language_model.layers.2.mlp.up_proj.lora_B.retrieval.weight"
    edit, name = (edit_adapters, adapter) if part == "adapter" else (edit_weights, "model.norm.weight")
    edit(base, lambda tensors: tensors[name].view(-1)[7].fill_(torch.nan))
    with pytest.raises(WeightError, match=f"{name} holds a value that is not finite; the file is damaged"):
        export_adapters(str(base), out, with_base=True)
    assert not out.exists()


@pytest.mark.proof
def test_the_command_writes_one_folder_a_task(tmp_path: Path, run: Callable[..., Any]) -> None:
    done = run("export-adapters", "--base", BASE, "--out", tmp_path / "out", "--task", "code")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'out' / 'code'}: 0.00 GB\ndone in ")
    files = sorted(path.name for path in (tmp_path / "out" / "code").iterdir())
    assert files == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
        "multi_vector_projector.safetensors",
    ]


def test_a_task_that_is_named_twice_is_exported_once(tmp_path: Path, run: Callable[..., Any]) -> None:
    done = run("export-adapters", "--base", BASE, "--out", tmp_path / "out", "--task", "code", "--task", "code")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("GB") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["code"]
