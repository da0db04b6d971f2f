"""The canary: texts, an image and their vectors in the checkpoint. A server must compute the same before it serves.

`jina-v4-merge verify --canary` computed them with plain transformers. Here they are embedded like requests, before the
server listens. The vectors only agree if weights, adapter, projector, tokenizer, image processor, kernels and pooling
are all right.
Weights do not change while a server runs, so one check is enough; `/ready` checks that the engine still works.
"""

import base64
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.api.forms.embeddings import settle
from jina_v4_serve.api.forms.schema import EmbeddingsBody
from jina_v4_serve.api.metrics import CANARY_DISTANCE, CANARY_OK
from jina_v4_serve.api.request import EmbedRequest, Limits
from jina_v4_serve.api.start_check import computed
from jina_v4_serve.api.vectors import Floats, NonFiniteError, Vectors
from jina_v4_serve.checkpoint import CANARY, CANARY_FORMAT
from jina_v4_serve.errors import CheckpointError
from jina_v4_serve.facts import PROJECTOR_DIM
from jina_v4_serve.phases import reached

logger = logging.getLogger("jina_v4_serve")

Embed = Callable[[EmbedRequest, str], Awaitable[list[Vectors]]]

# The largest allowed 1 - cosine, for the coarser of the dtypes of server and canary. With random weights, rounding
# costs 1e-7 in float32, 2e-6 in float16 and 1.2e-4 in bfloat16, on 3 layers and on 36. A missing adapter costs 0.33,
# another task's adapter 0.53.
BOUNDS = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}
# An image's rounding costs the same with random weights. The one figure for the real ones is another server's, 3e-3 in
# bfloat16. Wrong attention of the vision tower, or a block without effect, costs 0.1 or more on 2 blocks.
IMAGE_BOUNDS = BOUNDS | {"bfloat16": 3e-2}
# The same for quantized parts, by their names in the revision. The canary of a quantized checkpoint is computed with
# the stored matrices. A server also rounds their inputs, which costs 6.4e-4 in int8 and 5.0e-3 in fp8 on 3 layers
# (simulated), 1.8e-4 and 2.2e-3 on 36. Matrices that vLLM itself converts to fp8 also round the weights: 1.0e-2 on 3.
QUANTIZED_BOUNDS = {"int8": 3e-2, "fp8": 1e-1}
QUANTIZED_BOUND = 1e-1

# By kind: the bounds, and two parts of the message.
_KINDS = {
    "text": (BOUNDS, "texts embed", "a wrong or missing adapter"),
    "image": (IMAGE_BOUNDS, "image embeds", "another image processor, or a wrong kernel of the vision tower"),
}


@dataclass(frozen=True)
class Entry:
    """A text or an image, and its vectors.

    Attributes:
        kind: "text" or "image".
        body: the fields of the request that embeds it.
        dense: shape (hidden,), unit length.
        multivector: shape (n_tokens, 128), unit rows.
    """

    kind: str
    body: Mapping[str, Any]
    dense: Floats
    multivector: Floats


@dataclass(frozen=True)
class Canary:
    """All entries, and the dtype in which they were computed."""

    dtype: str
    entries: tuple[Entry, ...]


def read_canary(checkpoint: Path) -> Canary | None:
    """Read the canary of a checkpoint; None if there is none.

    Raises:
        CheckpointError: the canary is broken.
    """
    path = checkpoint / CANARY
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != CANARY_FORMAT:
            raise ValueError(f"format {content['format']}")
        dtype = content["computed"]["dtype"]
        entries = [
            _entry("text", entry, {"input": {"text": entry["text"]}, "prompt_name": entry["prompt_name"]})
            for entry in content["entries"]
        ]
        if dtype not in BOUNDS or not entries:
            raise ValueError(f"{len(entries)} texts in {dtype}")
        if (image := content.get("image")) is not None:  # older canaries have none
            body = {"input": {"image": image["png"]}, "max_pixels": image["max_pixels"]}
            entries.append(_entry("image", image, body))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{CANARY} is broken ({error!r}); make it again with `jina-v4-merge verify --canary`"
        ) from error
    return Canary(dtype, tuple(entries))


async def canary_failure(
    checkpoint: Path, dtype: str, limits: Limits, embed: Embed, quantized: Sequence[str] = ()
) -> str | None:
    """Compare this server's vectors with the canary of a checkpoint, and log the result.

    Args:
        checkpoint: the folder.
        dtype: of this server.
        limits: of this server, with the checkpoint's task only.
        embed: returns the vectors of a request.
        quantized: the quantized parts, by their names in the revision.

    Returns:
        What is wrong, as callers may read it; None if the vectors are right, or if there is no canary.

    Raises:
        EngineError: the engine computed no vectors.
    """
    (task,) = limits.tasks
    CANARY_DISTANCE.labels(task).set(float("nan"))
    try:
        canary = read_canary(checkpoint)
        distances = await _largest_distances(canary.entries if canary else (), limits, embed)
        if canary is None or not distances:
            none = "there is no canary (`jina-v4-merge verify DIR --canary`)"
            reason = "this server accepts none of the canary's texts" if canary else none
            logger.warning("%s vectors are not checked: %s", task, reason)
            return None
        CANARY_DISTANCE.labels(task).set(float(np.max([*distances.values()])))
        passed = [_compared(kind, distances[kind], canary, dtype, quantized) for kind in distances]
    except CheckpointError as error:
        failure = str(error)
    except NonFiniteError:
        failure = "the canary embeds to NaN or infinity: a damaged file, or a dtype that is too small for this model"
    else:
        CANARY_OK.labels(task).set(1)
        logger.info("the canary passes: %s", "; ".join(passed))
        reached(f"canary of {task} right")
        return None
    CANARY_OK.labels(task).set(0)
    logger.error("not serving: %s", failure)
    return failure


def _compared(kind: str, distance: float, canary: Canary, dtype: str, quantized: Sequence[str]) -> str:
    """Return the largest distance of one kind of entries and what is allowed, as a sentence.

    Raises:
        CheckpointError: it is too large.
    """
    bounds, subject, cause = _KINDS[kind]
    parts = [part for part in quantized if kind == "image" or not part.startswith("vision_")]
    coarse = [QUANTIZED_BOUNDS.get(part, QUANTIZED_BOUND) for part in parts]
    bound = max(bounds[dtype], bounds[canary.dtype], *coarse)
    precision = "+".join((dtype, *quantized))
    measured = f"1 - cosine is {distance:.1e}, at most {bound:.0e} is allowed in {precision}"
    if distance <= bound:  # NaN is not
        return f"{measured} ({kind})"
    advice = f". Or {', '.join(parts)} is too coarse for this model: serve without it" if parts else ""
    raise CheckpointError(
        f"the canary's {subject} to other vectors ({measured}): {cause}, or a damaged file (`jina-v4-merge verify DIR`)"
        f"{advice}"
    )


async def _largest_distances(entries: Sequence[Entry], limits: Limits, embed: Embed) -> dict[str, float]:
    """Return by kind the largest 1 - cosine of any dense vector or multi-vector (the mean over its rows).

    Texts that are too long for this server are left out, and an image that it refuses: no caller gets their vectors.
    """
    distances: dict[str, float] = {}
    for i, entry in enumerate(entries):
        if entry.kind == "text" and len(entry.multivector) > limits.max_length:
            continue
        try:
            body = EmbeddingsBody.model_validate({**entry.body, "outputs": ["dense", "multivector"]})
            (vectors,) = await computed(embed(settle(body, limits), f"canary-{i}"), "the canary")
        except (ApiError, ValueError) as error:
            if entry.kind == "image" and isinstance(error, ApiError):
                logger.warning("the canary's image is not checked, as this server refuses it: %s", error)
                continue
            raise CheckpointError(f"the canary's {entry.kind} cannot be embedded: {error}") from error
        for actual, expected in ((vectors.dense, entry.dense[None]), (vectors.multivector, entry.multivector)):
            if actual.shape != expected.shape:
                shapes = f"{actual.shape}; expected {expected.shape}"
                raise CheckpointError(f"the canary's {entry.kind} has vectors of shape {shapes}")
            distance = 1 - float(np.sum(actual * expected, dtype=np.float64)) / len(actual)
            distances[entry.kind] = float(np.max([distances.get(entry.kind, -np.inf), distance]))  # NaN where any is
    return distances


def _entry(kind: str, stored: Mapping[str, str], body: Mapping[str, Any]) -> Entry:
    rows = _floats(stored["multivector"]).reshape(-1, PROJECTOR_DIM)  # (n_tokens, 128)
    return Entry(kind, body, _floats(stored["dense"]), rows)


def _floats(text: str) -> Floats:
    """Read base64 of little-endian float32."""
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4").astype(np.float32)
