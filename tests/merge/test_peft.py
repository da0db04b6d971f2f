"""Adapters that PEFT makes: those of plain LoRA fold to what PEFT merges, all others are refused.

Some ways to initialise an adapter change the base as well. Such an adapter fits only the base that PEFT has changed.
"""

import copy
import json
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import near
import peft
import pytest
import torch
from conftest import GOLDEN, TASKS, Figure
from jina_v4_merge.reading.layout import published_name
from oracle import _load_base
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.long,
    *[
        pytest.mark.filterwarnings(f"ignore:{message}")
        for message in (
            "`init_lora_weights` is '(eva|corda)' but",
            "lora with eva initialization used with low_cpu_mem_usage=False",
            "(PiSSA|OLoRA) changes the base weights of the model",
        )
    ],
]

BASE = GOLDEN / "checkpoint"
BOUND = 1e-6
TARGETS = json.loads((BASE / "adapters" / "adapter_config.json").read_text())["target_modules"]  # the published ones
RANK = 8
PLAIN = [[True, False, "gaussian"], ["orthogonal", "eva", "mica"]]  # as many at once as there are tasks
CHANGING = ["pissa", "olora", "corda", "lora_ga"]  # and loftq, which needs bitsandbytes

Run = Callable[..., subprocess.CompletedProcess[str]]
Tensors = dict[str, torch.Tensor]


def network() -> torch.nn.Module:
    """The golden base in float32, with its projector, under the names that adapters have for its layers."""
    model, projector = _load_base(BASE)
    holder = torch.nn.Module()
    holder.model, holder.multi_vector_projector = model.model, projector
    return holder


def new_adapter(init: object, **options: Any) -> peft.PeftModel:
    """The base with an adapter that nobody has trained yet."""
    base = network()
    torch.manual_seed(1)
    for name, layer in base.named_modules():
        if re.fullmatch(TARGETS, name) and "visual" not in name and isinstance(layer, torch.nn.Linear):
            if init == "lora_ga":  # as its preprocessing leaves a layer
                layer._peft_loraga_grad = torch.randn_like(layer.weight)
            if init == "corda":
                u, s, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
                layer.eigens = SimpleNamespace(U_WC=u[:, :RANK], S_WC=s[:RANK].clone(), V_WC=vh[:RANK].T)
    if init == "lora_ga":
        options["lora_ga_config"] = peft.tuners.lora.config.LoraGAConfig()
    options = {"r": RANK, "lora_alpha": 2 * RANK, **options}
    config = peft.LoraConfig(target_modules=TARGETS, exclude_modules=".*visual.*", init_lora_weights=init, **options)
    model = peft.get_peft_model(base, config)
    if init == "eva":  # which ends with a rank of its own for each layer
        peft.initialize_lora_eva_weights(
            model,
            eva_state_dict={
                name: torch.linalg.qr(torch.randn(layer.in_features, 4 + i % 7))[0].T.contiguous()
                for i, (name, layer) in enumerate(adapted(model).items())
            },
        )
    return model


def adapted(model: peft.PeftModel) -> dict[str, LoraLayer]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def train(model: peft.PeftModel) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter += 0.01 * torch.randn_like(parameter)


def merged(model: peft.PeftModel) -> Tensors:
    """All weights as PEFT merges them, by published name."""
    state = copy.deepcopy(model).merge_and_unload().state_dict()
    return {published_name(name): tensor for name, tensor in state.items()}


def fold(run: Run, tmp_path: Path, tasks: Sequence[str], base: Path = BASE) -> subprocess.CompletedProcess[str]:
    """Fold a base with the adapters in `adapters`, a folder a task."""
    options = [option for task in tasks for option in ("--task", task)]
    adapters = ("--adapters", tmp_path / "adapters", *options)
    return run("fold", "--base", base, *adapters, "--dtype", "float32", "--out", tmp_path / "out")


def folded(tmp_path: Path, task: str) -> Tensors:
    files = (tmp_path / "out" / f"jina-embeddings-v4-{task}").glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def largest_difference(found: Tensors, expected: Tensors) -> float:
    assert found.keys() == expected.keys()
    return near.largest_difference((found[name] for name in expected), expected.values())


@pytest.mark.parametrize("inits", PLAIN, ids=str)
def test_plain_adapters_fold_to_what_peft_merges(inits: list[object], run: Run, tmp_path: Path, figure: Figure) -> None:
    expected = {}
    for task, init in zip(TASKS, inits, strict=True):
        model = new_adapter(init)
        train(model)
        model.save_pretrained(tmp_path / "adapters" / task)
        expected[task] = merged(model)
    done = fold(run, tmp_path, TASKS)
    assert done.returncode == 0, done.stderr
    differences = {task: largest_difference(folded(tmp_path, task), expected[task]) for task in TASKS}
    figure(f"largest difference of any weight {max(differences.values()):.1e}")
    assert max(differences.values()) <= BOUND, differences


@pytest.mark.parametrize("init", CHANGING)
def test_an_adapter_whose_base_peft_changed_is_refused(init: str, run: Run, tmp_path: Path, figure: Figure) -> None:
    published = network().state_dict()
    model = new_adapter(init)
    train(model)
    model.save_pretrained(tmp_path / "adapters" / "code")
    expected, off = merged(model), 0.0
    for name, layer in adapted(model).items():
        weight = published[name.removeprefix("base_model.model.") + ".weight"]
        right = expected[published_name(name.removeprefix("base_model.model.") + ".weight")]
        wrong = weight + layer.get_delta_weight("default").detach()
        off = max(off, float((wrong - right).abs().max() / right.abs().max()))
    figure(f"a fold into the published base would be off by {off:.2f} of a tensor's largest weight")
    assert off > 0.1
    done = fold(run, tmp_path, ["code"])
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"error: {tmp_path / 'adapters' / 'code' / 'adapter_config.json'}: adapter config sets init_"
    )
    assert f"sets init_lora_weights={init!r}; only plain LoRA can be folded" in line
    assert "path_initial_model_for_weight_conversion" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("init", "use_rslora"), [("pissa", False), ("olora", True)], ids=["pissa", "olora, rslora"])
def test_an_adapter_that_peft_converted_folds_to_what_peft_merges(
    init: str, use_rslora: bool, run: Run, tmp_path: Path, figure: Figure, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_adapter(init, use_rslora=use_rslora)
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("initial")
    train(model)
    expected = merged(model)
    model.save_pretrained("adapters/code", path_initial_model_for_weight_conversion="initial")
    config = json.loads((tmp_path / "adapters" / "code" / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["r"]) == (True, 2 * RANK)
    done = fold(run, tmp_path, ["code"])
    assert done.returncode == 0, done.stderr
    difference = largest_difference(folded(tmp_path, "code"), expected)
    figure(f"largest difference of any weight {difference:.1e}")
    assert difference <= BOUND


def test_an_adapter_folds_into_the_base_that_peft_changed(
    run: Run,
    base: Path,
    tmp_path: Path,
    figure: Figure,
    edit_json: Callable[..., None],
    edit_weights: Callable[[Path, Callable[[Tensors], object]], None],
) -> None:
    model = new_adapter("corda")
    weights = {
        published_name(name.removeprefix("base_model.model.")) + ".weight": layer.get_base_layer().weight.detach()
        for name, layer in adapted(model).items()
    }
    edit_weights(base, lambda tensors: tensors.update(weights))
    train(model)
    model.save_pretrained(tmp_path / "adapters" / "code")
    edit_json(tmp_path / "adapters" / "code" / "adapter_config.json", init_lora_weights=True)
    done = fold(run, tmp_path, ["code"], base)
    assert done.returncode == 0, done.stderr
    difference = largest_difference(folded(tmp_path, "code"), merged(model))
    figure(f"largest difference of any weight {difference:.1e}")
    assert difference <= BOUND
