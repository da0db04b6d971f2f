"""What the canary of a checkpoint makes a server do, with an engine that gives what a test says."""

import asyncio
import base64
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jina_v4_merge.prompts import IMAGE_PROMPT, text_prefixes
from jina_v4_serve.api import canary, start_check
from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.api.request import EmbedRequest, Limits
from jina_v4_serve.api.vectors import Floats, NonFiniteError, Vectors
from jina_v4_serve.checkpoint import Prompts
from jina_v4_serve.errors import EngineError
from prometheus_client import REGISTRY

PROMPTS = {"retrieval": Prompts(text_prefixes("retrieval"), IMAGE_PROMPT)}
LIMITS = Limits(("retrieval",), PROMPTS, frozenset(), 512, 3136, 602112, 256, 2048)
TEXTS = {"query": ["one", "two"], "passage": ["one"]}
PNG = "aW1hZ2U"
LABELS = {"task": "retrieval"}


def rows(prefix: str, text: str) -> tuple[Floats, Floats]:
    """Some vectors for a text: a dense one, and a multi-vector of seven rows."""
    random = np.random.default_rng(len(prefix) * 1000 + len(text) + ord(text[-1]))
    values = random.standard_normal((9, 128), dtype=np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    dense = np.concatenate([values[0], values[1]]) / np.sqrt(2, dtype=np.float32)
    return dense[None], values[2:]


def encoded(values: Floats) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with a canary in it, and nothing else."""
    entries = []
    for name, texts in TEXTS.items():
        for text in texts:
            dense, multivector = rows({"query": "Query: ", "passage": "Passage: "}[name], text)
            entry = {"prompt_name": name, "text": text, "n_tokens": len(multivector)}
            entries.append(entry | {"dense": encoded(dense), "multivector": encoded(multivector)})
    dense, multivector = rows("", PNG)
    image = {"png": PNG, "max_pixels": 50176, "dense": encoded(dense), "multivector": encoded(multivector)}
    content = {"format": 1, "manifest_sha256": "", "computed": {"dtype": "float32"}, "entries": entries, "image": image}
    (tmp_path / "canary.json").write_text(json.dumps(content))
    return tmp_path


def failure(
    checkpoint: Path,
    dtype: str = "float32",
    change: Callable[[Floats, Floats], tuple[Floats, Floats]] = lambda dense, multivector: (dense, multivector),
    limits: Limits = LIMITS,
    quantized: tuple[str, ...] = (),
    change_image: Callable[[Floats, Floats], tuple[Floats, Floats]] | None = None,
) -> str | None:
    asked_for: list[EmbedRequest] = []

    async def embed(asked: EmbedRequest, request_id: str) -> list[Vectors]:
        asked_for.append(asked)
        (item,) = asked.items
        if item.image is not None:
            assert asked.max_pixels == 50176
            dense, multivector = (change_image or change)(*rows("", item.image))
        else:
            dense, multivector = change(*rows(asked.prefix, item.text or ""))
        return [Vectors(dense, multivector, len(multivector))]

    found = asyncio.run(canary.canary_failure(checkpoint, dtype, limits, embed, quantized))
    assert all(asked.outputs == {"dense", "multivector"} for asked in asked_for)
    return found


def refuse(dense: Floats, multivector: Floats) -> tuple[Floats, Floats]:
    """Refuse an image as a server with a low limit does."""
    raise ExceptionGroup("of a task group", [ApiError(422, "the file is over the limit", code="VALIDATION_ERROR")])


def turned(values: Floats, distance: float) -> Floats:
    """Turn each row so far that 1 - cosine is the distance."""
    other = np.roll(values, 1, axis=1)
    other -= np.sum(other * values, axis=1, keepdims=True) * values
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    cosine = 1 - distance
    turned: Floats = (cosine * values + np.sqrt(1 - cosine**2) * other).astype(np.float32)
    return turned


@pytest.mark.parametrize("dtype", canary.BOUNDS)
def test_the_same_vectors_are_right(dtype: str, checkpoint: Path) -> None:
    assert failure(checkpoint, dtype) is None
    assert REGISTRY.get_sample_value("jina_v4_canary_distance", LABELS) < 1e-6
    assert REGISTRY.get_sample_value("jina_v4_canary_ok", LABELS) == 1


@pytest.mark.parametrize("dtype", canary.BOUNDS)
@pytest.mark.parametrize("which", ["dense", "multivector"])
def test_the_bound_is_that_of_the_dtype(dtype: str, which: str, checkpoint: Path) -> None:
    def turn(distance: float) -> Callable[[Floats, Floats], tuple[Floats, Floats]]:
        if which == "dense":
            return lambda dense, multivector: (turned(dense, distance), multivector)
        return lambda dense, multivector: (dense, turned(multivector, distance))

    bound = canary.BOUNDS[dtype]
    assert failure(checkpoint, dtype, turn(0.8 * bound)) is None
    assert "embed to other vectors" in (failure(checkpoint, dtype, turn(1.2 * bound)) or "")


def test_quantized_weights_may_be_farther_off_and_are_named_when_they_are_too_far(checkpoint: Path) -> None:
    def turn(distance: float) -> Callable[[Floats, Floats], tuple[Floats, Floats]]:
        return lambda dense, multivector: (turned(dense, distance), multivector)

    assert failure(checkpoint, "bfloat16", turn(0.012)) is not None
    assert failure(checkpoint, "bfloat16", turn(0.02), quantized=("int8",)) is None
    assert "at most 3e-02 is allowed in float32+int8" in (
        failure(checkpoint, "float32", turn(0.04), quantized=("int8",)) or ""
    )
    assert failure(checkpoint, "bfloat16", turn(0.08), quantized=("fp8",)) is None
    assert failure(checkpoint, "bfloat16", turn(0.08), quantized=("int8", "kv_fp8")) is None
    found = failure(checkpoint, "bfloat16", turn(0.02), quantized=("vision_fp8",)) or ""
    assert "the canary's texts embed to other vectors" in found, "that is the images' alone"
    assert failure(checkpoint, "bfloat16", quantized=("vision_fp8",), change_image=turn(0.08)) is None
    found = failure(checkpoint, "bfloat16", turn(0.33), quantized=("fp8", "kv_fp8")) or ""
    assert "at most 1e-01 is allowed in bfloat16+fp8+kv_fp8)" in found
    assert found.endswith("Or fp8, kv_fp8 is too coarse for this model: serve without it")


def test_one_wrong_prompt_is_enough(checkpoint: Path) -> None:
    content = json.loads((checkpoint / "canary.json").read_text())
    content["entries"][2]["prompt_name"] = "query"
    (checkpoint / "canary.json").write_text(json.dumps(content))
    assert "embed to other vectors" in (failure(checkpoint) or "")


@pytest.mark.parametrize("dtype", canary.IMAGE_BOUNDS)
def test_a_wrong_image_is_enough_and_is_named(dtype: str, checkpoint: Path) -> None:
    def turn(distance: float) -> Callable[[Floats, Floats], tuple[Floats, Floats]]:
        return lambda dense, multivector: (dense, turned(multivector, distance))

    bound = canary.IMAGE_BOUNDS[dtype]
    assert failure(checkpoint, dtype, change_image=turn(0.8 * bound)) is None
    found = failure(checkpoint, dtype, change_image=turn(1.2 * bound)) or ""
    assert found.startswith("the canary's image embeds to other vectors (1 - cosine is ")
    assert REGISTRY.get_sample_value("jina_v4_canary_ok", LABELS) == 0
    found = failure(checkpoint, dtype, change_image=lambda dense, multivector: (dense, multivector[:-1])) or ""
    assert found == "the canary's image has vectors of shape (6, 128); expected (7, 128)"


def test_a_canary_without_an_image_is_accepted(checkpoint: Path) -> None:
    content = json.loads((checkpoint / "canary.json").read_text())
    del content["image"]
    (checkpoint / "canary.json").write_text(json.dumps(content))
    assert failure(checkpoint) is None
    assert "embed to other vectors" in (failure(checkpoint, change=lambda dense, rows: (-dense, rows)) or "")


@pytest.mark.parametrize("why", ["max_pixels", "the file"])
def test_an_image_that_the_server_refuses_is_left_out_and_said_to_be(
    why: str, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limits = replace(LIMITS, max_pixels=20_000) if why == "max_pixels" else LIMITS
    assert failure(checkpoint, limits=limits, change_image=refuse) is None
    (line,) = [entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING"]
    assert line.startswith("the canary's image is not checked, as this server refuses it: ")
    assert ("choose 3136 to 20000" if why == "max_pixels" else "over the limit") in line
    wrong = failure(checkpoint, change=lambda dense, rows: (-dense, rows), limits=limits, change_image=refuse)
    assert "the canary's texts embed to other vectors" in (wrong or "")


def test_another_number_of_tokens_is_not_right(checkpoint: Path) -> None:
    found = failure(checkpoint, change=lambda dense, multivector: (dense, multivector[:-1]))
    assert found == "the canary's text has vectors of shape (6, 128); expected (7, 128)"


def test_vectors_that_are_not_finite_are_not_right(checkpoint: Path) -> None:
    assert failure(checkpoint, change=lambda dense, multivector: (dense * np.nan, multivector)) is not None


def test_texts_over_the_servers_limit_are_left_out(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    short = Limits(("retrieval",), PROMPTS, frozenset(), 6, 3136, 602112, 256, 2048)
    wrong = failure(checkpoint, change=lambda dense, rows: (-dense, rows), limits=short, change_image=refuse)
    assert wrong is None
    assert "retrieval vectors are not checked: this server accepts none of the canary's texts" in caplog.text


def test_a_checkpoint_without_canary_is_served_and_said_to_have_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert failure(tmp_path) is None
    (entry,) = caplog.records
    assert entry.getMessage().startswith("retrieval vectors are not checked: there is no canary (")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content.pop("entries"),
        lambda content: content.update(entries=[]),
        lambda content: content.update(computed={"dtype": "int8"}),
        lambda content: content.update(format=2),
        lambda content: content["entries"][0].update(dense="AAA"),
        lambda content: content["image"].pop("png"),
        lambda content: content["entries"][0].update(multivector=encoded(np.ones(100, np.float32))),
    ],
    ids=["no entries", "no entry", "dtype", "format", "base64", "no file", "half a row"],
)
def test_a_broken_canary_is_not_passed_over(spoil: Callable[[Any], object], checkpoint: Path) -> None:
    content = json.loads((checkpoint / "canary.json").read_text())
    spoil(content)
    (checkpoint / "canary.json").write_text(json.dumps(content))
    assert (failure(checkpoint) or "").startswith("canary.json is broken (")


def test_an_engine_that_fails_or_hangs_ends_the_start(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What it would compute is not known: a new start may be all it needs."""

    async def fail(asked: EmbedRequest, request_id: str) -> list[Vectors]:
        raise RuntimeError("out of memory")

    async def hang(asked: EmbedRequest, request_id: str) -> list[Vectors]:
        await asyncio.sleep(60)
        return []

    monkeypatch.setattr(start_check, "TIMEOUT_S", 0.05)
    for embed, reason in ((fail, r"RuntimeError\('out of memory'\)"), (hang, r"no answer for 0\.05 s")):
        with pytest.raises(EngineError, match=rf"no vectors for the canary \({reason}\); the server ends"):
            asyncio.run(canary.canary_failure(checkpoint, "float32", LIMITS, embed))
    assert "not serving: " not in caplog.text


def test_a_machine_that_needs_long_for_all_texts_is_not_taken_for_one_that_hangs(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_asked = 0

    async def embed(asked: EmbedRequest, request_id: str) -> list[Vectors]:
        """Nine tenths of the limit go by, on the clock of the event loop."""
        nonlocal n_asked
        n_asked += 1
        now = time.monotonic() + n_asked * 0.9 * start_check.TIMEOUT_S
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)
        await asyncio.sleep(0)
        (item,) = asked.items
        dense, multivector = rows(asked.prefix if item.text else "", item.text or item.image or "")
        return [Vectors(dense, multivector, len(multivector))]

    assert asyncio.run(canary.canary_failure(checkpoint, "float32", LIMITS, embed)) is None


def test_an_engine_that_finds_its_vectors_not_finite_computes_wrong_ones(checkpoint: Path) -> None:
    async def embed(asked: EmbedRequest, request_id: str) -> list[Vectors]:
        raise ExceptionGroup("of a task group", [NonFiniteError(request_id)])

    found = asyncio.run(canary.canary_failure(checkpoint, "float32", LIMITS, embed)) or ""
    assert found.startswith("the canary embeds to NaN or infinity")


def test_a_text_that_no_request_could_hold_is_named(checkpoint: Path) -> None:
    content = json.loads((checkpoint / "canary.json").read_text())
    content["entries"][0]["prompt_name"] = "nonsense"
    (checkpoint / "canary.json").write_text(json.dumps(content))
    assert (failure(checkpoint) or "").startswith("the canary's text cannot be embedded: ")
