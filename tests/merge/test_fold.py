"""What a fold writes: every tensor, recomputed here from the golden base without any code of ours."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, TASKS, Figure
from damage import files_of, split_adapters, weights_of
from jina_v4_merge.fold import fold
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.proof

BASE = GOLDEN / "checkpoint"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def lora(task: str, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The float64 A and B of a base tensor; the golden scaling is 1."""
    adapters = load_file(BASE / "adapters" / "adapter_model.safetensors")
    module = name.removesuffix(".weight").replace("model.layers", "model.language_model.layers")
    a, b = (adapters.get(f"base_model.model.{module}.lora_{side}.{task}.weight") for side in "AB")
    return None if a is None or b is None else (a.double(), b.double())


def ulps_apart(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """How many representable numbers lie between each two of a dtype, the farther one included."""

    def place(tensor: torch.Tensor) -> torch.Tensor:
        bits = tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16).long()
        sign_bit = 1 << (8 * tensor.element_size() - 1)
        return torch.where(bits < 0, -(bits + sign_bit), bits)  # 0 and -0 are both 0

    return (place(one) - place(other)).abs()


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_tensor_is_the_float64_sum_rounded_once_and_all_others_are_untouched(
    dtype: str, folded: Callable[[str], Path], figure: Figure
) -> None:
    base = weights_of(BASE)
    n_elements, n_differing = 0, 0
    for task in TASKS:
        made = weights_of(folded(dtype) / f"jina-embeddings-v4-{task}")
        assert made.keys() == base.keys()
        n_folded = 0
        for name, weight in base.items():
            adapter = lora(task, name)
            assert made[name].dtype == DTYPES[dtype]
            if adapter is None:
                untouched = weight.to(DTYPES[dtype])
                assert torch.equal(made[name].view(torch.uint8), untouched.view(torch.uint8)), name
                continue
            n_folded += 1
            assert not torch.equal(made[name], weight.to(DTYPES[dtype])), name
            a, b = adapter
            exact = weight.double() + b @ a
            ulps = ulps_apart(made[name], exact.to(DTYPES[dtype]))
            assert (ulps <= 1).all(), f"{name} is {ulps.max()} ulps off"
            n_elements += ulps.numel()
            n_differing += int((ulps > 0).sum())
        assert n_folded == 3 * 7 + 1, "seven layers in each of three blocks, and the projector"
    figure(
        f"{dtype}: {n_differing} of {n_elements} folded elements are not the float64 sum rounded, none by over one ulp"
    )


def test_the_tasks_have_projectors_of_their_own_outside_the_index(folded: Callable[[str], Path]) -> None:
    folders = [folded("float32") / f"jina-embeddings-v4-{task}" for task in TASKS]
    projectors = [load_file(folder / "multi_vector_projector.safetensors") for folder in folders]
    for folder, projector in zip(folders, projectors, strict=True):
        assert {name: tuple(tensor.shape) for name, tensor in projector.items()} == {
            "multi_vector_projector.weight": (128, 256),
            "multi_vector_projector.bias": (128,),
        }
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert not any("projector" in name for name in index["weight_map"])
    first, second, third = (projector["multi_vector_projector.weight"] for projector in projectors)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_the_index_says_where_each_tensor_lies(folded: Callable[[str], Path]) -> None:
    folder = folded("bfloat16") / "jina-embeddings-v4-code"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    lying = {name: path.name for path in folder.glob("model-*") for name in load_file(path)}
    assert index["weight_map"] == lying
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for path in folder.glob("model-*") for tensor in load_file(path).values()
    )


def test_shards_are_no_larger_than_asked_and_the_common_ones_come_first(out: Path) -> None:
    limit = 1_000_000
    made = fold(str(BASE), out, max_shard_bytes=limit)
    names = [sorted(path.name for path in checkpoint.folder.glob("model-*")) for checkpoint in made]
    assert names[0] == names[1] == names[2]
    n_shards = len(names[0])
    assert n_shards > 4
    assert names[0] == [f"model-{i:05}-of-{n_shards:05}.safetensors" for i in range(1, n_shards + 1)]
    common = [len({(checkpoint.folder / name).stat().st_ino for checkpoint in made}) == 1 for name in names[0]]
    assert common == sorted(common, reverse=True)
    assert 0 < sum(common) < n_shards
    for checkpoint in made:
        for name in names[0]:
            assert sum(tensor.nbytes for tensor in load_file(checkpoint.folder / name).values()) <= limit
    assert weights_of(made[0].folder).keys() == weights_of(BASE).keys()


def test_common_shards_are_one_file_with_three_names(folded: Callable[[str], Path]) -> None:
    folders = [folded("bfloat16") / f"jina-embeddings-v4-{task}" for task in TASKS]
    first, second = (
        {(folder / name).stat().st_ino for folder in folders}
        for name in sorted(path.name for path in folders[0].glob("model-*.safetensors"))
    )
    assert (len(first), len(second)) == (1, 3)


def test_without_hard_links_the_shards_are_copied(
    out: Path, monkeypatch: pytest.MonkeyPatch, folded: Callable[[str], Path]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    fold(str(BASE), out)
    assert all(path.stat().st_nlink == 1 for path in out.rglob("*.safetensors"))
    assert files_of(out) == files_of(folded("bfloat16"))


def test_the_same_inputs_give_the_same_bytes(out: Path, folded: Callable[[str], Path]) -> None:
    fold(str(BASE), out, dtype="float32")
    assert files_of(out) == files_of(folded("float32"))


@pytest.mark.parametrize("block_bytes", [1, 5000], ids=["a row", "some rows"])
def test_the_blocks_in_which_rows_are_read_do_not_matter(
    block_bytes: int, out: Path, monkeypatch: pytest.MonkeyPatch, folded: Callable[[str], Path]
) -> None:
    monkeypatch.setattr("jina_v4_merge.reading.weights._BLOCK_BYTES", block_bytes)
    made = weights_of(fold(str(BASE), out, ["code"], "float32")[0].folder)
    expected = weights_of(folded("float32") / "jina-embeddings-v4-code")
    # Not the same bytes: a product of one row is summed in another order than one of many.
    torch.testing.assert_close(made, expected, rtol=1e-6, atol=1e-7)


def test_a_task_by_itself_is_the_same_as_among_others(out: Path, folded: Callable[[str], Path]) -> None:
    made = fold(str(BASE), out, ["text-matching"])
    assert [path.name for path in out.iterdir()] == ["jina-embeddings-v4-text-matching"]
    assert files_of(made[0].folder) == files_of(folded("bfloat16") / "jina-embeddings-v4-text-matching")


def newer_names(base: Path, edit_weights: Callable[..., None]) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            newer = name.replace("visual.", "model.visual.", 1) if name.startswith("visual.") else name
            newer = newer.replace("model.", "model.language_model.", 1) if name.startswith("model.") else newer
            tensors[newer] = tensors.pop(name)

    edit_weights(base, rename)


def one_file(base: Path, edit_weights: Callable[..., None]) -> None:
    tensors = weights_of(base)
    for path in base.glob("model*"):
        path.unlink()
    save_file(tensors, base / "model.safetensors")


def a_folder_a_task(base: Path, edit_weights: Callable[..., None]) -> None:
    split_adapters(base / "adapters")
    shutil.copy(base / "adapters" / "code" / "adapter_config.json", base / "adapters")  # as some have it too


@pytest.mark.parametrize("rearrange", [newer_names, one_file, a_folder_a_task])
def test_a_base_in_another_layout_gives_the_same_checkpoints(
    rearrange: Callable[..., None],
    base: Path,
    out: Path,
    edit_weights: Callable[..., None],
    folded: Callable[[str], Path],
) -> None:
    rearrange(base, edit_weights)
    fold(str(base), out)
    made, expected = files_of(out), files_of(folded("bfloat16"))
    assert made.keys() == expected.keys()
    differing = {name for name in made if made[name] != expected[name]}
    assert {Path(name).name for name in differing} == {"manifest.json"}, "which names the files it was made from"


def test_the_scaling_is_that_of_the_adapter_config(base: Path, out: Path, edit_json: Callable[..., None]) -> None:
    edit_json(base / "adapters" / "adapter_config.json", lora_alpha=8)
    made = fold(str(base), out, ["code"], "float32")[0].folder
    name = "model.layers.1.mlp.down_proj.weight"
    adapter = lora("code", name)
    assert adapter is not None
    a, b = adapter
    exact = weights_of(BASE)[name].double() + b @ a / 4
    torch.testing.assert_close(weights_of(made)[name].double(), exact, atol=1e-7, rtol=1e-7)
    assert json.loads((made / "manifest.json").read_text())["scaling"] == 0.25
