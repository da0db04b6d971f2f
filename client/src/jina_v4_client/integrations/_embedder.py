"""What the adapters of frameworks share: texts and images in, lists of numbers out, for threads and for coroutines."""

import asyncio
import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

from jina_v4_client._calls import check_known_task, check_max_pixels, check_truncate_dim
from jina_v4_client._images import ImageSource
from jina_v4_client._model import PromptName
from jina_v4_client.client import AsyncEmbeddingsClient, EmbeddingsClient
from jina_v4_client.errors import ArgumentError

Numbers = list[float]  # of one vector: (dim,), unit length

_TEXTS_A_REQUEST = 32
_IMAGES_A_REQUEST = 4


class Embedder:
    """One client for threads, and one for each event loop: connections belong to the loop that opened them.

    Args:
        base_url: of the server or gateway.
        api_key: its key; JINA_V4_API_KEY of the environment if None.
        task: "retrieval", "text-matching" or "code".
        truncate_dim: 128, 256, 512, 1024 or 2048 dimensions; all if None.
        max_pixels: larger images are scaled down to so many pixels; the server's limit if None.
        client_options: further arguments that both clients take.

    Raises:
        ArgumentError: one of these is not allowed.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        *,
        task: str,
        truncate_dim: int | None,
        max_pixels: int | None,
        client_options: Mapping[str, Any] | None,
    ) -> None:
        self._of_texts: dict[str, Any] = {
            "truncate_dim": check_truncate_dim(truncate_dim),
            "batch_size": _TEXTS_A_REQUEST,
        }
        self._of_images: dict[str, Any] = {
            "truncate_dim": truncate_dim,
            "max_pixels": check_max_pixels(max_pixels),
            "batch_size": _IMAGES_A_REQUEST,
        }
        self.api_key, self._base_url = api_key, base_url
        self._options = {**(client_options or {}), "task": check_known_task(task)}
        self._client = EmbeddingsClient(base_url, api_key, **self._options)
        self._of_loops: dict[asyncio.AbstractEventLoop, AsyncEmbeddingsClient] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return one with the same arguments and connections of its own: connections cannot be copied."""
        options = copy.deepcopy(self._options, memo)
        return type(self)(
            self._base_url,
            self.api_key,
            task=options.pop("task"),
            truncate_dim=self._of_images["truncate_dim"],
            max_pixels=self._of_images["max_pixels"],
            client_options=options,
        )

    def texts(self, texts: Sequence[str], prompt_name: PromptName) -> list[Numbers]:
        """Embed texts, in their order; an empty list returns an empty list, as the frameworks expect."""
        if _is_empty("texts", texts):
            return []
        return [each.tolist() for each in self._client.encode_text(texts, prompt_name=prompt_name, **self._of_texts)]

    def images(self, images: Sequence[ImageSource]) -> list[Numbers]:
        """Embed images, in their order."""
        if _is_empty("images", images):
            return []
        return [each.tolist() for each in self._client.encode_image(images, **self._of_images)]

    async def atexts(self, texts: Sequence[str], prompt_name: PromptName) -> list[Numbers]:
        """Embed texts in the event loop that runs."""
        if _is_empty("texts", texts):
            return []
        vectors = await self._of_this_loop().encode_text(texts, prompt_name=prompt_name, **self._of_texts)
        return [each.tolist() for each in vectors]

    async def aimages(self, images: Sequence[ImageSource]) -> list[Numbers]:
        """Embed images in the event loop that runs."""
        if _is_empty("images", images):
            return []
        return [each.tolist() for each in await self._of_this_loop().encode_image(images, **self._of_images)]

    def close(self) -> None:
        """Close the connections of the calls without a loop."""
        self._client.close()

    async def aclose(self) -> None:
        """Close the connections of the event loop that runs; a later call in it opens others."""
        client = self._of_loops.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.close()

    def _of_this_loop(self) -> AsyncEmbeddingsClient:
        loop = asyncio.get_running_loop()
        if loop not in self._of_loops:
            for ended in [other for other in list(self._of_loops) if other.is_closed()]:
                self._of_loops.pop(ended, None)  # nobody can close its connections any more
            self._of_loops[loop] = AsyncEmbeddingsClient(self._base_url, self.api_key, **self._options)
        return self._of_loops[loop]


def _is_empty(name: str, items: Sequence[object]) -> bool:
    """Tell whether a list is empty; refuse what is no list, of which the client would return a single vector."""
    if isinstance(items, str | bytes | bytearray) or not isinstance(items, Sequence):
        raise ArgumentError(f"{name} must be a list, not {type(items).__name__}; for one, send a list of one")
    return len(items) == 0
