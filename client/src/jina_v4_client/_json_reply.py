"""Vectors in a JSON reply, in OpenAI's or Jina's form, as the tensors that a safetensors reply would hold."""

import base64
import binascii
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jina_v4_client._batches import Output
from jina_v4_client._wire import Reply, is_list_of_dicts, read_json
from jina_v4_client.errors import BadReplyError


def read_tensors(reply: Reply, url: str, n_items: int, outputs: Sequence[Output]) -> dict[str, NDArray[Any]]:
    """Read the vectors of a reply.

    Its items may stand in any order; each says which it is.

    Returns:
        As far as they are in `outputs`: dense (n_items, dim) float32, multivector (n_rows, dim) float32 with offsets
        (n_items + 1,) int64.

    Raises:
        BadReplyError: not one vector, or one list of rows, for each item.
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
    if "dense" in outputs:
        tensors["dense"] = _read_rows([entry.get("embedding") for entry in ordered], url)
    if "multivector" in outputs:
        lists = [rows for entry in ordered if isinstance(rows := entry.get("embeddings"), list)]
        if len(lists) != n_items:
            raise BadReplyError(f"{url} answered with an item that has no list of embeddings")
        tensors["multivector"] = _read_rows([row for rows in lists for row in rows], url)
        tensors["offsets"] = np.cumsum([0, *map(len, lists)], dtype=np.int64)
    return tensors


def _read_rows(values: Sequence[object], url: str) -> NDArray[np.float32]:
    """Give vectors, each a list of numbers or the base64 of little-endian float32, as (n, dim) float32."""
    rows = [_read_row(value, url) for value in values]
    widths = {len(row) for row in rows}
    if len(widths) > 1:
        raise BadReplyError(f"{url} answered one request with vectors of {sorted(widths)} dimensions")
    return np.stack(rows) if rows else np.empty((0, 0), np.float32)


def _read_row(value: object, url: str) -> NDArray[np.float32]:
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
