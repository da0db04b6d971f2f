"""A stock vLLM: the request for a batch, and the vectors made from the hidden states in its reply.

Sums over hidden states are kept in float64: one page is 768 rows, and it costs nothing beside fetching them.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize

from jina_v4_client._calls import Batch
from jina_v4_client._model import (
    IMAGE_FRAME,
    MAX_PIXELS,
    MIN_PIXELS,
    MODEL,
    MULTIVECTOR_DIM,
    SPECIAL_TOKENS,
    TASKS,
    Task,
    count_image_tokens,
    text_prefix,
)
from jina_v4_client._server import (
    STOCK_FLAGS,
    Reply,
    Request,
    Send,
    Server,
    check_unchanged,
    is_list_of_dicts,
)
from jina_v4_client.errors import ArgumentError, BadReplyError, WrongServerError
from jina_v4_client.results import UNIT_TOLERANCE, Item, Vector, row_lengths, together

# A reply of /pooling describes its items in one header, some 130 bytes each; HTTP libraries refuse one over 100 KB.
MAX_TEXTS = 256
MAX_TOKENS = 4096  # whose hidden states are 32 MB
_SPECIAL_TOKEN = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
PROJECTOR_FILE = "multi_vector_projector.safetensors"
_WEIGHT, _BIAS = "multi_vector_projector.weight", "multi_vector_projector.bias"
_MAX_BYTES = 64 * 2**20  # the real one has 1 MB: anything near this is another file


@dataclass(frozen=True)
class Projector:
    """What turns hidden states into the rows of a multi-vector."""

    path: Path
    weight: Vector  # (128, hidden)
    bias: Vector  # (128,)
    task: Task | None  # if the checkpoint's manifest is beside it

    def project(self, rows: Vector) -> Vector:
        """Turn (n_tokens, hidden), not normalised, of the whole prompt, into (n_tokens, 128) of unit length."""
        if rows.shape[1] != self.weight.shape[1]:
            raise WrongServerError(
                f"the server's hidden states have {rows.shape[1]} numbers and projector={str(self.path)!r} takes "
                f"{self.weight.shape[1]}: it belongs to another model"
            )
        return normalise_rows(rows @ self.weight.T + self.bias)  # (n_tokens, 128)


def check_items(batches: Sequence[Batch]) -> dict[int, ArgumentError]:
    """Find texts with a special token, which a stock vLLM does not read as text; return errors by place in the call."""
    return {
        place: ArgumentError(
            f"{batch.call.name}[{place}] holds {token.group()!r} at character {token.start()}, which a stock vLLM "
            "reads as a special token and not as text; remove it, break it up, or use a server of jina-v4-serve"
        )
        for batch in batches
        if batch.is_text
        for place, text in zip(batch.places, batch.items, strict=True)
        if (token := _SPECIAL_TOKEN.search(text))
    }


def check_projector(server: Server, projector: Projector | None) -> None:
    """Refuse multi-vectors without a projector, or with another task's."""
    if projector is None:
        raise ArgumentError(
            f"{server.url} is a stock vLLM, which returns no multi-vectors by itself: pass the file {PROJECTOR_FILE} "
            f"of the served checkpoint as EmbeddingsClient(..., projector='.../{MODEL}-{server.task}/{PROJECTOR_FILE}')"
        )
    if projector.task not in (None, server.task):
        raise ArgumentError(
            f"projector={str(projector.path)!r} is of the task {projector.task!r}, as the manifest beside it says, and "
            f"{server.url} serves {server.task!r}: pass the one of {MODEL}-{server.task}"
        )


def batch_limits(whole: Batch) -> tuple[int, int]:
    """Return how many items and tokens go into one request; /pooling takes one conversation, so one image."""
    return min(whole.call.batch_size, MAX_TEXTS) if whole.is_text else 1, MAX_TOKENS


async def embed(server: Server, batch: Batch, send: Send, projector: Projector | None) -> list[Item]:
    """Request the hidden states of a batch, and make its vectors from them."""
    reply = await send(lambda: write_request(server, batch))
    check_unchanged(server, reply)
    return read_reply(server, batch, reply, projector)


def write_request(server: Server, batch: Batch) -> Request:
    """Write the request for one batch."""
    call = batch.call
    body: dict[str, Any] = {"model": server.model, "task": "token_embed", "use_activation": False}
    body |= {"encoding_format": "bytes", "embed_dtype": "float32", "endianness": "little"}
    if batch.is_text:
        prefix = text_prefix(server.task, call.prompt_name)
        body["input"] = [prefix + text for text in batch.items]
        # Over its own limit vLLM refuses to truncate; without truncation it refuses only texts that are too long.
        if call.max_length <= server.max_model_len:
            body |= {"truncate_prompt_tokens": call.max_length, "truncation_side": "right"}
    else:
        content = [{"type": "image_url", "image_url": {"url": image.data_uri()}} for image in batch.items]
        body["messages"] = [{"role": "user", "content": content}]
        if call.max_pixels is not None:
            # vLLM fails on one of the two alone.
            body["mm_processor_kwargs"] = {"min_pixels": MIN_PIXELS, "max_pixels": call.max_pixels}
    return Request("/pooling", body)


def read_reply(server: Server, batch: Batch, reply: Reply, projector: Projector | None) -> list[Item]:
    """Make the vectors of one batch, in its order: (dim,) or (n_tokens, 128) float32 of unit length, or both."""
    call, items = batch.call, _read_rows(reply, server.url, len(batch.places))
    spans = items
    if not batch.is_text:
        max_pixels = call.max_pixels or MAX_PIXELS
        spans = [
            vision_span(rows, count_image_tokens(image.width, image.height, max_pixels))
            for rows, image in zip(items, batch.items, strict=True)
        ]
    dense = [pool(rows, call.truncate_dim) for rows in spans] if "dense" in call.outputs else None
    if "multivector" not in call.outputs:
        return together(dense, None)
    if projector is None:
        raise ValueError("multi-vectors of a stock server are made with a projector")
    return together(dense, [projector.project(rows) for rows in items])


def _read_rows(reply: Reply, url: str, n_items: int) -> list[Vector]:
    try:
        metadata = json.loads(reply.headers.get("metadata", ""))
    except json.JSONDecodeError as error:
        raise BadReplyError(f"{url}/pooling answered without the header that describes its bytes") from error
    items = metadata.get("data") if isinstance(metadata, dict) else None
    if not is_list_of_dicts(items):
        raise BadReplyError(f"{url}/pooling answered with a header that does not list its items")
    if (indexes := [item.get("index") for item in items]) != list(range(n_items)):
        raise BadReplyError(f"{url} answered with the items {indexes} to a request of {n_items}, counted from 0")
    rows, start = [], 0
    for item in items:
        shape = item.get("shape")
        if not (isinstance(shape, list) and all(isinstance(side, int) and side > 0 for side in shape)):
            raise BadReplyError(f"{url}/pooling answered with an item of shape {shape}")
        if len(shape) != 2:
            raise WrongServerError(
                f"{url} returns one vector an item instead of one a token; start it with {STOCK_FLAGS}"
            )
        end = start + 4 * shape[0] * shape[1]
        layout = [item.get(key) for key in ("start", "end", "embed_dtype", "endianness")]
        if layout != [start, end, "float32", "little"] or end > len(reply.content):
            raise BadReplyError(f"{url}/pooling answered with bytes that do not fit their description")
        array = np.frombuffer(reply.content, "<f4", shape[0] * shape[1], start).reshape(shape)  # (n_tokens, hidden)
        check_rows(array)
        rows.append(array)
        start = end
    if start != len(reply.content):
        raise BadReplyError(f"{url}/pooling answered with {len(reply.content)} bytes where {start} were announced")
    usage = metadata.get("usage")
    n_prompt_tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    n_rows = sum(len(array) for array in rows)
    if n_prompt_tokens is not None and n_prompt_tokens != n_rows:
        raise WrongServerError(
            f"{url} returned the hidden states of {n_rows} tokens out of {n_prompt_tokens}: some came from a cache; "
            f"start it with {STOCK_FLAGS}"
        )
    return rows


def normalise_rows(rows: Vector) -> Vector:
    """Bring each row of (n, dim) to unit length; a row of zeros has no direction and is refused."""
    lengths = row_lengths(rows)  # (n,)
    if not (lengths > 0).all():
        raise BadReplyError("the server's hidden states make a row of zeros: nothing is returned")
    unit: Vector = (rows / lengths[:, None]).astype(np.float32)
    return unit


def check_rows(rows: Vector) -> None:
    """Refuse hidden states (n_tokens, hidden) that cannot be what the model computed."""
    if not np.isfinite(rows).all():
        raise BadReplyError("the server's hidden states hold NaN or infinity: nothing is returned")
    if (np.abs(row_lengths(rows) - 1) < UNIT_TOLERANCE).all():
        raise WrongServerError(
            f"the server normalises every token by itself, so their mean is another; start it with {STOCK_FLAGS}"
        )


def vision_span(rows: Vector, n_image_tokens: int) -> Vector:
    """Return the tokens from vision_start to vision_end, both included, of (n_tokens, hidden) of an image prompt.

    Refuse a prompt of another length than the published model's: its vectors are others.
    """
    n_before, n_after = IMAGE_FRAME
    expected = n_before + 1 + n_image_tokens + 1 + n_after
    if len(rows) != expected:
        raise WrongServerError(
            f"the server made {len(rows)} tokens of an image where the published model makes {expected}: its chat "
            "template or its pixel limits differ; serve a checkpoint of jina-v4-merge, or give its limit as max_pixels="
        )
    return rows[n_before : len(rows) - n_after]  # (n_image_tokens + 2, hidden)


def pool(rows: Vector, truncate_dim: int | None) -> Vector:
    """Average tokens, (n_tokens, hidden), not normalised, to (dim,) of unit length: all of a text, an image's span."""
    hidden = rows.shape[1]
    if truncate_dim is not None and truncate_dim > hidden:
        raise WrongServerError(f"truncate_dim={truncate_dim} is more than the {hidden} dimensions of the served model")
    cut = rows.mean(axis=0, dtype=np.float64)[:truncate_dim]  # (dim,)
    length = np.linalg.norm(cut)
    if not length > 0:
        raise BadReplyError("the server's hidden states are all zero: nothing is returned")
    # Normalising before the cut as well, as the published code does, changes nothing after it.
    unit: Vector = (cut / length).astype(np.float32)
    return unit


def read_projector(path: object) -> Projector:
    """Read the file of a projector; not by safetensors.numpy, because numpy has no bfloat16, in which most keep it."""
    if not isinstance(path, str | os.PathLike):
        raise ArgumentError(f"projector must be the path of a {PROJECTOR_FILE}, not {type(path).__name__}")
    file = Path(path)
    where = f"projector={str(file)!r}"
    try:
        if not file.is_file() or file.stat().st_size > _MAX_BYTES:
            raise ArgumentError(f"{where} is no {PROJECTOR_FILE}; give the path of a checkpoint's")
        # deserialize is not typed
        tensors: dict[str, Any] = dict(deserialize(file.read_bytes()))  # type: ignore[no-untyped-call]
    except (OSError, SafetensorError) as error:
        raise ArgumentError(f"{where} cannot be read ({error}); copy it again") from error
    if tensors.keys() != {_WEIGHT, _BIAS}:
        raise ArgumentError(f"{where} does not hold {_WEIGHT} and {_BIAS}; give the checkpoint's {PROJECTOR_FILE}")
    weight, bias = (_as_float32(tensors[name]) for name in (_WEIGHT, _BIAS))
    if weight is None or bias is None or weight.ndim != 2 or weight.shape[0] != MULTIVECTOR_DIM:
        raise ArgumentError(f"{where} has tensors of a shape or dtype that is not the model's")
    if bias.shape != (MULTIVECTOR_DIM,) or not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise ArgumentError(f"{where} has NaN, infinity or a bias that is not the model's")
    return Projector(file, weight, bias, _manifest_task(file.with_name("manifest.json")))


def _as_float32(tensor: dict[str, Any]) -> Vector | None:
    if tensor["dtype"] == "BF16":
        upper = np.frombuffer(tensor["data"], "<u2").astype(np.uint32)
        return (upper << 16).view(np.float32).reshape(tensor["shape"])
    dtype = {"F32": "<f4", "F16": "<f2"}.get(tensor["dtype"])
    return None if dtype is None else np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"]).astype(np.float32)


def _manifest_task(manifest: Path) -> Task | None:
    """Read the task from a checkpoint's manifest; a projector that was copied elsewhere has none beside it."""
    try:
        said = json.loads(manifest.read_bytes())["task"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return next((task for task in TASKS if task == said), None)
