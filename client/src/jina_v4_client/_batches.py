"""Batches of texts and images: the request for each, and the vectors in its reply.

Nothing is taken on trust: a reply that does not hold one whole, finite vector for each item, in order, is an error.
"""

import base64
import binascii
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jina_v4_client._images import PreparedImage
from jina_v4_client._model import MAX_PIXELS, MIN_PIXELS, count_image_tokens
from jina_v4_client._pooling import STOCK_FLAGS, UNIT_TOLERANCE, Vector, check_rows, pool_image, pool_text
from jina_v4_client._server import Server, check_unchanged
from jina_v4_client._wire import Reply, Request, is_list_of_dicts, read_json
from jina_v4_client.errors import BadReplyError, WrongServerError

# A reply of /pooling describes its items in one header, some 130 bytes each; HTTP libraries refuse one over 100 KB.
_MAX_STOCK_TEXTS = 256


@dataclass(frozen=True)
class TextBatch:
    """Texts of one request, prefix included."""

    texts: Sequence[str]
    max_length: int
    truncate_dim: int | None


@dataclass(frozen=True)
class ImageBatch:
    """Images of one request."""

    images: Sequence[PreparedImage]
    max_pixels: int | None
    truncate_dim: int | None


def text_batches(
    server: Server, texts: Sequence[str], *, batch_size: int, max_length: int, truncate_dim: int | None
) -> Iterator[TextBatch]:
    """Cut texts into what goes into one request."""
    size = batch_size if server.pools else min(batch_size, _MAX_STOCK_TEXTS)
    for start in range(0, len(texts), size):
        yield TextBatch(texts[start : start + size], max_length, truncate_dim)


def image_batches(
    server: Server,
    images: Sequence[PreparedImage],
    *,
    batch_size: int,
    max_pixels: int | None,
    truncate_dim: int | None,
) -> Iterator[ImageBatch]:
    """Cut images into what goes into one request; /pooling takes one conversation, so one image."""
    size = batch_size if server.pools else 1
    for start in range(0, len(images), size):
        yield ImageBatch(images[start : start + size], max_pixels, truncate_dim)


def batch_request(server: Server, batch: TextBatch | ImageBatch) -> Request:
    """Write the request for one batch."""
    body: dict[str, Any] = {"model": server.model}
    if isinstance(batch, TextBatch):
        body["input"] = list(batch.texts)
        # Beyond its own limit a server refuses to truncate; without truncation it refuses only texts that are too long.
        if batch.max_length <= server.max_model_len:
            body |= {"truncate_prompt_tokens": batch.max_length, "truncation_side": "right"}
    else:
        conversations = [_conversation(image) for image in batch.images]
        body["messages"] = conversations if server.pools else conversations[0]
        if batch.max_pixels is not None:
            # vLLM fails on one of the two alone.
            body["mm_processor_kwargs"] = {"min_pixels": MIN_PIXELS, "max_pixels": batch.max_pixels}
    if not server.pools:
        body |= {"task": "token_embed", "use_activation": False}
        body |= {"encoding_format": "bytes", "embed_dtype": "float32", "endianness": "little"}
        return Request("/pooling", body)
    body["encoding_format"] = "base64"
    if batch.truncate_dim is not None:
        body["dimensions"] = batch.truncate_dim
    return Request("/v1/embeddings", body)


def read_batch(server: Server, batch: TextBatch | ImageBatch, reply: Reply) -> list[Vector]:
    """Read the vectors of one batch, each (dim,) float32 of unit length, in the order of the batch.

    Args:
        server: that was asked, with its frame if it is a stock one and these are images.
        batch: that was sent.
        reply: to its :func:`batch_request`.

    Raises:
        BadReplyError: not one whole vector for each item.
        WrongServerError: another server answered than the one that was found at first, or one set up in another way.
    """
    check_unchanged(server, reply)
    if isinstance(batch, TextBatch):
        if server.pools:
            return _read_vectors(reply, server.url, len(batch.texts), batch.truncate_dim)
        return [pool_text(rows, batch.truncate_dim) for rows in _read_rows(reply, server.url, len(batch.texts))]
    if server.pools:
        return _read_vectors(reply, server.url, len(batch.images), batch.truncate_dim)
    if server.frame is None:
        raise ValueError("images of a stock server are pooled within the frame of its image prompt")
    max_pixels = MAX_PIXELS if batch.max_pixels is None else batch.max_pixels
    return [
        pool_image(rows, server.frame, count_image_tokens(image.width, image.height, max_pixels), batch.truncate_dim)
        for rows, image in zip(_read_rows(reply, server.url, len(batch.images)), batch.images, strict=True)
    ]


def check_widths(vectors: Sequence[Vector]) -> None:
    """Refuse vectors of several batches that differ in their dimensions."""
    dims = sorted({len(vector) for vector in vectors})
    if len(dims) != 1:
        raise BadReplyError(f"the server answered one call with vectors of {dims} dimensions: nothing is returned")


def _conversation(image: PreparedImage) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": image.data_uri()}}]}]


def _read_vectors(reply: Reply, url: str, n_items: int, truncate_dim: int | None) -> list[Vector]:
    items = read_json(reply, url).get("data")
    if not is_list_of_dicts(items):
        raise BadReplyError(f"{url} answered without a list of embeddings")
    _check_indexes(items, url, n_items)
    vectors = [_decode_vector(item.get("embedding"), url) for item in items]
    check_widths(vectors)
    if truncate_dim is not None and len(vectors[0]) != truncate_dim:
        raise BadReplyError(
            f"{url} answered with {len(vectors[0])} dimensions where truncate_dim={truncate_dim} was asked"
        )
    for index, vector in enumerate(vectors):
        length = float(np.linalg.norm(vector.astype(np.float64)))
        if not abs(length - 1) < UNIT_TOLERANCE:  # NaN and infinity fail here too
            raise BadReplyError(f"{url} answered with a vector of length {length:g} instead of 1 for item {index}")
    return vectors


def _decode_vector(embedding: object, url: str) -> Vector:
    if not isinstance(embedding, str):
        raise BadReplyError(f"{url} answered with an embedding that is not base64, though base64 was asked for")
    try:
        content = base64.b64decode(embedding, validate=True)
        # frombuffer looks into the reply's bytes, which nobody may write to; the caller gets an array of its own.
        return np.frombuffer(content, "<f4").astype(np.float32)
    except (binascii.Error, ValueError) as error:
        raise BadReplyError(f"{url} answered with an embedding that is no base64 of float32 ({error})") from error


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
