"""The launcher's quick look at a checkpoint finds what would be loaded wrongly, without reading any weights."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import GOLDEN, TASKS
from damage import change_json, edit, edit_json, rehash
from jina_v4_merge.fold import fold
from jina_v4_serve.checkpoint import read_checkpoint
from jina_v4_serve.doctor.checkpoints import check_alike, check_checkpoints
from jina_v4_serve.errors import CheckpointError
from jina_v4_serve.launch.revision import precision, revision

TASK = "retrieval"
SHARD = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
PROJECTOR = "multi_vector_projector.safetensors"
LAYER = "model.layers.1.mlp.up_proj.weight"
SCALE = f"{LAYER}_scale"


@pytest.fixture
def checkpoint(folded: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a whole checkpoint, to be damaged."""
    return Path(shutil.copytree(folded("float32") / f"jina-embeddings-v4-{TASK}", tmp_path / "checkpoint"))


def overwrite(path: Path, position: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(content)


def replace(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights beside it": (
        lambda c: shutil.copy(c / PROJECTOR, c / "adapter_model.safetensors"),
        "adapter_model.safetensors does not belong to this checkpoint and might be loaded",
    ),
    "weights of another kind beside it": (
        lambda c: (c / "pytorch_model.bin").write_bytes(b""),
        "pytorch_model.bin does not belong to this checkpoint",
    ),
    "settings that go before its own": (
        lambda c: (c / "processor_config.json").write_text("{}"),
        "processor_config.json does not belong to this checkpoint and might be loaded",
    ),
    "chat templates beside it": (
        lambda c: (c / "additional_chat_templates").mkdir(),
        "additional_chat_templates does not belong to this checkpoint",
    ),
    "a header that is no JSON": (lambda c: overwrite(c / SHARD, 8, b"XX"), f"{SHARD} is broken"),
    "a header longer than the file": (lambda c: overwrite(c / SHARD, 0, b"\xff" * 7), f"{SHARD} is broken"),
    "a projector that is no safetensors": (
        lambda c: overwrite(c / PROJECTOR, 0, b"\0" * 200),
        f"{PROJECTOR} is broken",
    ),
    "a tensor under another name": (
        lambda c: edit(c / SHARD, lambda tensors: tensors.update(other=tensors.pop(LAYER))),
        f"{INDEX} and {SHARD} disagree about {LAYER}",
    ),
    "a tensor of another dtype": (
        lambda c: edit(c / SHARD, lambda tensors: tensors.update({LAYER: tensors[LAYER].half()})),
        f"{SHARD}: {LAYER} is F16, the manifest says float32",
    ),
    "a smaller tensor": (
        lambda c: edit(c / SHARD, lambda tensors: tensors.update({LAYER: tensors[LAYER][:-1].clone()})),
        "the shards hold ",
    ),
    "an index that is none": (
        lambda c: (c / INDEX).write_text('{"metadata": {}}'),
        f"{INDEX} is not an index of weights",
    ),
    "an index that names another file": (
        lambda c: replace(c / INDEX, f'"{LAYER}": "{SHARD}"', f'"{LAYER}": "{PROJECTOR}"'),
        f"disagree about {LAYER}",
    ),
    "a dtype that is none": (
        lambda c: replace(c / "manifest.json", '"dtype": "float32"', '"dtype": "int8"'),
        "says dtype int8; it must be one of bfloat16, float16, float32",
    ),
    "another format": (
        lambda c: replace(c / "manifest.json", '"format": 1', '"format": 2'),
        "was written in format 2 of checkpoints, and this version of jina-v4-serve reads format 1",
    ),
    "a canary of another checkpoint": (
        lambda c: (c / "canary.json").write_text('{"manifest_sha256": "0"}'),
        "canary.json was made for another checkpoint or an older fold",
    ),
}


@pytest.mark.parametrize(("spoil", "said"), SPOILT.values(), ids=SPOILT)
def test_what_would_be_loaded_wrongly_is_named(spoil: Callable[[Path], object], said: str, checkpoint: Path) -> None:
    spoil(checkpoint)
    if "int8" not in said:
        rehash(checkpoint)
    with pytest.raises(CheckpointError, match=re.escape(said)):
        read_checkpoint(checkpoint, TASK)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("task", TASKS)
def test_what_fold_writes_is_accepted(dtype: str, task: str, folded: Callable[[str], Path]) -> None:
    assert read_checkpoint(folded(dtype) / f"jina-embeddings-v4-{task}", task).dtype == dtype


def test_the_digest_is_of_the_files_and_not_of_who_folded_them_and_when(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    before = read_checkpoint(checkpoint, TASK).digest
    manifest["tool"] = {"name": "another"}
    manifest["files"] = dict(reversed(manifest["files"].items()))
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert read_checkpoint(checkpoint, TASK).digest == before
    manifest["files"][SHARD]["sha256"] = "0" * 64
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert read_checkpoint(checkpoint, TASK).digest != before


def test_no_value_of_a_weight_is_read(checkpoint: Path) -> None:
    shard = checkpoint / SHARD
    header = int.from_bytes(shard.read_bytes()[:8], "little")
    size = shard.stat().st_size
    with shard.open("r+b") as file:  # a hole where the values were
        file.truncate(8 + header)
        file.truncate(size)
    assert read_checkpoint(checkpoint, TASK).task == TASK


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    """A checkpoint with int8 matrices, to be damaged."""
    (made,) = fold(str(GOLDEN / "checkpoint"), tmp_path / "folded", [TASK], quantized="int8")
    return made.folder


SPOILT_INT8: dict[str, tuple[Callable[[Path], object], str]] = {
    "a manifest that does not say so": (
        lambda c: change_json(c / "manifest.json", lambda content: content.pop("quantized")),
        "_proj.weight is I8, the manifest says bfloat16",
    ),
    "a manifest of another kind": (
        lambda c: replace(c / "manifest.json", '"quantized": "int8"', '"quantized": "fp8"'),
        "_proj.weight is I8, the manifest says fp8",
    ),
    "a kind that is none": (
        lambda c: replace(c / "manifest.json", '"quantized": "int8"', '"quantized": "int4"'),
        "says quantized int4; it must be one of int8, fp8",
    ),
    "a config that does not say so": (
        lambda c: change_json(c / "config.json", lambda content: content.pop("quantization_config")),
        "has weights of format None, the manifest says int8",
    ),
    "a config of another kind": (
        lambda c: replace(c / "config.json", "int-quantized", "float-quantized"),
        "has weights of format float-quantized, the manifest says int8",
    ),
    "scales in half": (
        lambda c: edit(c / SHARD, lambda tensors: tensors.update({SCALE: tensors[SCALE].half()})),
        f"{SHARD}: {SCALE} is F16, the manifest says float32",
    ),
    "a matrix without its scales": (
        lambda c: edit(c / SHARD, lambda tensors: tensors.pop(SCALE)),
        f"{SHARD}: {LAYER} is I8, the manifest says bfloat16",
    ),
}


@pytest.mark.parametrize(("spoil", "said"), SPOILT_INT8.values(), ids=SPOILT_INT8)
def test_what_is_wrong_with_quantized_weights_is_named(
    spoil: Callable[[Path], object], said: str, quantized: Path
) -> None:
    spoil(quantized)
    rehash(quantized)
    with pytest.raises(CheckpointError, match=re.escape(said)):
        read_checkpoint(quantized, TASK)


def test_a_plain_checkpoint_that_says_it_is_quantized_is_refused(checkpoint: Path) -> None:
    edit_json(checkpoint / "manifest.json", quantized="int8")
    with pytest.raises(CheckpointError, match="the manifest says quantized int8, the weights do not"):
        read_checkpoint(checkpoint, TASK)


def test_the_doctor_and_the_vectors_tell_it_from_a_plain_one(quantized: Path, folded: Callable[[str], Path]) -> None:
    found = [each.found for each in check_checkpoints([quantized], "auto", ())]
    assert found[0].startswith(f"{TASK}: complete, bfloat16+int8, ")
    plain = read_checkpoint(folded("bfloat16") / f"jina-embeddings-v4-{TASK}", TASK)
    revisions = {
        revision(each, precision({"dtype": "bfloat16"}, each.quantized), None)
        for each in (plain, read_checkpoint(quantized, TASK))
    }
    assert len(revisions) == 2
    assert [each.split("-")[1] for each in sorted(revisions, key=len)] == ["bfloat16", "bfloat16+int8"]
    code = read_checkpoint(folded("bfloat16") / "jina-embeddings-v4-code", "code")
    differing = check_alike([code, read_checkpoint(quantized, TASK)])
    assert differing.found == f"precision differs: code bfloat16, {TASK} bfloat16+int8"
