"""A server of ours: the request for a batch, and the vectors in its reply.

It is asked for safetensors. Whatever stands between may not carry them, so JSON is read as well, with base64 or with
plain numbers in it; the vectors are the same.

Nothing is taken on trust: a reply that does not hold one whole vector of length 1 for each item, or one such row for
each of its tokens, is an error.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from jina_v4_client._batches import Batch, Item, Texts, together
from jina_v4_client._json_reply import read_tensors
from jina_v4_client._model import MULTIVECTOR_DIM
from jina_v4_client._pooling import UNIT_TOLERANCE, Vector, row_lengths
from jina_v4_client._server import Server
from jina_v4_client._wire import WIRE_FORMATS, Reply, Request, WireDtype, WireFormat
from jina_v4_client.errors import BadReplyError, ServerError

SAFETENSORS = "application/x-safetensors"
JSON = "application/json"
MAX_ITEMS = 2048  # of a request, unless the server is set otherwise
MAX_TOKENS = 16384  # one scheduling step on a GPU, an eighth of what a server on a CPU takes at a time
MAX_BYTES = 32 * 2**20  # half of what it takes in one body


def write_request(server: Server, batch: Batch, wire_dtype: WireDtype, wire_format: WireFormat) -> Request:
    """Write the request for one batch."""
    body: dict[str, Any] = {"model": server.model, "task": server.task}
    body["outputs"] = list(batch.outputs)
    if isinstance(batch, Texts):
        body |= {"input": [{"text": text} for text in batch.items], "prompt_name": batch.prompt_name or "none"}
        # Over its own limit the server refuses max_length; without it, it refuses only texts that are too long.
        if batch.max_length <= server.max_model_len:
            body["max_length"] = batch.max_length
    else:
        body["input"] = [{"image": image.data_uri()} for image in batch.items]
        if batch.max_pixels is not None:
            body["max_pixels"] = batch.max_pixels
    if batch.truncate_dim is not None and "dense" in batch.outputs:
        body["dimensions"] = batch.truncate_dim
    if wire_format != "safetensors":
        body["encoding_format"] = wire_format
        return Request("/v1/embeddings", body, JSON)
    accept = SAFETENSORS if wire_dtype == "float32" else f"{SAFETENSORS}; dtype={wire_dtype}"
    return Request("/v1/embeddings", body, accept)


def next_format(wire_format: WireFormat, error: ServerError) -> WireFormat | None:
    """Give the format to try after a refusal; None if it was not the format that was refused."""
    formats = {"safetensors": (406,), "base64": (400, 422), "float": ()}
    named = wire_format == "safetensors" or error.param in ("encoding_format", "embedding_type")
    if error.status_code not in formats[wire_format] or not named:
        return None
    return WIRE_FORMATS[WIRE_FORMATS.index(wire_format) + 1]


def is_json(reply: Reply) -> bool:
    """Tell whether a reply came as JSON."""
    return _media_type(reply) == JSON


def read_reply(
    server: Server, batch: Batch, reply: Reply, wire_dtype: WireDtype, wire_format: WireFormat
) -> list[Item]:
    """Read the vectors of one batch, in its order.

    Returns:
        For each item (dim,) or, of a multi-vector, (n_tokens, 128) float32, every row of unit length, or both.

    Raises:
        BadReplyError: anything else than these came.
    """
    if is_json(reply):
        tensors, wire_dtype = read_tensors(reply, server.url, len(batch.items), batch.outputs), "float32"
    elif wire_format == "safetensors":
        tensors = _load(reply, server.url)
    else:
        kind = _media_type(reply) or "no content type"
        raise BadReplyError(f"{server.url} answered with {kind} where {JSON} was asked for")
    expected = {*batch.outputs, *(("offsets",) if "multivector" in batch.outputs else ())}
    if tensors.keys() != expected:
        raise BadReplyError(f"{server.url} answered with {_named(tensors)} where {_named(expected)} was asked for")
    dense = _read_dense(tensors["dense"], server.url, batch, wire_dtype) if "dense" in batch.outputs else None
    if "multivector" not in batch.outputs:
        return together(dense, None)
    rows = _read_rows(tensors["multivector"], "multivector", server.url, wire_dtype)  # (n_rows, 128)
    if rows.shape[1] != MULTIVECTOR_DIM:
        raise BadReplyError(f"{server.url} answered with rows of {rows.shape[1]} numbers, not {MULTIVECTOR_DIM}")
    ends = _read_ends(tensors["offsets"], server.url, len(batch.items), len(rows))
    # Each array is the caller's own, so that one of them does not keep the whole reply in memory.
    return together(dense, [part.copy() for part in np.split(rows, ends)])


def _read_dense(tensor: NDArray[Any], url: str, batch: Batch, wire_dtype: WireDtype) -> list[Vector]:
    """Give the dense vector of each item, (dim,) float32, an array of its own."""
    rows = _read_rows(tensor, "dense", url, wire_dtype)  # (n_items, dim)
    if len(rows) != len(batch.items):
        raise BadReplyError(f"{url} answered with {len(rows)} vectors to a request of {len(batch.items)}")
    if batch.truncate_dim not in (None, rows.shape[1]):
        raise BadReplyError(
            f"{url} answered with {rows.shape[1]} dimensions where truncate_dim={batch.truncate_dim} was asked"
        )
    return [row.copy() for row in rows]


def _media_type(reply: Reply) -> str:
    return reply.headers.get("content-type", "").partition(";")[0].strip().lower()


def _load(reply: Reply, url: str) -> dict[str, NDArray[Any]]:
    if _media_type(reply) != SAFETENSORS:
        kind = reply.headers.get("content-type", "no content type")
        raise BadReplyError(
            f"{url} answered with {kind} where {SAFETENSORS} was asked for; install the client of the server's version"
        )
    try:
        return load(reply.content)
    except (SafetensorError, KeyError, ValueError) as error:  # KeyError: a dtype that numpy does not have
        raise BadReplyError(f"{url} answered with bytes that are no safetensors ({error})") from error


def _read_rows(rows: NDArray[Any], name: str, url: str, wire_dtype: WireDtype) -> Vector:
    """Give rows as (n, dim) float32 of unit length."""
    if rows.ndim != 2 or rows.size == 0 or rows.dtype != np.dtype(wire_dtype):
        raise BadReplyError(
            f"{url} answered with {name} of {rows.dtype} {rows.shape} where a table of {wire_dtype} was asked for"
        )
    wide = rows.astype(np.float32)
    lengths = row_lengths(wide)  # (n,)
    wrong = np.flatnonzero(~(np.abs(lengths - 1) < UNIT_TOLERANCE))  # NaN and infinity fail here too
    if wrong.size:
        raise BadReplyError(
            f"{url} answered with a vector of length {lengths[wrong[0]]:g} instead of 1 in row {wrong[0]} of {name}"
        )
    # float32 is handed on bit for bit; rounded to float16 a vector is no longer of length 1.
    if wire_dtype == "float32":
        return wide
    unit: Vector = (wide / lengths[:, None]).astype(np.float32)
    return unit


def _read_ends(offsets: NDArray[Any], url: str, n_items: int, n_rows: int) -> NDArray[np.int64]:
    """Give where each item's rows end, but for the last's."""
    if offsets.dtype != np.int64 or offsets.shape != (n_items + 1,):
        raise BadReplyError(
            f"{url} answered with offsets of {offsets.dtype} {offsets.shape} where int64 {(n_items + 1,)} was asked for"
        )
    if offsets[0] != 0 or offsets[-1] != n_rows or not (offsets[1:] > offsets[:-1]).all():
        raise BadReplyError(f"{url} answered with offsets that do not share out its {n_rows} rows: nothing is returned")
    ends: NDArray[np.int64] = offsets[1:-1]
    return ends


def _named(names: Iterable[str]) -> str:
    line = " and ".join(sorted(names)) or "nothing"
    return line if line.isprintable() and len(line) <= 100 else f"{line[:100]!a}..."
