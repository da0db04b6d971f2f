"""Thin client for jina-embeddings-v4 servers: text and images in, vectors out.

The calls are the published model's own, ``encode_text`` and ``encode_image``, and so are the vectors. Importing this
package costs numpy, Pillow and safetensors; the HTTP library is imported when a client is made.
"""

import warnings

from jina_v4_client._images import ImageWarning
from jina_v4_client._model import TASKS, TRUNCATE_DIMS, Task
from jina_v4_client.client import AsyncEmbeddingsClient, EmbeddingsClient
from jina_v4_client.errors import (
    ArgumentError,
    BadReplyError,
    ImageError,
    JinaV4Error,
    ServerAuthenticationError,
    ServerConnectionError,
    ServerError,
    ServerFailedError,
    ServerRefusedError,
    ServerTimeoutError,
    WrongServerError,
)
from jina_v4_client.results import DenseAndMulti, PartialResult

__all__ = [
    "TASKS",
    "TRUNCATE_DIMS",
    "ArgumentError",
    "AsyncEmbeddingsClient",
    "BadReplyError",
    "DenseAndMulti",
    "EmbeddingsClient",
    "ImageError",
    "ImageWarning",
    "JinaV4Error",
    "PartialResult",
    "ServerAuthenticationError",
    "ServerConnectionError",
    "ServerError",
    "ServerFailedError",
    "ServerRefusedError",
    "ServerTimeoutError",
    "Task",
    "WrongServerError",
]


_OLD_NAMES = {"Both": DenseAndMulti, "Embedded": PartialResult}  # of version 0.1


def __getattr__(name: str) -> type:
    """Return a class by its old name."""
    if name not in _OLD_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = _OLD_NAMES[name].__name__
    warnings.warn(f"{name} is now called {new}; version 0.3 removes the old name", DeprecationWarning, stacklevel=2)
    return _OLD_NAMES[name]
