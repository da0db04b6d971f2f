"""`verify` names every file and tensor that is wrong with a checkpoint, by itself and beside its base."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, TASKS, Figure
from damage import edit, edit_json, flip, rehash, truncate
from jina_v4_merge.errors import SourceError
from jina_v4_merge.reading.model import open_model
from jina_v4_merge.verify.canary import CANARY_NAME
from jina_v4_merge.verify.checks import find_checkpoints, verify
from jina_v4_merge.verify.refold import compare
from safetensors.torch import load_file, save_file

BASE = GOLDEN / "checkpoint"
FIRST_SHARD, LAST_SHARD = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
PROJECTOR = "multi_vector_projector.safetensors"
LAYER = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture
def checkpoint(folded: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a folded checkpoint that a test may change."""
    return Path(shutil.copytree(folded("bfloat16") / "jina-embeddings-v4-code", tmp_path / "jina-embeddings-v4-code"))


def problems_of(folder: Path, base: Path | None = None) -> list[str]:
    checkpoints = verify([folder])
    if base is not None:
        compare(open_model(str(base)), [each for each in checkpoints if each.tensors])
    return checkpoints[0].problems


def one_weight_file(folder: Path) -> None:
    tensors = {**load_file(folder / FIRST_SHARD), **load_file(folder / LAST_SHARD)}
    save_file(tensors, folder / "model.safetensors")
    for name in (FIRST_SHARD, LAST_SHARD, INDEX):
        (folder / name).unlink()


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def put_nan(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name].view(-1)[-1] = float("nan")


@dataclass(frozen=True)
class Spoilt:
    """What is done to a checkpoint, and what must be said of it."""

    do: Callable[[Path], object]
    said: str
    rehash: bool = False


SPOILT = {
    "a shard is missing": Spoilt(lambda c: (c / FIRST_SHARD).unlink(), f"{FIRST_SHARD}: is missing"),
    "a shard is a link to itself": Spoilt(lambda c: link_to_itself(c / LAST_SHARD), f"{LAST_SHARD}: is no file, or a"),
    "a shard is cut short": Spoilt(lambda c: truncate(c / LAST_SHARD, 2), f"{LAST_SHARD}: broken or cut short"),
    "a byte of a shard flipped": Spoilt(lambda c: flip(c / LAST_SHARD), f"{LAST_SHARD}: its sha256 is"),
    "a byte of a header flipped": Spoilt(lambda c: flip(c / LAST_SHARD, 9), f"{LAST_SHARD}"),
    "a byte of the tokenizer flipped": Spoilt(lambda c: flip(c / "tokenizer.json", 5000), "tokenizer.json: its sha256"),
    "a byte too many": Spoilt(
        lambda c: (c / "vocab.json").write_bytes((c / "vocab.json").read_bytes() + b"\n"),
        "vocab.json: has 5167 bytes; the manifest says 5166",
    ),
    "a file too many": Spoilt(
        lambda c: shutil.copy(c / PROJECTOR, c / "model.safetensors"), "model.safetensors: does not belong"
    ),
    "a folder too many": Spoilt(lambda c: (c / "adapters").mkdir(), "adapters: does not belong"),
    "no tokenizer": Spoilt(
        lambda c: (c / "tokenizer.json").unlink(), "tokenizer.json: the manifest does not list it", True
    ),
    "the manifest is no JSON": Spoilt(lambda c: truncate(c / "manifest.json", 9), "manifest.json: cannot be read"),
    "the manifest is another program's": Spoilt(
        lambda c: (c / "manifest.json").write_text('{"version": 3}'),
        "manifest.json: no manifest of `jina-v4-merge fold`",
    ),
    "the manifest names a file elsewhere": Spoilt(
        lambda c: edit_json(c / "manifest.json", files={"../secret": {"sha256": "", "size": 0}}), "file name ../secret"
    ),
    "the manifest has other prompts": Spoilt(
        lambda c: edit_json(c / "manifest.json", prompts={"query": ""}), "manifest.json: prompts is {'query': ''}"
    ),
    "not a number": Spoilt(
        lambda c: edit(c / LAST_SHARD, lambda tensors: put_nan(tensors, LAYER)),
        f"{LAST_SHARD}: holds values that are not finite, in {LAYER}",
        True,
    ),
    "not a number in the projector": Spoilt(
        lambda c: edit(c / PROJECTOR, lambda tensors: put_nan(tensors, "multi_vector_projector.bias")),
        f"{PROJECTOR}: holds values that are not finite, in multi_vector_projector.bias",
        True,
    ),
    "a tensor is missing": Spoilt(
        lambda c: edit(c / LAST_SHARD, lambda tensors: tensors.pop(LAYER)),
        f"disagree about {LAYER} ({LAST_SHARD})",
        True,
    ),
    "a tensor too many": Spoilt(
        lambda c: edit(c / PROJECTOR, lambda tensors: tensors.update(more=torch.ones(2))), "1 unknown: more", True
    ),
    "a tensor under another name": Spoilt(
        lambda c: edit(c / PROJECTOR, lambda tensors: tensors.update(bias=tensors.pop("multi_vector_projector.bias"))),
        f"{PROJECTOR}: multi_vector_projector.bias is missing",
        True,
    ),
    "a projector without rows": Spoilt(
        lambda c: edit(c / PROJECTOR, lambda tensors: tensors.update({k: v[:0].clone() for k, v in tensors.items()})),
        f"{PROJECTOR}: multi_vector_projector.bias is missing or empty",
        True,
    ),
    "a tensor of another shape": Spoilt(
        lambda c: edit(c / LAST_SHARD, lambda tensors: tensors.update({LAYER: tensors[LAYER][:-1].clone()})),
        f"{LAYER} is [511, 256] and must be [512, 256]",
        True,
    ),
    "a tensor of another dtype": Spoilt(
        lambda c: edit(c / FIRST_SHARD, lambda tensors: tensors.update({NORM: tensors[NORM].half()})),
        f"the manifest says torch.bfloat16, which these tensors are not: {NORM} ({FIRST_SHARD})",
        True,
    ),
    "the index names a file that is not there": Spoilt(
        lambda c: (c / INDEX).write_text((c / INDEX).read_text().replace(FIRST_SHARD, "model-3.safetensors")),
        "model-3.safetensors is not there, which should hold",
        True,
    ),
    "the index has another size": Spoilt(
        lambda c: edit_json(c / INDEX, metadata={"total_size": 7}), f"{INDEX}: metadata is {{'total_size': 7}}", True
    ),
    "the config has another width": Spoilt(
        lambda c: (c / "config.json").write_text(
            (c / "config.json").read_text().replace('"intermediate_size": 512', '"intermediate_size": 513')
        ),
        "model.layers.0.mlp.down_proj.weight is [256, 512] and must be [256, 513]",
        True,
    ),
    "the config has another dtype": Spoilt(
        lambda c: edit_json(c / "config.json", torch_dtype="float32"),
        "config.json: torch_dtype is 'float32' and must be 'bfloat16'",
        True,
    ),
    "the config names other code": Spoilt(
        lambda c: edit_json(c / "config.json", architectures=["X"]), "config.json: architectures is ['X']", True
    ),
    "one weight file in place of the shards and their index": Spoilt(
        one_weight_file, "model.safetensors: does not belong to the checkpoint"
    ),
    "the canary is of another checkpoint": Spoilt(
        lambda c: (c / CANARY_NAME).write_text('{"manifest_sha256": "00"}'), f"{CANARY_NAME}: belongs to another"
    ),
    "the canary is no JSON": Spoilt(lambda c: (c / CANARY_NAME).write_text("{"), f"{CANARY_NAME}: cannot be read"),
}


@pytest.mark.proof
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_good_checkpoints_are_found_good_and_equal_to_a_second_folding(
    dtype: str, folded: Callable[[str], Path], figure: Figure
) -> None:
    checkpoints = verify(find_checkpoints(folded(dtype)))
    compared = compare(open_model(str(BASE)), checkpoints)
    assert [each.manifest["task"] for each in checkpoints] == sorted(TASKS)
    assert [each.problems for each in checkpoints] == [[], [], []]
    assert [(each.n_folded, each.n_copied) for each in compared] == [(22, 48)] * 3
    figure(f"{dtype}: 3 x 22 folded and 48 copied tensors equal bit by bit what a second folding gives")


@pytest.mark.parametrize("spoilt", SPOILT.values(), ids=SPOILT)
def test_what_is_wrong_is_named(spoilt: Spoilt, checkpoint: Path) -> None:
    spoilt.do(checkpoint)
    if spoilt.rehash:
        rehash(checkpoint)
    problems = problems_of(checkpoint)
    assert [problem for problem in problems if spoilt.said in problem], problems


def test_all_that_is_wrong_is_named_at_once(checkpoint: Path) -> None:
    flip(checkpoint / FIRST_SHARD)
    flip(checkpoint / "vocab.json", 100)
    (checkpoint / "notes.txt").write_text("")
    problems = " ".join(problems_of(checkpoint))
    assert all(name in problems for name in (FIRST_SHARD, "vocab.json", "notes.txt"))
    assert LAST_SHARD not in problems


def test_a_file_that_is_linked_is_read_once_and_named_in_every_checkpoint(
    folded: Callable[[str], Path], tmp_path: Path
) -> None:
    for task in TASKS:
        shutil.copytree(
            folded("bfloat16") / f"jina-embeddings-v4-{task}",
            tmp_path / f"jina-embeddings-v4-{task}",
            copy_function=os.link,
        )
    flipped = tmp_path / "jina-embeddings-v4-code" / FIRST_SHARD
    content = flipped.read_bytes()
    with flipped.open("r+b") as file:  # the inode itself, which the fixture's folder has as well
        file.seek(-1000, os.SEEK_END)
        file.write(bytes([content[-1000] ^ 1]))
    try:
        checkpoints = verify(find_checkpoints(tmp_path))
    finally:
        with flipped.open("r+b") as file:
            file.write(content)
    assert [len(each.problems) for each in checkpoints] == [1, 1, 1]
    assert all(str(each.folder / FIRST_SHARD) in each.problems[0] for each in checkpoints)


def test_hidden_files_do_not_matter(checkpoint: Path) -> None:
    (checkpoint / ".cache").mkdir()
    (checkpoint / ".gitattributes").write_text("")
    assert problems_of(checkpoint) == []


def test_a_copied_folder_is_as_good(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "elsewhere")
    assert problems_of(tmp_path / "elsewhere") == []


def test_two_folders_that_were_exchanged_are_named(
    checkpoint: Path, folded: Callable[[str], Path], run: Callable[..., Any]
) -> None:
    other = checkpoint.with_name("jina-embeddings-v4-retrieval")
    checkpoint.rename(other)
    shutil.copytree(folded("bfloat16") / "jina-embeddings-v4-retrieval", checkpoint)
    done = run("verify", checkpoint.parent)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"error: {checkpoint}: holds retrieval, as manifest.json says, and is named after code",
        f"error: {other}: holds code, as manifest.json says, and is named after retrieval",
    ]


@pytest.mark.parametrize("name", ["copy", "barretrieval", "retrieval-2", "jina-embeddings-v4-code"])
def test_a_folder_may_have_a_name_that_ends_in_no_other_task(name: str, checkpoint: Path) -> None:
    assert problems_of(checkpoint.rename(checkpoint.with_name(name))) == []


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"neither manifest.json nor a folder jina-embeddings-v4-TASK is there"):
        find_checkpoints(tmp_path)
    with pytest.raises(SourceError, match="No such file"):
        find_checkpoints(tmp_path / "nothing")


def test_a_folder_that_holds_half_a_checkpoint_is_not_passed_over(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()
    assert find_checkpoints(checkpoint.parent) == [checkpoint]
    assert problems_of(checkpoint) == [f"{checkpoint / 'manifest.json'}: no such file"]


@pytest.mark.parametrize(
    ("file", "tensor", "n_differing"),
    [(LAST_SHARD, LAYER, 1), (FIRST_SHARD, NORM, 1), (PROJECTOR, "multi_vector_projector.weight", 1)],
    ids=["folded", "copied", "projector"],
)
def test_a_value_that_folding_would_not_give_is_found(
    file: str, tensor: str, n_differing: int, checkpoint: Path
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[tensor].view(torch.int16).view(-1)[7] ^= 1  # one unit in the last place

    edit(checkpoint / file, change)
    rehash(checkpoint)
    assert problems_of(checkpoint) == []
    assert problems_of(checkpoint, BASE) == [
        f"{checkpoint / file}: {tensor} is not what folding {BASE} gives ({n_differing} of 70 tensors differ)"
    ]


def test_another_tasks_weights_are_found(checkpoint: Path, folded: Callable[[str], Path]) -> None:
    shutil.copy(folded("bfloat16") / "jina-embeddings-v4-retrieval" / LAST_SHARD, checkpoint / LAST_SHARD)
    rehash(checkpoint)
    (problem,) = problems_of(checkpoint, BASE)
    assert "model.layers.0.self_attn.q_proj.weight is not what folding" in problem
    assert "(21 of 70 tensors differ)" in problem


def test_a_small_file_that_folding_would_not_write_is_found(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    rehash(checkpoint)
    assert problems_of(checkpoint, BASE) == [f"{checkpoint / 'chat_template.jinja'}: is not what folding {BASE} gives"]


@pytest.mark.parametrize("value", [2.0, {"default": 1.0, "by_tensor": {}}], ids=["a number", "by tensor"])
def test_a_manifest_that_says_another_scaling_is_found(value: object, checkpoint: Path) -> None:
    edit_json(checkpoint / "manifest.json", scaling=value)
    assert problems_of(checkpoint) == []
    assert problems_of(checkpoint, BASE) == [
        f"{checkpoint / 'manifest.json'}: scaling is {value!r}; folding {BASE} gives 1.0"
    ]


def test_a_base_of_another_size_is_told_apart(checkpoint: Path, tiny: Path) -> None:
    assert "is of another size" in problems_of(checkpoint, tiny)[0]


@pytest.mark.proof
def test_the_command_says_what_it_checked(folded: Callable[[str], Path], run: Callable[..., Any]) -> None:
    done = run("verify", folded("bfloat16"), "--base", BASE)
    assert done.returncode == 0, done.stderr
    first, *others, last = done.stdout.splitlines()
    folder = folded("bfloat16") / "jina-embeddings-v4-code"
    sizes = "14 files, 0.01 GB, 70 tensors, bfloat16"
    assert first == f"{folder}: {sizes}; 22 folded and 48 copied tensors as folding {BASE} gives"
    assert len(others) == 2
    assert last.startswith("done in ")


@pytest.mark.proof
def test_the_command_fails_with_a_line_for_each_problem(checkpoint: Path, run: Callable[..., Any]) -> None:
    flip(checkpoint / FIRST_SHARD)
    (checkpoint / "notes.txt").write_text("")
    done = run("verify", checkpoint.parent)
    assert done.returncode == 1
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["error:", "error:"]
    assert "jina-embeddings-v4-code: 14 files" not in done.stdout
