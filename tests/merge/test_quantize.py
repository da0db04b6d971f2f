"""Half the weights: the numbers of `fold --quantize`, recomputed here from the golden base without any code of ours."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN, Figure, Golden
from damage import edit_and_rehash, edit_json, flip, rehash, weights_of
from jina_v4_merge.errors import SourceError, WeightError
from jina_v4_merge.fold import fold
from jina_v4_merge.prompts import text_prefixes
from jina_v4_merge.quantize import KINDS, dequantize, quantize, round_to_fp8
from jina_v4_merge.reading.model import open_model
from jina_v4_merge.verify.canary import Entry, check_canary, largest_distance
from jina_v4_merge.verify.checks import verify
from jina_v4_merge.verify.reference import ReferenceModel, make_canary
from jina_v4_merge.verify.refold import compare
from jina_v4_serve.api.canary import QUANTIZED_BOUNDS
from jina_v4_serve.checkpoint import CANARY, read_checkpoint
from numpy.typing import NDArray
from safetensors.torch import load_file

BASE = GOLDEN / "checkpoint"
TASK = "code"
SHARD = "model-00002-of-00002.safetensors"
LAYER = "model.layers.1.mlp.up_proj.weight"
# All finite values of float8_e4m3fn, in order; the one that a tie goes to has an even code.
FP8 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
POSITIVE_FP8 = FP8[:127].numpy()  # (127,)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def made(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoints of two tasks, quantized; the folder of one."""
    out = tmp_path_factory.mktemp(kind)
    fold(str(BASE), out, ["retrieval", TASK], quantized=kind)
    return out / f"jina-embeddings-v4-{TASK}"


@pytest.fixture
def checkpoint(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(made, tmp_path / made.name))


def folded_sums() -> dict[str, torch.Tensor]:
    """The float64 sums of base and adapter by the names of the base's tensors; the golden scaling is 1."""
    base, adapters = weights_of(BASE), load_file(BASE / "adapters" / "adapter_model.safetensors")
    sums = {}
    for name, weight in base.items():
        module = name.removesuffix(".weight").replace("model.layers", "model.language_model.layers")
        a, b = (adapters.get(f"base_model.model.{module}.lora_{side}.{TASK}.weight") for side in "AB")
        if a is not None and b is not None and not name.startswith("multi_vector"):
            sums[name] = torch.addmm(weight.double(), b.double(), a.double())
    return sums


def nearest(numbers: NDArray[np.float64], kind: str) -> NDArray[np.float64]:
    """The nearest value of a type to each number, a tie to the even one: by search, for fp8."""
    if kind == "int8":
        return np.rint(numbers)
    right = np.searchsorted(POSITIVE_FP8, np.abs(numbers)).clip(1, 126)
    low, high = POSITIVE_FP8[right - 1], POSITIVE_FP8[right]
    below, above = np.abs(numbers) - low, high - np.abs(numbers)
    is_low = (below < above) | ((below == above) & (right % 2 == 1))
    return np.copysign(np.where(is_low, low, high), numbers)


def test_a_matrix_is_the_float64_sum_by_its_row_s_largest_rounded_once(kind: str, made: Path, figure: Figure) -> None:
    found, largest = weights_of(made), {"int8": 127, "fp8": 448}[kind]
    sums = folded_sums()
    assert len(sums) == 3 * 7
    n_values = n_differing = 0
    for name, exact in sums.items():
        values, scales = found[name], found[f"{name}_scale"]
        assert (values.dtype, scales.dtype, scales.shape) == (KINDS[kind], torch.float32, (len(exact), 1))
        numbers = exact.numpy()
        expected = (np.abs(numbers).max(1, keepdims=True) / largest).astype(np.float32)
        assert np.array_equal(scales.numpy(), expected), name
        rounded = nearest(numbers / expected.astype(np.float64), kind)
        n_values += rounded.size
        n_differing += int((values.double().numpy() != rounded).sum())
        assert (values.double().abs().amax(1) == largest).all(), "each row uses the whole range"
    figure(f"{kind}: {n_differing} of {n_values} values are not the float64 sum by its scale, rounded")
    # The sums of a fold are taken in blocks of rows; here and there one differs in its last bit of 53.
    assert n_differing == 0


def test_all_else_is_as_without_quantize(made: Path, folded: Callable[[str], Path]) -> None:
    plain, found = weights_of(folded("bfloat16") / made.name), weights_of(made)
    quantized = folded_sums().keys()
    assert found.keys() == plain.keys() | {f"{name}_scale" for name in quantized}
    for name in plain.keys() - quantized:
        assert torch.equal(found[name].view(torch.uint8), plain[name].view(torch.uint8)), name
    other = made.parent / "jina-embeddings-v4-retrieval"
    (common,) = made.glob("model-00001-*")
    assert common.stat().st_ino == (other / common.name).stat().st_ino
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json"):
        assert (made / name).read_bytes() == (folded("bfloat16") / made.name / name).read_bytes()


def test_config_json_says_it_in_the_words_of_compressed_tensors(kind: str, made: Path) -> None:
    config = json.loads((made / "config.json").read_text())
    said, number = config["quantization_config"], {"int8": "int", "fp8": "float"}[kind]
    (group,) = said["config_groups"].values()
    assert (said["quant_method"], said["format"]) == ("compressed-tensors", f"{number}-quantized")
    assert (group["weights"]["type"], group["weights"]["strategy"]) == (number, "channel")
    assert (group["input_activations"]["strategy"], group["input_activations"]["dynamic"]) == ("token", True)
    assert config["torch_dtype"] == "bfloat16"


def test_the_launcher_accepts_it_and_knows_how_much_is_quantized(kind: str, made: Path) -> None:
    found, tensors = read_checkpoint(made, TASK), weights_of(made)
    names = {name for name in tensors if f"{name}_scale" in tensors or name.endswith("_scale")}
    assert (found.precision, found.quantized) == (f"bfloat16+{kind}", kind)
    assert found.quantized_bytes == sum(tensors[name].nbytes for name in names)
    in_index = sum(tensor.nbytes for name, tensor in tensors.items() if not name.startswith("multi_vector"))
    assert found.weight_bytes == in_index


def test_numbers_beside_a_middle_go_to_their_own_side() -> None:
    """PyTorch rounds to float32 first, and takes half of these for the middle itself."""
    finite = FP8[FP8.isfinite()].unique()
    middles = (finite[1:] + finite[:-1]) / 2
    little = middles.abs() * 1e-12
    assert torch.equal(round_to_fp8(finite).double(), finite)
    assert torch.equal(round_to_fp8(middles - little).double(), finite[:-1])
    assert torch.equal(round_to_fp8(middles + little).double(), finite[1:])
    assert torch.equal(round_to_fp8(middles).double(), torch.from_numpy(nearest(middles.numpy(), "fp8")))
    assert not torch.equal((middles - little).to(torch.float8_e4m3fn).double(), finite[:-1])


def test_rows_of_zeros_and_of_the_smallest_numbers_stay_finite(kind: str) -> None:
    rows = torch.zeros(3, 4, dtype=torch.float64)
    rows[1], rows[2, 0] = 1e-44, 1e300
    values, scales = quantize(rows, kind)
    assert values[0].double().eq(0).all()
    assert dequantize(values, scales)[:2].isfinite().all()
    assert not scales[2].isfinite()


def test_a_weight_that_is_not_finite_is_refused(
    kind: str, base: Path, out: Path, edit_weights: Callable[..., None]
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[LAYER][3, 5] = math.nan

    edit_weights(base, spoil)
    with pytest.raises(WeightError, match=f"{LAYER} holds a value that is not finite"):
        fold(str(base), out, [TASK], quantized=kind)
    assert not out.exists()


def test_it_is_found_good_and_equal_to_a_second_folding(made: Path) -> None:
    (found,) = verify([made])
    (compared,) = compare(open_model(str(BASE)), [found])
    assert found.problems == []
    assert (compared.n_folded, compared.n_copied) == (22, 48)
    assert found.summary().endswith(f"91 tensors, bfloat16+{found.quantized}")


def forget_the_format(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config=None)
    rehash(folder)


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte flipped": (lambda c: flip(c / SHARD), f"{SHARD}: its sha256 is"),
    "a shard missing": (lambda c: (c / SHARD).unlink(), f"{SHARD}: is missing"),
    "scales missing": (
        lambda c: edit_and_rehash(c / SHARD, lambda tensors: tensors.pop(f"{LAYER}_scale")),
        f"disagree about {LAYER}_scale ({SHARD})",
    ),
    "scales of another dtype": (
        lambda c: edit_and_rehash(c / SHARD, lambda t: t.update({f"{LAYER}_scale": t[f"{LAYER}_scale"].bfloat16()})),
        f"the manifest says torch.float32, which these tensors are not: {LAYER}_scale ({SHARD})",
    ),
    "scales that are not finite": (
        lambda c: edit_and_rehash(c / SHARD, lambda t: t[f"{LAYER}_scale"].fill_(math.nan)),
        f"holds values that are not finite, in {LAYER}_scale",
    ),
    "a matrix that is not quantized": (
        lambda c: edit_and_rehash(c / SHARD, lambda t: t.update({LAYER: t[LAYER].bfloat16()})),
        f"which these tensors are not: {LAYER} ({SHARD})",
    ),
    "a config that does not say so": (forget_the_format, "config.json: quantization_config is None and must be"),
    "a manifest of another kind": (
        lambda c: edit_json(c / "manifest.json", quantized="int4"),
        "no manifest of `jina-v4-merge fold`: ValueError('quantized int4')",
    ),
    "a canary of another checkpoint": (
        lambda c: (c / CANARY).write_text('{"manifest_sha256": "00"}'),
        f"{CANARY}: belongs to another checkpoint",
    ),
}


@pytest.mark.parametrize(("spoil", "said"), SPOILT.values(), ids=SPOILT)
def test_what_is_wrong_is_named(spoil: Callable[[Path], object], said: str, checkpoint: Path) -> None:
    spoil(checkpoint)
    (found,) = verify([checkpoint])
    assert any(said in problem for problem in found.problems), found.problems


def test_fp8_that_is_not_a_number_is_found(tmp_path: Path) -> None:
    fold(str(BASE), tmp_path, [TASK], quantized="fp8")
    folder = tmp_path / f"jina-embeddings-v4-{TASK}"
    edit_and_rehash(folder / SHARD, lambda t: t[LAYER].view(torch.uint8)[7].fill_(0x7F))
    (found,) = verify([folder])
    assert found.problems == [f"{folder / SHARD}: holds values that are not finite, in {LAYER}"]


def test_a_second_folding_finds_another_scale(checkpoint: Path) -> None:
    edit_and_rehash(checkpoint / SHARD, lambda tensors: tensors[f"{LAYER}_scale"].mul_(1 + 2**-20))
    (found,) = verify([checkpoint])
    assert found.problems == []
    compare(open_model(str(BASE)), [found])
    assert [f"{LAYER} is not what folding" in problem for problem in found.problems] == [True]


def test_a_canary_is_computed_from_what_is_stored_and_guards_one_fold(kind: str, checkpoint: Path) -> None:
    (found,) = verify([checkpoint])
    said = make_canary(found, open_model(str(BASE)))
    assert "computed in float32; unfolded the same within " in said
    check_canary(checkpoint)
    assert json.loads((checkpoint / CANARY).read_text())["computed"]["dtype"] == "float32"
    edit_and_rehash(checkpoint / SHARD, lambda tensors: tensors[f"{LAYER}_scale"].mul_(2))
    with pytest.raises(SourceError, match="belongs to another checkpoint or an older fold"):
        check_canary(checkpoint)


def test_the_stored_weights_are_near_the_published_vectors_and_far_from_another_task_s(
    kind: str, made: Path, golden: Golden, figure: Figure
) -> None:
    wanted, prompts = [("query", text) for text in golden.texts], text_prefixes(TASK)
    exact = [
        Entry({}, golden.rows[f"{TASK}/query/{i}/dense"], golden.rows[f"{TASK}/query/{i}/multi"])
        for i in range(len(wanted))
    ]
    found = ReferenceModel(made, "float32", quantized=True).embed(wanted, prompts)
    other = made.parent / "jina-embeddings-v4-retrieval"
    wrong = ReferenceModel(other, "float32", quantized=True).embed(wanted, prompts)
    distance, to_another = largest_distance(exact, found), largest_distance(found, wrong)
    figure(f"{kind} weights: 1 - cosine {distance:.1e}; another task's {to_another:.2f}")
    assert distance < QUANTIZED_BOUNDS[kind] / 10
    assert to_another > 3 * QUANTIZED_BOUNDS[kind]


@pytest.mark.proof
def test_the_command_folds_and_verifies_it(out: Path, run: Callable[..., Any]) -> None:
    done = run("fold", "--base", BASE, "--out", out, "--task", TASK, "--quantize", "int8", "--dtype", "float16")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].endswith("GB, float16+int8")
    folder = out / f"jina-embeddings-v4-{TASK}"
    done = run("verify", folder, "--against", BASE)
    assert done.returncode == 1
    assert "fold the task without --quantize to compare" in done.stderr
