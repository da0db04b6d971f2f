"""The canary's vectors are the published ones, belong to one fold, and tell what is wrong from rounding."""

import base64
import hashlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN, TASKS, Figure, Golden
from jina_v4_merge.errors import ConfigError, SourceError, WeightError
from jina_v4_merge.prompts import text_prefixes
from jina_v4_merge.reading.layout import is_adapted
from jina_v4_merge.reading.model import open_model
from jina_v4_merge.verify import picture, reference
from jina_v4_merge.verify.canary import (
    CANARY_NAME,
    LONG_TEXT,
    SHORT_TEXTS,
    Entry,
    check_canary,
    largest_distance,
    texts,
)
from jina_v4_merge.verify.checks import verify
from jina_v4_merge.verify.picture import HEIGHT, SCALED, WIDTH, draw
from jina_v4_merge.verify.reference import ReferenceModel, affordable_dtype, make_canary
from jina_v4_serve.api.canary import BOUNDS, IMAGE_BOUNDS, read_canary
from jina_v4_serve.checkpoint import read_checkpoint
from near import largest_difference
from PIL import Image

pytestmark = pytest.mark.proof

BASE = GOLDEN / "checkpoint"
SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def made(folded: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints in bfloat16 with a canary, by task."""
    out = tmp_path_factory.mktemp("made")
    folders = {}
    for task in TASKS:
        folders[task] = out / f"jina-embeddings-v4-{task}"
        shutil.copytree(folded("bfloat16") / folders[task].name, folders[task])
        (checkpoint,) = verify([folders[task]])
        make_canary(checkpoint)
    return folders


@pytest.fixture
def checkpoint(made: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of one of them that a test may change."""
    return Path(shutil.copytree(made["code"], tmp_path / "checkpoint"))


def entries(folder: Path) -> list[Entry]:
    canary = read_canary(folder)
    assert canary is not None
    return [
        Entry({"prompt_name": each.body["prompt_name"], **each.body["input"]}, each.dense, each.multivector)
        for each in canary.entries
        if each.kind == "text"
    ]


def difference_to(golden: Golden, names: list[str], entries: list[Entry]) -> float:
    """Return the largest difference of the vectors of some entries to golden rows."""
    expected = [golden.rows[f"{name}/{kind}"] for name in names for kind in ("dense", "multi")]
    return largest_difference([rows for entry in entries for rows in (entry.dense, entry.multivector)], expected)


@pytest.mark.parametrize("task", TASKS)
def test_the_vectors_are_those_of_the_published_code(
    task: str, golden: Golden, folded: Callable[[str], Path], figure: Figure
) -> None:
    model = ReferenceModel(folded("float32") / f"jina-embeddings-v4-{task}", "float32")
    wanted = [(name, text) for name in ("query", "passage") for text in golden.texts]
    found = model.embed(wanted, text_prefixes(task))
    names = [f"{task}/{name}/{i % len(golden.texts)}" for i, (name, _) in enumerate(wanted)]
    difference = difference_to(golden, names, found)
    figure(f"largest difference {difference:.1e}")
    assert difference <= 1e-5


@pytest.mark.parametrize("task", TASKS)
def test_the_vectors_of_images_are_those_of_the_published_code(
    task: str, golden: Golden, folded: Callable[[str], Path], figure: Figure
) -> None:
    model = ReferenceModel(folded("float32") / f"jina-embeddings-v4-{task}", "float32")
    found = []
    for path, size in zip(golden.images, ((168, 252), (476, 644), (896, 644), (392, 28)), strict=True):
        with Image.open(path) as image:
            found.append(model.embed_image(np.array(image.convert("RGB")), size))
    difference = difference_to(golden, [f"{task}/image/{i}" for i in range(len(found))], found)
    figure(f"largest difference {difference:.1e}")
    assert difference <= 1e-5


def test_its_image_is_a_small_file_of_the_pixels_that_were_embedded(made: dict[str, Path]) -> None:
    for folder in made.values():
        stored = json.loads((folder / CANARY_NAME).read_text())["image"]
        content = base64.b64decode(stored["png"])
        assert len(content) < 4096
        with Image.open(io.BytesIO(content)) as image:
            assert (image.format, image.mode) == ("PNG", "RGB")
            assert np.array_equal(np.array(image), draw())
        height, width = SCALED
        assert stored["n_tokens"] == height * width // 28**2 + 11
        assert height * width <= stored["max_pixels"] < HEIGHT * WIDTH


def test_it_has_every_prompt_and_a_long_text(made: dict[str, Path]) -> None:
    n_short = len(SHORT_TEXTS)
    for task, folder in made.items():
        found = [(entry.item["prompt_name"], entry.item["text"]) for entry in entries(folder)]
        assert found == texts(text_prefixes(task))
        names = ["query"] if task == "text-matching" else ["query", "passage"]
        assert [name for name, _ in found] == [name for name in names for _ in range(n_short)] + ["query"]
        assert found[-1][1] == LONG_TEXT
        assert len(entries(folder)[-1].multivector) > 200


def test_it_belongs_to_one_fold(made: dict[str, Path], checkpoint: Path) -> None:
    content = json.loads((checkpoint / CANARY_NAME).read_text())
    assert content["manifest_sha256"] == hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()
    assert content["computed"]["dtype"] == "float32"
    check_canary(checkpoint)
    shutil.copy(made["retrieval"] / CANARY_NAME, checkpoint / CANARY_NAME)
    with pytest.raises(SourceError, match="belongs to another checkpoint or an older fold"):
        check_canary(checkpoint)


def test_it_does_not_change_what_the_checkpoint_is(checkpoint: Path) -> None:
    assert [each.problems for each in verify([checkpoint])] == [[]]
    assert read_checkpoint(checkpoint, "code").task == "code"
    assert [path.name for path in checkpoint.iterdir() if path.name.startswith(".")] == []


def test_a_damaged_vector_is_found(checkpoint: Path) -> None:
    content = json.loads((checkpoint / CANARY_NAME).read_text())
    content["entries"][0]["dense"] = content["entries"][0]["dense"][:-8] + "AAAAAAA="
    (checkpoint / CANARY_NAME).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="broken: "):
        check_canary(checkpoint)


def test_a_stale_one_is_replaced(checkpoint: Path, made: dict[str, Path]) -> None:
    shutil.copy(made["retrieval"] / CANARY_NAME, checkpoint / CANARY_NAME)
    (good,) = verify([checkpoint], expect_canary=False)
    assert good.problems == []
    make_canary(good)
    check_canary(checkpoint)


def test_folded_and_unfolded_must_agree(checkpoint: Path, made: dict[str, Path], figure: Figure) -> None:
    model = open_model(str(BASE))
    (good,) = verify([checkpoint])
    said = make_canary(good, model)
    figure(said)
    assert "computed in float32; unfolded the same within " in said
    (checkpoint / CANARY_NAME).unlink()
    shutil.copy(made["retrieval"] / SHARD, checkpoint / SHARD)
    with pytest.raises(WeightError, match=r"with the adapters of .* unfolded the same items embed otherwise"):
        make_canary(good, model)
    assert not (checkpoint / CANARY_NAME).exists()


def test_the_bounds_lie_far_from_rounding_and_far_from_wrong_adapters(made: dict[str, Path], figure: Figure) -> None:
    prompts = {"query": "Query: "}
    wanted = [("query", text) for text in SHORT_TEXTS]
    right = {task: ReferenceModel(folder, "float32").embed(wanted, prompts) for task, folder in made.items()}
    for dtype in ("bfloat16", "float16"):
        rounded = largest_distance(right["code"], ReferenceModel(made["code"], dtype).embed(wanted, prompts))
        figure(f"1 - cosine by rounding, {dtype}: {rounded:.1e}; allowed {BOUNDS[dtype]:.0e}")
        assert rounded < BOUNDS[dtype] / 10
    model = open_model(str(BASE))
    bare = ReferenceModel(made["code"], "float32")
    for name in filter(is_adapted, model.tensors):
        a, b, _ = model.lora("code", name)
        bare.unfold(name, model.tensors[name].read(), a, b, 0.0)
    missing = bare.embed(wanted, prompts)
    for task in TASKS:
        without = largest_distance(right[task], missing)
        others = min(largest_distance(right[task], right[other]) for other in TASKS if other != task)
        figure(f"1 - cosine without the adapter of {task}: {without:.2f}, with another task's: {others:.2f} or more")
        assert min(without, others) > 10 * max(BOUNDS.values())


def test_the_image_tells_a_wrong_vision_tower_or_picture_from_rounding(
    folded: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    checkpoint = folded("float32") / "jina-embeddings-v4-code"
    model = ReferenceModel(checkpoint, "float32")
    right = model.embed_image()

    def distance(other: Entry) -> float:
        return largest_distance([right], [other])

    for dtype in ("bfloat16", "float16"):
        rounded = distance(ReferenceModel(checkpoint, dtype).embed_image())
        figure(f"1 - cosine of the image by rounding, {dtype}: {rounded:.1e}; allowed {IMAGE_BOUNDS[dtype]:.0e}")
        assert rounded < IMAGE_BOUNDS[dtype] / 10
    vision = model._model.model.visual
    blocks = range(len(vision.blocks))
    found = {"blue for red": distance(model.embed_image(np.ascontiguousarray(draw()[..., ::-1])))}
    for name, full in (("full attention in windows", []), ("windows made full", list(blocks))):
        with monkeypatch.context() as changed:
            changed.setattr(vision, "fullatt_block_indexes", full)
            found[name] = distance(model.embed_image())
    for i in blocks:
        for part in ("attn.proj", "mlp.down_proj"):
            weight = vision.blocks[i].get_submodule(part).weight
            with monkeypatch.context() as changed:
                changed.setattr(weight, "data", torch.zeros_like(weight))
                found[f"{part} of block {i} zeroed"] = distance(model.embed_image())
    interpolate = picture.F.interpolate
    with monkeypatch.context() as changed:
        changed.setattr(picture.F, "interpolate", lambda image, size, **_: interpolate(image, size))  # nearest
        found["nearest instead of bicubic"] = distance(model.embed_image())
    with monkeypatch.context() as changed:
        changed.setitem(model._pixel_settings, "image_mean", [0.5] * 3)
        changed.setitem(model._pixel_settings, "image_std", [0.5] * 3)
        found["other mean and deviation"] = distance(model.embed_image())
    for name, value in found.items():
        figure(f"1 - cosine of the image with {name}: {value:.2f}")
    assert min(found.values()) > 2 * IMAGE_BOUNDS["bfloat16"]


def test_float32_is_taken_where_memory_allows(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkpoint,) = verify([made["code"]])
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(reference, "_MEMORY", meminfo)
    n_kib = 2 * sum(tensor.n_bytes for tensor in checkpoint.tensors.values()) // 1024 + 2**20
    for free_kib, dtype in ((n_kib + 1, "float32"), (n_kib - 1, "bfloat16")):
        meminfo.write_text(f"MemTotal: 99999999 kB\nMemAvailable:   {free_kib} kB\n")
        assert affordable_dtype(checkpoint.tensors, "bfloat16") == dtype


def test_without_transformers_it_says_what_to_install(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"install jina-v4-merge\[canary\]"):
        ReferenceModel(made["code"], "float32")


def test_the_command_makes_none_for_a_damaged_checkpoint(checkpoint: Path, run: Callable[..., Any]) -> None:
    before = (checkpoint / CANARY_NAME).read_bytes()
    (checkpoint / "vocab.json").write_text("{}")
    done = run("verify", checkpoint, "--canary")
    assert done.returncode == 1
    assert "vocab.json: has 2 bytes" in done.stderr
    assert (checkpoint / CANARY_NAME).read_bytes() == before
