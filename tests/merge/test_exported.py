"""`verify` of an export: its manifests, all that can be wrong with base and adapters, and a canary for each task."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN, TASKS, Figure
from damage import edit_and_rehash, edit_json, flip
from jina_v4_merge.export.adapters import export_adapters
from jina_v4_merge.prompts import text_prefixes
from jina_v4_merge.verify.canary import CANARY_NAME, Entry, largest_distance
from jina_v4_merge.verify.checks import find_checkpoints, verify
from jina_v4_merge.verify.reference import ReferenceModel, make_canary
from jina_v4_serve.api.canary import read_canary

pytestmark = pytest.mark.proof

BASE = GOLDEN / "checkpoint"
SHARD = "model-00001-of-00001.safetensors"
WEIGHTS = "adapter_model.safetensors"
PROJECTOR = "multi_vector_projector.safetensors"
LAYER = "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_B.weight"


def problems_of(exported: Path) -> list[str]:
    return [problem for each in verify(find_checkpoints(exported)) for problem in each.problems]


def test_each_folder_says_what_it_is_and_what_it_was_made_from(one_export: Path) -> None:
    found = {folder.name: json.loads((folder / "manifest.json").read_text()) for folder in one_export.iterdir()}
    assert found.keys() == {"base", *TASKS}
    for name, manifest in found.items():
        assert (manifest["task"], manifest["part"]) == (name, "base" if name == "base" else "adapter")
        files = {path.name: path.read_bytes() for path in (one_export / name).iterdir() if path.name != "manifest.json"}
        assert manifest["files"] == {
            name: {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
            for name, content in files.items()
        }
        assert manifest["sources"]["base"] == found["base"]["sources"]["base"]
        assert ("adapters" in manifest["sources"]) == (name != "base")
    source = (BASE / "model-00001-of-00002.safetensors").read_bytes()
    digest = found["code"]["sources"]["base"]["files"]["model-00001-of-00002.safetensors"]
    assert digest == {"sha256": hashlib.sha256(source).hexdigest(), "size": len(source)}


def test_a_good_export_is_found_good(one_export: Path) -> None:
    found = verify(find_checkpoints(one_export))
    assert [each.folder.name for each in found] == ["base", "code", "retrieval", "text-matching"]
    assert [each.problems for each in found] == [[], [], [], []]
    assert [len(each.tensors) for each in found] == [68, 44, 44, 44]


def test_adapters_alone_are_found_good(tmp_path: Path) -> None:
    export_adapters(str(BASE), tmp_path / "exported")
    assert problems_of(tmp_path / "exported") == []


@dataclass(frozen=True)
class Spoilt:
    """What is done to an export, and what must be said of it."""

    do: Callable[[Path], object]
    said: str


SPOILT = {
    "a byte of the base flipped": Spoilt(lambda e: flip(e / "base" / SHARD), f"base/{SHARD}: its sha256 is"),
    "a byte of an adapter flipped": Spoilt(lambda e: flip(e / "code" / WEIGHTS), f"code/{WEIGHTS}: its sha256 is"),
    "a projector cut short": Spoilt(
        lambda e: (e / "code" / PROJECTOR).write_bytes((e / "code" / PROJECTOR).read_bytes()[:-4]),
        f"{PROJECTOR}: broken or cut short",
    ),
    "no projector": Spoilt(lambda e: (e / "code" / PROJECTOR).unlink(), f"{PROJECTOR}: is missing"),
    "a layer without tensors": Spoilt(
        lambda e: edit_and_rehash(e / "code" / WEIGHTS, lambda tensors: tensors.pop(LAYER)), f"1 missing: {LAYER}"
    ),
    "a tensor of no layer": Spoilt(
        lambda e: edit_and_rehash(
            e / "code" / WEIGHTS, lambda tensors: tensors.update(other=torch.zeros(2).bfloat16())
        ),
        f"1 unknown: other ({WEIGHTS})",
    ),
    "a tensor of another shape": Spoilt(
        lambda e: edit_and_rehash(
            e / "code" / WEIGHTS, lambda tensors: tensors.update({LAYER: tensors[LAYER][:-1].clone()})
        ),
        f"{LAYER} is [511, 32] and must be [512, 32]",
    ),
    "half a projector": Spoilt(
        lambda e: edit_and_rehash(e / "code" / PROJECTOR, lambda tensors: tensors.pop("multi_vector_projector.bias")),
        "multi_vector_projector.bias is missing or empty",
    ),
    "a projector without rows": Spoilt(
        lambda e: edit_and_rehash(
            e / "code" / PROJECTOR,
            lambda tensors: tensors.update({name: tensor[:0].clone() for name, tensor in tensors.items()}),
        ),
        "multi_vector_projector.bias is missing or empty",
    ),
    "an adapter of another dtype": Spoilt(
        lambda e: edit_and_rehash(e / "code" / WEIGHTS, lambda tensors: tensors.update({LAYER: tensors[LAYER].half()})),
        "these tensors must be torch.bfloat16 and are not",
    ),
    "a value that is none": Spoilt(
        lambda e: edit_and_rehash(e / "code" / WEIGHTS, lambda tensors: tensors[LAYER].view(-1)[0].fill_(torch.nan)),
        f"{WEIGHTS}: holds values that are not finite, in {LAYER}",
    ),
    "another scaling": Spoilt(
        lambda e: edit_json(e / "code/manifest.json", scaling=2.0), "manifest.json: scaling is 2.0"
    ),
    "other prompts": Spoilt(lambda e: edit_json(e / "code/manifest.json", prompts={}), "manifest.json: prompts is {}"),
    "a part that there is not": Spoilt(lambda e: edit_json(e / "code/manifest.json", part="half"), "no manifest of"),
    "an adapter that says it is the base": Spoilt(
        lambda e: edit_json(e / "code/manifest.json", part="base"), "no manifest of"
    ),
    "an older export": Spoilt(lambda e: (e / "code" / "manifest.json").unlink(), "manifest.json: no such file"),
    "a file too many": Spoilt(lambda e: (e / "base" / "notes.txt").write_text(""), "notes.txt: does not belong"),
    "a projector in the base": Spoilt(
        lambda e: shutil.copy(e / "code" / PROJECTOR, e / "base" / PROJECTOR), f"base/{PROJECTOR}: does not belong"
    ),
}


@pytest.mark.parametrize("spoilt", SPOILT.values(), ids=SPOILT)
def test_what_is_wrong_is_named(spoilt: Spoilt, exported: Path) -> None:
    spoilt.do(exported)
    problems = problems_of(exported)
    assert [problem for problem in problems if spoilt.said in problem], problems


def test_an_adapter_of_another_base_than_the_one_beside_it_is_named(
    exported: Path, base: Path, tmp_path: Path, edit_weights: Callable[..., None], run: Callable[..., Any]
) -> None:
    edit_weights(base, lambda tensors: tensors["model.norm.weight"].mul_(2))
    export_adapters(str(base), tmp_path / "other", ["code"], with_base=True)
    shutil.rmtree(exported / "code")
    shutil.copytree(tmp_path / "other" / "code", exported / "code")
    done = run("verify", exported, "--canary")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {exported / 'code'}: was made for another base than {exported / 'base'}")
    assert done.stderr.count("error: ") == 1
    assert not (exported / "code" / CANARY_NAME).exists()


def test_the_canaries_are_the_folded_checkpoints_own(
    exported: Path, folded: Callable[[str], Path], figure: Figure
) -> None:
    distances = []
    for each in verify(find_checkpoints(exported)):
        if each.part == "base":
            continue
        assert (
            make_canary(each)
            == f"canary of {4 if each.folder.name == 'text-matching' else 7} texts and an image, computed in float32"
        )
        canary = read_canary(each.folder)
        assert canary is not None
        found = [Entry(entry.body, entry.dense, entry.multivector) for entry in canary.entries]
        model = ReferenceModel(folded("float32") / f"jina-embeddings-v4-{each.folder.name}", "float32")
        wanted = [(entry.body["prompt_name"], entry.body["input"]["text"]) for entry in canary.entries[:-1]]
        expected = [*model.embed(wanted, text_prefixes(each.folder.name)), model.embed_image()]
        distances.append(largest_distance(found, expected))
    figure(f"1 - cosine of canaries of three adapters and of folded checkpoints {max(distances):.1e}")
    assert len(distances) == 3
    assert np.max(distances) <= 1e-6
    assert problems_of(exported) == []
    shutil.copy(exported / "code" / CANARY_NAME, exported / "retrieval" / CANARY_NAME)
    assert "belongs to another checkpoint" in problems_of(exported)[0]


def test_the_command_checks_an_export(exported: Path, run: Callable[..., Any]) -> None:
    done = run("verify", exported)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"{exported / 'base'}: 11 files, 0.01 GB, 68 tensors, bfloat16"
    assert lines[1] == f"{exported / 'code'}: 3 files, 0.00 GB, 44 tensors, bfloat16"
    done = run("verify", exported, "--base", BASE)
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"error: {exported / 'base'} is part of an export, which --base compares with nothing"
    )
