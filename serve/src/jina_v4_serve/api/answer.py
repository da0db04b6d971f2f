"""From vectors to the bytes of an answer: JSON in OpenAI's and Jina's shape, or one safetensors body.

Bits: `ubinary` is the bits of v > 0, the first in the highest place of a byte; `binary` is that byte minus 128.
base64 is of little-endian float32.
"""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from safetensors.numpy import save

from jina_v4_serve.api.request import Asked
from jina_v4_serve.api.schema import Encoding
from jina_v4_serve.api.vectors import Floats, Vectors

SAFETENSORS = "application/x-safetensors"


def as_json(asked: Asked, items: Sequence[Vectors]) -> bytes:
    """Write an answer as JSON.

    Args:
        asked: the request.
        items: what each prompt gave; of a late-chunked request one prompt with a dense row a part.
    """
    data: list[dict[str, Any]] = []
    if asked.late_chunking:
        data = [{"object": "embedding", "embedding": _encode(asked, row)} for row in items[0].dense]
    else:
        for vectors in items:
            entry: dict[str, Any] = {"object": "embedding" if "dense" in asked.outputs else "embeddings"}
            if "dense" in asked.outputs:
                entry["embedding"] = _encode(asked, vectors.dense[0])
            if "multivector" in asked.outputs:
                entry["embeddings"] = [_encode(asked, row) for row in vectors.multivector]
            data.append(entry)
    for index, entry in enumerate(data):
        entry["index"] = index
    n_tokens = sum(vectors.n_tokens for vectors in items)
    content = {
        "object": "list",
        "model": asked.model,
        "data": data,
        "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
    }
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def as_safetensors(asked: Asked, items: Sequence[Vectors], dtype: str) -> bytes:
    """Write an answer as one safetensors body.

    Args:
        asked: the request.
        items: as in `as_json`.
        dtype: float32 or float16, of the vectors.

    Returns:
        Tensors `dense` (n_items, dimensions), and `multivector` (n_rows, 128) with `offsets` (n_items + 1,) int64: item
        i has the rows offsets[i] to offsets[i + 1]. The header's metadata hold model, prompt_tokens and total_tokens.
    """
    tensors: dict[str, NDArray[Any]] = {}
    if "dense" in asked.outputs:
        tensors["dense"] = np.concatenate([vectors.dense for vectors in items]).astype(dtype)  # (n_items, dimensions)
    if "multivector" in asked.outputs:
        rows = [vectors.multivector for vectors in items]
        tensors["multivector"] = np.concatenate(rows).astype(dtype)  # (n_rows, 128)
        tensors["offsets"] = np.cumsum([0, *map(len, rows)], dtype=np.int64)  # (n_items + 1,)
    n_tokens = str(sum(vectors.n_tokens for vectors in items))
    metadata = {"model": asked.model, "prompt_tokens": n_tokens, "total_tokens": n_tokens}
    body: bytes = save(tensors, metadata)
    return body


def encode(row: Floats, encoding: Encoding) -> Any:
    """Write one vector in one encoding: a float32 array or a list of ints for JSON, or a base64 string."""
    if encoding == "float":
        return np.ascontiguousarray(row)
    if encoding == "base64":
        return base64.b64encode(row.astype("<f4").tobytes()).decode("ascii")
    packed = np.packbits(row > 0)  # (dimensions / 8,) uint8
    return packed.tolist() if encoding == "ubinary" else (packed.astype(np.int16) - 128).tolist()


def _encode(asked: Asked, row: Floats) -> Any:
    if asked.keyed:
        return {encoding: encode(row, encoding) for encoding in asked.encodings}
    return encode(row, asked.encodings[0])
