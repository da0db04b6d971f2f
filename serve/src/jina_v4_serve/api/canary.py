"""The canary: texts and their vectors in the checkpoint. A server must compute the same vectors before it serves.

`jina-v4-merge verify --canary` computed them with plain transformers. Here the texts are embedded like requests, before
the server listens. The vectors only agree if weights, adapter, projector, tokenizer, kernels and pooling are all right.
Weights do not change while a server runs, so one check is enough; `/ready` checks that the engine still works.
"""

import base64
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.api.forms.embeddings import settle
from jina_v4_serve.api.forms.schema import EmbeddingsBody
from jina_v4_serve.api.metrics import CANARY_DISTANCE, CANARY_OK
from jina_v4_serve.api.request import EmbedRequest, Limits
from jina_v4_serve.api.start_check import computed
from jina_v4_serve.api.vectors import Floats, NonFiniteError, Vectors
from jina_v4_serve.checkpoint import CANARY
from jina_v4_serve.errors import CheckpointError
from jina_v4_serve.facts import PROJECTOR_DIM
from jina_v4_serve.phases import reached

logger = logging.getLogger("jina_v4_serve")

Embed = Callable[[EmbedRequest, str], Awaitable[list[Vectors]]]

# The largest allowed 1 - cosine, for the coarser of the dtypes of server and canary. With random weights, rounding
# costs 1e-7 in float32, 2e-6 in float16 and 1.2e-4 in bfloat16, on 3 layers and on 36. A missing adapter costs 0.33,
# another task's adapter 0.53.
BOUNDS = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}
# The same for quantized parts, by their names in the revision. The canary of a quantized checkpoint is computed with
# the stored matrices. A server also rounds their inputs, which costs 6.4e-4 in int8 and 5.0e-3 in fp8 on 3 layers
# (simulated), 1.8e-4 and 2.2e-3 on 36. Matrices that vLLM itself converts to fp8 also round the weights: 1.0e-2 on 3.
QUANTIZED_BOUNDS = {"int8": 3e-2, "fp8": 1e-1}
QUANTIZED_BOUND = 1e-1


@dataclass(frozen=True)
class Entry:
    """One text and its vectors.

    Attributes:
        dense: shape (hidden,), unit length.
        multivector: shape (n_tokens, 128), unit rows.
    """

    prompt_name: str
    text: str
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
        dtype = content["computed"]["dtype"]
        entries = tuple(
            Entry(
                entry["prompt_name"],
                entry["text"],
                _floats(entry["dense"]),
                _floats(entry["multivector"]).reshape(-1, PROJECTOR_DIM),  # (n_tokens, 128)
            )
            for entry in content["entries"]
        )
        if dtype not in BOUNDS or not entries:
            raise ValueError(f"{len(entries)} texts in {dtype}")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{CANARY} is broken ({error!r}); make it again with `jina-v4-merge verify --canary`"
        ) from error
    return Canary(dtype, entries)


async def canary_failure(
    checkpoint: Path, dtype: str, limits: Limits, embed: Embed, quantized: Sequence[str] = ()
) -> str | None:
    """Compare this server's vectors with the canary of a checkpoint, and log the result.

    Args:
        checkpoint: the folder.
        dtype: of this server.
        limits: of this server, with the checkpoint's task only; texts that are too long for it are skipped.
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
        entries = [entry for entry in canary.entries if len(entry.multivector) <= limits.max_length] if canary else []
        if canary is None or not entries:
            logger.warning("no canary in the checkpoint: vectors are not checked (`jina-v4-merge verify DIR --canary`)")
            return None
        coarse = (QUANTIZED_BOUNDS.get(part, QUANTIZED_BOUND) for part in quantized)
        bound = max(BOUNDS[dtype], BOUNDS[canary.dtype], *coarse)
        precision = "+".join((dtype, *quantized))
        distance = await _largest_distance(entries, limits, embed)
        CANARY_DISTANCE.labels(task).set(distance)
        if distance <= bound:
            CANARY_OK.labels(task).set(1)
            logger.info(
                "the canary passes: 1 - cosine is %.1e, at most %.0e is allowed in %s", distance, bound, precision
            )
            reached(f"canary of {task} right")
            return None
        failure = (
            f"the canary's texts embed to other vectors (1 - cosine is {distance:.1e}, at most {bound:.0e} is allowed "
            f"in {precision}): a wrong or missing adapter, or a damaged file; `jina-v4-merge verify DIR` shows which"
        )
        if quantized:
            failure += f". Or {', '.join(quantized)} is too coarse for this model: serve without it"
    except CheckpointError as error:
        failure = str(error)
    except NonFiniteError:
        failure = (
            "the canary's texts embed to NaN or infinity: a damaged file, or a dtype that is too small for this model"
        )
    CANARY_OK.labels(task).set(0)
    logger.error("not serving: %s", failure)
    return failure


async def _largest_distance(entries: Sequence[Entry], limits: Limits, embed: Embed) -> float:
    """Return the largest 1 - cosine of any dense vector or multi-vector (the mean over its rows)."""
    distances: list[float] = []
    for i, entry in enumerate(entries):
        body = {
            "input": {"text": entry.text},
            "prompt_name": entry.prompt_name,
            "outputs": ["dense", "multivector"],
        }
        try:
            request = settle(EmbeddingsBody.model_validate(body), limits)
        except (ApiError, ValueError) as error:
            raise CheckpointError(f"a text of the canary cannot be embedded: {error}") from error
        (vectors,) = await computed(embed(request, f"canary-{i}"), "the canary")
        for actual, expected in ((vectors.dense, entry.dense[None]), (vectors.multivector, entry.multivector)):
            if actual.shape != expected.shape:
                raise CheckpointError(
                    f"a text of the canary has vectors of shape {actual.shape}; expected {expected.shape}"
                )
            distances.append(1 - float(np.sum(actual * expected, dtype=np.float64)) / len(actual))
    return float(np.max(distances))  # NaN where any is


def _floats(text: str) -> Floats:
    """Read base64 of little-endian float32."""
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4").astype(np.float32)
