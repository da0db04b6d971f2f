"""Thin client for jina-embeddings-v4 servers: text and images in, vectors out.

The calls are the published model's own, ``encode_text`` and ``encode_image``, and so are the vectors. Importing this
package costs numpy, Pillow and safetensors; the HTTP library is imported when a client is made.
"""

from jina_v4_client._model import TASKS, TRUNCATE_DIMS, Task
from jina_v4_client.async_client import AsyncEmbeddingsClient
from jina_v4_client.client import EmbeddingsClient
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
from jina_v4_client.results import Both, Embedded

__all__ = [
    "TASKS",
    "TRUNCATE_DIMS",
    "ArgumentError",
    "AsyncEmbeddingsClient",
    "BadReplyError",
    "Both",
    "Embedded",
    "EmbeddingsClient",
    "ImageError",
    "JinaV4Error",
    "ServerAuthenticationError",
    "ServerConnectionError",
    "ServerError",
    "ServerFailedError",
    "ServerRefusedError",
    "ServerTimeoutError",
    "Task",
    "WrongServerError",
]
