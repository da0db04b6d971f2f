"""A stock vLLM: the request for a batch, and the vectors made from the hidden states in its reply."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jina_v4_client._arguments import structure_token_error
from jina_v4_client._batches import Batch, Images, Item, Texts, together
from jina_v4_client._images import PreparedImage
from jina_v4_client._model import MAX_PIXELS, MIN_PIXELS, MODEL, count_image_tokens, text_prefix
from jina_v4_client._pooling import STOCK_FLAGS, Vector, check_rows, pool, vision_span
from jina_v4_client._projector import PROJECTOR_FILE, Projector
from jina_v4_client._server import Server
from jina_v4_client._wire import Reply, Request, is_list_of_dicts
from jina_v4_client.errors import ArgumentError, BadReplyError, WrongServerError

# A reply of /pooling describes its items in one header, some 130 bytes each; HTTP libraries refuse one over 100 KB.
MAX_TEXTS = 256
MAX_TOKENS = 4096  # whose hidden states are 32 MB


def check_items(batch: Batch) -> dict[int, ArgumentError]:
    """Find what a server of ours would embed and a stock one would not; give errors by place in the call."""
    if not isinstance(batch, Texts):
        return {}
    found = ((place, structure_token_error(place, text)) for place, text in zip(batch.places, batch.items, strict=True))
    return {place: error for place, error in found if error is not None}


def check_projector(server: Server, projector: Projector | None) -> None:
    """Refuse multi-vectors without a projector, or with another task's.

    Raises:
        ArgumentError: saying which file to give.
    """
    if projector is None:
        raise ArgumentError(
            f"{server.url} is a stock vLLM, which gives no multi-vectors by itself: give the file {PROJECTOR_FILE} of "
            f"the served checkpoint as EmbeddingsClient(..., projector='.../{MODEL}-{server.task}/{PROJECTOR_FILE}')"
        )
    if projector.task not in (None, server.task):
        raise ArgumentError(
            f"projector={str(projector.path)!r} is of the task {projector.task!r}, as the manifest beside it says, and "
            f"{server.url} serves {server.task!r}: give the one of {MODEL}-{server.task}"
        )


def batch_size(batch: Batch, asked: int) -> int:
    """Give how many items go into one request; /pooling takes one conversation, so one image."""
    return min(asked, MAX_TEXTS) if isinstance(batch, Texts) else 1


def write_request(server: Server, batch: Batch) -> Request:
    """Write the request for one batch."""
    body: dict[str, Any] = {"model": server.model, "task": "token_embed", "use_activation": False}
    body |= {"encoding_format": "bytes", "embed_dtype": "float32", "endianness": "little"}
    if isinstance(batch, Texts):
        prefix = text_prefix(server.task, batch.prompt_name)
        body["input"] = [prefix + text for text in batch.items]
        # Over its own limit vLLM refuses to truncate; without truncation it refuses only texts that are too long.
        if batch.max_length <= server.max_model_len:
            body |= {"truncate_prompt_tokens": batch.max_length, "truncation_side": "right"}
    else:
        (image,) = batch.items
        body["messages"] = _conversation(image)
        if batch.max_pixels is not None:
            # vLLM fails on one of the two alone.
            body["mm_processor_kwargs"] = {"min_pixels": MIN_PIXELS, "max_pixels": batch.max_pixels}
    return Request("/pooling", body)


def read_reply(server: Server, batch: Batch, reply: Reply, projector: Projector | None) -> list[Item]:
    """Make the vectors of one batch, in its order.

    Args:
        server: that was asked, with its frame if these are images.
        batch: that was sent.
        reply: to its request.
        projector: the served checkpoint's, if multi-vectors are wanted.

    Returns:
        For each item (dim,) or, of a multi-vector, (n_tokens, 128) float32, every row of unit length, or both.

    Raises:
        BadReplyError: no hidden states of every item.
        WrongServerError: a server that is set up in another way.
    """
    items = _read_rows(reply, server.url, len(batch.items))
    spans = items
    if isinstance(batch, Images):
        if server.frame is None:
            raise ValueError("images of a stock server are pooled within the frame of its image prompt")
        max_pixels = MAX_PIXELS if batch.max_pixels is None else batch.max_pixels
        spans = [
            vision_span(rows, server.frame, count_image_tokens(image.width, image.height, max_pixels))
            for rows, image in zip(items, batch.items, strict=True)
        ]
    dense = [pool(rows, batch.truncate_dim) for rows in spans] if "dense" in batch.outputs else None
    if "multivector" not in batch.outputs:
        return together(dense, None)
    if projector is None:
        raise ValueError("multi-vectors of a stock server are made with a projector")
    return together(dense, [projector.project(rows) for rows in items])


def _conversation(image: PreparedImage) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": image.data_uri()}}]}]


def _read_rows(reply: Reply, url: str, n_items: int) -> list[Vector]:
    try:
        metadata = json.loads(reply.headers.get("metadata", ""))
    except json.JSONDecodeError as error:
        raise BadReplyError(f"{url}/pooling answered without the header that describes its bytes") from error
    items = metadata.get("data") if isinstance(metadata, dict) else None
    if not is_list_of_dicts(items):
        raise BadReplyError(f"{url}/pooling answered with a header that does not list its items")
    _check_indexes(items, url, n_items)
    rows, start = [], 0
    for item in items:
        shape = item.get("shape")
        if not (isinstance(shape, list) and all(isinstance(side, int) and side > 0 for side in shape)):
            raise BadReplyError(f"{url}/pooling answered with an item of shape {shape}")
        if len(shape) != 2:
            raise WrongServerError(
                f"{url} gives one vector an item instead of one a token; start it with {STOCK_FLAGS}"
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
            f"{url} gave the hidden states of {n_rows} tokens out of {n_prompt_tokens}: some came from a cache; "
            f"start it with {STOCK_FLAGS}"
        )
    return rows


def _check_indexes(items: Sequence[Mapping[str, Any]], url: str, n_items: int) -> None:
    indexes = [item.get("index") for item in items]
    if indexes != list(range(n_items)):
        raise BadReplyError(f"{url} answered with the items {indexes} to a request of {n_items}, counted from 0")
