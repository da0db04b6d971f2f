"""From vectors to a reply: the JSON of OpenAI and Jina, or a safetensors body; and the headers for all forms.

int8: the numbers of a row in steps of 1/127 of the largest magnitude, as the client's `quantize_int8` makes them; uint8
adds 128. JSON has no step: every vector has unit length, so a client scales the codes to that. Bits: `ubinary` has the
bits of v > 0, the first in the highest bit of a byte; `binary` is that byte minus 128. base64: little-endian float32.
"""

import base64
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from jina_v4_serve.api.errors import ApiError, invalid, shorten
from jina_v4_serve.api.request import EmbedRequest, Encoding
from jina_v4_serve.api.vectors import Floats, Origin, Vectors

SAFETENSORS = "application/x-safetensors"
PROMPT = "x-jina-v4-prompt"
WARNING = "x-jina-v4-warning"
_INT8_MAX = 127  # symmetric: -128 is not used
_MOST_NAMED = 20  # proxies allow headers of a few thousand bytes
_DTYPES = ("float32", "float16")
_REFUSED = re.compile(r"q=0(\.0*)?")  # the client does not accept this media range
_PLAIN_NAME = re.compile(r"[\w.\[\]-]{1,64}", re.ASCII)


def safetensors_dtype(request: EmbedRequest, accept: str) -> str | None:
    """Return the dtype of the safetensors body that an Accept header requests; None for JSON.

    Raises:
        ApiError: 406 for a dtype that is not offered, 422 for several encodings in a safetensors body.
    """
    for media_range in accept.lower().split(","):
        kind, *parameters = (part.strip() for part in media_range.split(";"))
        if kind == SAFETENSORS and not any(_REFUSED.fullmatch(parameter) for parameter in parameters):
            named = [parameter.removeprefix("dtype=") for parameter in parameters if parameter.startswith("dtype=")]
            dtype = named[0] if named else "float32"
            if dtype not in _DTYPES:
                message = f"Accept: dtype={shorten(dtype)} is not offered; choose {' or '.join(_DTYPES)}"
                raise ApiError(406, message, code="NOT_ACCEPTABLE")
            if len(request.encodings) > 1:
                raise invalid("embedding_type", "a safetensors body has one embedding_type; send one, or accept JSON")
            return dtype
    return None


def write(request: EmbedRequest, items: Sequence[Vectors], _: str) -> dict[str, Any]:
    """Return the content of the JSON reply of `POST /v1/embeddings`.

    Args:
        request: the answered request.
        items: the vectors of each prompt; a late-chunked request has one prompt, with a dense row per part.
    """
    data: list[dict[str, Any]] = []
    has_pages = _has_pages(items)
    if request.late_chunking:
        data = [{"object": "embedding", "embedding": _encode(request, row)} for row in items[0].dense]
    else:
        for vectors in items:
            entry: dict[str, Any] = {"object": "embedding" if "dense" in request.outputs else "embeddings"}
            if "dense" in request.outputs:
                entry["embedding"] = _encode(request, vectors.dense[0])
            if "multivector" in request.outputs:
                entry["embeddings"] = [_encode(request, row) for row in vectors.multivector]
            data.append(entry | (_place(vectors.origin) if has_pages else {}))
    for index, entry in enumerate(data):
        entry["index"] = index
    return {"object": "list", "model": request.model, "data": data, "usage": usage(items)}


def usage(items: Sequence[Vectors]) -> dict[str, int]:
    """Return the `usage` of a reply."""
    n_tokens = sum(vectors.n_tokens for vectors in items)
    return {"prompt_tokens": n_tokens, "total_tokens": n_tokens}


def as_safetensors(request: EmbedRequest, items: Sequence[Vectors], dtype: str) -> bytes:
    """Write a reply as one safetensors body.

    Args:
        request: the answered request.
        items: as in `write`.
        dtype: float32 or float16, for vectors in floats.

    Returns:
        The tensors `dense` (n_items, dimensions), and `multivector` (n_rows, 128) with `offsets` (n_items + 1,) int64:
        item i has the rows offsets[i] to offsets[i + 1]. For int8 and uint8, `dense_scales` (n_items,) and
        `multivector_scales` (n_rows,) have the step of each row in float32. Bits have an eighth of the columns. If the
        request has PDF files, each page is an item here; `items`, `pages` and `n_pages` (n_items,) int64 are then the
        index in the request, the page from 1, and the pages of the file. The last two are 0 for texts and images. The
        metadata in the header are model, prompt_tokens and total_tokens.
    """
    tensors: dict[str, NDArray[Any]] = {}
    if "dense" in request.outputs:
        dense = np.concatenate([vectors.dense for vectors in items])  # (n_items, dimensions)
        tensors |= _tensors("dense", dense, request.encodings[0], dtype)
    if "multivector" in request.outputs:
        rows = [vectors.multivector for vectors in items]
        tensors |= _tensors("multivector", np.concatenate(rows), request.encodings[0], dtype)  # of (n_rows, 128)
        tensors["offsets"] = np.cumsum([0, *map(len, rows)], dtype=np.int64)  # (n_items + 1,)
    if _has_pages(items):
        origins = [vectors.origin for vectors in items]
        tensors["items"] = np.array([origin.item for origin in origins], dtype=np.int64)  # (n,)
        tensors["pages"] = np.array([origin.page or 0 for origin in origins], dtype=np.int64)  # (n,)
        tensors["n_pages"] = np.array([origin.n_pages or 0 for origin in origins], dtype=np.int64)  # (n,)
    metadata = {"model": request.model, **{name: str(n_tokens) for name, n_tokens in usage(items).items()}}
    body: bytes = save(tensors, metadata)
    return body


def _has_pages(items: Sequence[Vectors]) -> bool:
    return any(vectors.origin.page is not None for vectors in items)


def _place(origin: Origin) -> dict[str, int]:
    """Return the fields of an entry for its item in the request, and its page."""
    page = {} if origin.page is None else {"page": origin.page, "n_pages": origin.n_pages or 0}
    return {"item": origin.item, **page}


def headers(clipped: Sequence[str], *requests: EmbedRequest) -> dict[str, str]:
    """Return the headers of a reply: the prompts that were used, and warnings if there are any.

    Args:
        clipped: the paths of images with more than 8 bits per pixel, in any order.
        requests: the parts of the answered request.
    """
    used = dict.fromkeys(name for request in requests for name in request.prompts_used)
    parts = []
    if clipped:
        in_order = sorted(clipped, key=lambda path: (len(path), path))
        parts.append(f"more than 8 bits per pixel, values over 255 read as 255: {_named(in_order)}")
    for request in requests:
        if prefixed := request.prefixed:
            prefix = request.prefix.rstrip()
            parts.append(f"texts that already began with '{prefix}', which was added again: {_named(prefixed)}")
        if request.left_out:
            parts.append(f"instructions left out, as the model's prompt has none: {_named(request.left_out)}")
        if request.ignored:
            parts.append(f"unknown fields ignored: {_named(request.ignored)}")
    return {PROMPT: ", ".join(used)} | ({WARNING: "; ".join(parts)} if parts else {})


def _named(names: Sequence[str]) -> str:
    shown = [name if _PLAIN_NAME.fullmatch(name) else "?" for name in names[:_MOST_NAMED]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def encode(row: Floats, encoding: Encoding) -> Any:
    """Write one vector in one encoding: a float32 array or a list of ints for JSON, or a base64 string."""
    if encoding == "float":
        return np.ascontiguousarray(row)
    if encoding == "base64":
        return base64.b64encode(row.astype("<f4").tobytes()).decode("ascii")
    return _codes(row[None], encoding)[0][0].tolist()


def _codes(rows: Floats, encoding: Encoding) -> tuple[NDArray[Any], Floats | None]:
    """Return the codes of rows (n, dimensions), and for int8 and uint8 the steps (n,) float32."""
    if encoding in ("int8", "uint8"):
        steps = np.abs(rows).max(axis=1) / np.float32(_INT8_MAX)  # (n,)
        codes = np.rint(rows / np.where(steps > 0, steps, np.float32(1))[:, None]).astype(np.int16)  # (n, dimensions)
        return (codes.astype(np.int8) if encoding == "int8" else (codes + 128).astype(np.uint8)), steps
    packed = np.packbits(rows > 0, axis=1)  # (n, dimensions / 8) uint8
    return (packed if encoding == "ubinary" else (packed.astype(np.int16) - 128).astype(np.int8)), None


def _tensors(name: str, rows: Floats, encoding: Encoding, dtype: str) -> dict[str, NDArray[Any]]:
    if encoding in ("float", "base64"):
        return {name: rows.astype(dtype)}
    codes, steps = _codes(rows, encoding)
    return {name: codes} if steps is None else {name: codes, f"{name}_scales": steps}


def _encode(request: EmbedRequest, row: Floats) -> Any:
    if len(request.encodings) > 1:  # a dict by encoding
        return {encoding: encode(row, encoding) for encoding in request.encodings}
    return encode(row, request.encodings[0])
