"""Our server: the request for a batch, and the vectors in its reply.

The client asks for safetensors. A proxy in between may not pass that on, so JSON is read as well, with base64 or with
plain numbers; the vectors are the same.

Every reply is checked: one that does not hold a vector of length 1 for each item, or such a row for each of its tokens,
is an error.
"""

import base64
import binascii
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from jina_v4_client._calls import Batch
from jina_v4_client._model import MULTIVECTOR_DIM, Output
from jina_v4_client._server import (
    WIRE_FORMATS,
    Reply,
    Request,
    Send,
    Server,
    WireDtype,
    WireFormat,
    check_unchanged,
    is_list_of_dicts,
    read_json,
)
from jina_v4_client.errors import BadReplyError, ServerError
from jina_v4_client.results import UNIT_TOLERANCE, Item, Vector, row_lengths, together

SAFETENSORS = "application/x-safetensors"
JSON = "application/json"
MAX_ITEMS = 2048  # of a request, unless the server is set otherwise
MAX_TOKENS = 16384  # two scheduling steps on a large GPU, an eighth of what a server on a CPU accepts at a time


def batch_limits(whole: Batch) -> tuple[int, int]:
    """Return how many items and tokens go into one request."""
    return min(whole.call.batch_size, MAX_ITEMS), MAX_TOKENS


async def embed(server: Server, batch: Batch, send: Send, wire_dtype: WireDtype, priority: int) -> list[Item]:
    """Ask for the vectors of a batch, in the best format that the server speaks."""
    wire_format = server.wire_format
    try:
        reply = await send(lambda: write_request(server, batch, wire_dtype, wire_format, priority))
    except ServerError as error:
        if not _is_about_format(error, wire_format):
            raise
        server.speak(WIRE_FORMATS[WIRE_FORMATS.index(wire_format) + 1])
        return await embed(server, batch, send, wire_dtype, priority)
    check_unchanged(server, reply)
    vectors = read_reply(server, batch, reply, wire_dtype, wire_format)
    if wire_format == "safetensors" and _media_type(reply) == JSON:
        server.speak("base64")
    return vectors


def write_request(
    server: Server, batch: Batch, wire_dtype: WireDtype, wire_format: WireFormat, priority: int
) -> Request:
    """Write the request for one batch."""
    call = batch.call
    body: dict[str, Any] = {"model": server.model, "task": server.task, "outputs": list(call.outputs)}
    if batch.is_text:
        body |= {"input": [{"text": text} for text in batch.items], "prompt_name": call.prompt_name or "none"}
        # Over its own limit the server refuses max_length; without it, it refuses only texts that are too long.
        if call.max_length <= server.max_model_len:
            body["max_length"] = call.max_length
    elif batch.file is not None:
        content = base64.b64encode(batch.file.content).decode("ascii")
        body["input"] = [{"pdf": content, "pages": ",".join(str(page.number) for page in batch.items)}]
    else:
        body["input"] = [{"image": image.data_uri()} for image in batch.items]
    if call.max_pixels is not None and not batch.is_text:
        body["max_pixels"] = call.max_pixels
    if priority:
        body["priority"] = priority
    if call.truncate_dim is not None and "dense" in call.outputs:
        body["dimensions"] = call.truncate_dim
    if wire_format != "safetensors":
        body["encoding_format"] = wire_format
        return Request("/v1/embeddings", body, JSON)
    accept = SAFETENSORS if wire_dtype == "float32" else f"{SAFETENSORS}; dtype={wire_dtype}"
    return Request("/v1/embeddings", body, accept)


def _is_about_format(error: ServerError, wire_format: WireFormat) -> bool:
    """Tell whether a refusal is of the format, and not of what was asked for."""
    if wire_format == "safetensors":
        return error.status_code == 406
    is_named = error.param in ("encoding_format", "embedding_type")
    return wire_format == "base64" and error.status_code in (400, 422) and is_named


def read_reply(
    server: Server, batch: Batch, reply: Reply, wire_dtype: WireDtype, wire_format: WireFormat
) -> list[Item]:
    """Read the vectors of one batch, in its order: (dim,) or (n_tokens, 128) float32 of unit length, or both."""
    outputs, kind = batch.call.outputs, _media_type(reply)
    expected_kind = SAFETENSORS if wire_format == "safetensors" else JSON
    if kind == JSON:
        tensors, wire_dtype = _read_json_tensors(reply, server.url, len(batch.places), outputs), "float32"
    elif kind == expected_kind:
        tensors = _load(reply, server.url)
    else:
        raise BadReplyError(
            f"{server.url} answered with {kind or 'no content type'} where {expected_kind} was asked for; install the "
            "client of the server's version"
        )
    if (file := batch.file) is not None:
        found, counts, _ = (np.ravel(tensors.pop(name, ())).tolist() for name in ("pages", "n_pages", "items"))
        if found != [page.number for page in batch.items] or len({*counts}) != 1 or counts[0] < found[-1]:
            raise BadReplyError(f"{server.url} answered with the pages {found[:20]} where others were requested")
        file.n_pages = int(counts[0])
    expected = {*outputs, *(("offsets",) if "multivector" in outputs else ())}
    if tensors.keys() != expected:
        raise BadReplyError(f"{server.url} answered with {_named(tensors)} where {_named(expected)} was asked for")
    dense = _read_dense(tensors["dense"], server.url, batch, wire_dtype) if "dense" in outputs else None
    if "multivector" not in outputs:
        return together(dense, None)
    rows = _read_rows(tensors["multivector"], "multivector", server.url, wire_dtype)  # (n_rows, 128)
    if rows.shape[1] != MULTIVECTOR_DIM:
        raise BadReplyError(f"{server.url} answered with rows of {rows.shape[1]} numbers, not {MULTIVECTOR_DIM}")
    ends = _read_ends(tensors["offsets"], server.url, len(batch.places), len(rows))
    # Each array is the caller's own, so that one of them does not keep the whole reply in memory.
    return together(dense, [part.copy() for part in np.split(rows, ends)])


def _read_dense(tensor: NDArray[Any], url: str, batch: Batch, wire_dtype: WireDtype) -> list[Vector]:
    """Return the dense vector of each item, (dim,) float32, each an array of its own."""
    rows = _read_rows(tensor, "dense", url, wire_dtype)  # (n_items, dim)
    if len(rows) != len(batch.places):
        raise BadReplyError(f"{url} answered with {len(rows)} vectors to a request of {len(batch.places)}")
    if (dim := batch.call.truncate_dim) not in (None, rows.shape[1]):
        raise BadReplyError(f"{url} answered with {rows.shape[1]} dimensions where truncate_dim={dim} was asked")
    return [row.copy() for row in rows]


def _media_type(reply: Reply) -> str:
    return reply.headers.get("content-type", "").partition(";")[0].strip().lower()


def _load(reply: Reply, url: str) -> dict[str, NDArray[Any]]:
    try:
        return load(reply.content)
    except (SafetensorError, KeyError, ValueError) as error:  # KeyError: a dtype that numpy does not have
        raise BadReplyError(f"{url} answered with bytes that are no safetensors ({error})") from error


def _read_rows(rows: NDArray[Any], name: str, url: str, wire_dtype: WireDtype) -> Vector:
    """Return rows as (n, dim) float32 of unit length."""
    if rows.ndim != 2 or rows.size == 0 or rows.dtype != np.dtype(wire_dtype):
        raise BadReplyError(
            f"{url} answered with {name} of {rows.dtype} {rows.shape} where a table of {wire_dtype} was asked for"
        )
    wide = rows.astype(np.float32, copy=False)
    lengths = row_lengths(wide)  # (n,)
    wrong = np.flatnonzero(~(np.abs(lengths - 1) < UNIT_TOLERANCE))  # NaN and infinity fail here too
    if wrong.size:
        raise BadReplyError(
            f"{url} answered with a vector of length {lengths[wrong[0]]:g} instead of 1 in row {wrong[0]} of {name}"
        )
    # float32 is returned bit for bit; rounded to float16 a vector is no longer of length 1.
    if wire_dtype == "float32":
        return wide
    unit: Vector = (wide / lengths[:, None]).astype(np.float32)
    return unit


def _read_ends(offsets: NDArray[Any], url: str, n_items: int, n_rows: int) -> NDArray[np.int64]:
    """Return where each item's rows end, without the last item's."""
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


def _read_json_tensors(reply: Reply, url: str, n_items: int, outputs: Sequence[Output]) -> dict[str, NDArray[Any]]:
    """Read JSON, in OpenAI's or Jina's form, as the tensors that a safetensors reply would hold.

    Its items may come in any order; each has its index.
    """
    entries = read_json(reply, url).get("data")
    if not is_list_of_dicts(entries):
        raise BadReplyError(f"{url} answered with JSON that lists no vectors")
    indexes = [entry.get("index") for entry in entries]
    places = {index: place for place, index in enumerate(indexes) if type(index) is int}
    if len(indexes) != n_items or places.keys() != set(range(n_items)):
        shown = f"{indexes[:20]}{'...' if len(indexes) > 20 else ''}"
        raise BadReplyError(f"{url} answered with the items {shown} to a request of {n_items}, counted from 0")
    ordered = [entries[places[index]] for index in range(n_items)]
    tensors: dict[str, NDArray[Any]] = {}
    for name, key in (("pages", "page"), ("n_pages", "n_pages")) if "page" in ordered[0] else ():
        tensors[name] = np.array([count if type(count := entry.get(key)) is int else 0 for entry in ordered])
    if "dense" in outputs:
        tensors["dense"] = _read_json_rows([entry.get("embedding") for entry in ordered], url)
    if "multivector" in outputs:
        lists = [rows for entry in ordered if isinstance(rows := entry.get("embeddings"), list)]
        if len(lists) != n_items:
            raise BadReplyError(f"{url} answered with an item that has no list of embeddings")
        tensors["multivector"] = _read_json_rows([row for rows in lists for row in rows], url)
        tensors["offsets"] = np.cumsum([0, *map(len, lists)], dtype=np.int64)
    return tensors


def _read_json_rows(values: Sequence[object], url: str) -> NDArray[np.float32]:
    """Return vectors, each a list of numbers or the base64 of little-endian float32, as (n, dim) float32."""
    rows = [_read_json_row(value, url) for value in values]
    widths = {len(row) for row in rows}
    if len(widths) > 1:
        raise BadReplyError(f"{url} answered one request with vectors of {sorted(widths)} dimensions")
    return np.stack(rows) if rows else np.empty((0, 0), np.float32)


def _read_json_row(value: object, url: str) -> NDArray[np.float32]:
    try:
        if isinstance(value, str):
            return np.frombuffer(base64.b64decode(value, validate=True), "<f4").astype(np.float32)
        row = np.array(value if isinstance(value, list) else None, dtype=np.float64)
    except (binascii.Error, ValueError, TypeError, OverflowError) as error:
        raise BadReplyError(f"{url} answered with a vector that cannot be read ({error})") from error
    if row.ndim != 1:
        raise BadReplyError(f"{url} answered with a vector that is no list of numbers")
    with np.errstate(over="ignore"):  # what is out of range becomes infinity, and is refused with its length
        return row.astype(np.float32)
