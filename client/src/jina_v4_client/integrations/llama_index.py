"""LlamaIndex's `MultiModalEmbedding` by a server of this model. It needs the extra ``llama-index``."""

import copy
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any, Self

from jina_v4_client._images import ImageSource
from jina_v4_client.errors import ArgumentError
from jina_v4_client.integrations._embedder import Embedder, Numbers

try:
    from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr
    from llama_index.core.embeddings import MultiModalEmbedding
    from llama_index.core.schema import ImageType
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"LlamaIndex's adapter needs {error.name}; install it with: pip install 'jina-v4-client[llama-index]'",
        name=error.name,
    ) from error

__all__ = ["JinaV4Embedding"]


class JinaV4Embedding(MultiModalEmbedding):
    """A jina-embeddings-v4 server as LlamaIndex's embedding of texts and images, which share one space.

    Texts are passages, queries are queries. The key is in no field, so in nothing that is printed, dumped or pickled:
    what is loaded again takes JINA_V4_API_KEY. `embeddings_cache` of LlamaIndex knows texts without their prompt, so a
    query would get the vector of the same words as a passage: it is refused, but for text-matching, which has one
    prompt.

    The arguments are fixed; :meth:`model_copy` makes an embedding with others.

    Call :meth:`close` at the end. Coroutines have connections of their own in each event loop; await :meth:`aclose`
    in it.

    Args:
        base_url: the server's or gateway's address.
        api_key: its key; JINA_V4_API_KEY of the environment if None.
        task: "retrieval", "text-matching" or "code".
        truncate_dim: 128, 256, 512, 1024 or 2048 dimensions; all of the model's if None.
        max_pixels: larger images are scaled down to so many pixels; the server's limit if None.
        client_options: further arguments of :class:`jina_v4_client.EmbeddingsClient`, without `http_client`.
        **fields: those of LlamaIndex: embed_batch_size, callback_manager, num_workers, rate_limiter, embeddings_cache.

    Raises:
        ArgumentError: one of these is not allowed.
    """

    # A misspelt argument is an error, which shows no values: one may be a key.
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    # The client is made of these fields once, so they cannot be assigned; `model_copy(update=...)` makes another.
    base_url: str = Field(frozen=True, description="The server's or gateway's address.")
    task: str = Field(default="retrieval", frozen=True, description="retrieval, text-matching or code.")
    truncate_dim: int | None = Field(default=None, frozen=True, description="The number of dimensions; all if None.")
    max_pixels: int | None = Field(
        default=None, frozen=True, description="Larger images are scaled down to so many pixels."
    )
    client_options: dict[str, Any] = Field(
        default_factory=dict, frozen=True, description="Further arguments of the client."
    )
    embeddings_cache: Any | None = Field(default=None, frozen=True, description="For text-matching alone.")
    _embedder: Embedder = PrivateAttr()

    def __init__(self, base_url: str, api_key: str | None = None, **fields: Any) -> None:
        # A call of so many makes several requests at a time, of as many items as suit a server.
        defaults = {"model_name": "jina-embeddings-v4", "embed_batch_size": 128}
        super().__init__(**{**defaults, "base_url": base_url, **fields})
        if self.embeddings_cache is not None and self.task != "text-matching":
            raise ArgumentError(
                f"embeddings_cache does not go with task={self.task!r}: it knows texts without their prompt, and a"
                " query would get the vector of a passage; leave it out"
            )
        self._embedder = Embedder(
            base_url,
            api_key,
            task=self.task,
            truncate_dim=self.truncate_dim,
            max_pixels=self.max_pixels,
            client_options=self.client_options,
        )

    @classmethod
    def class_name(cls) -> str:
        """Give the name that dumps hold."""
        return "JinaV4Embedding"

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return an embedding with the same key, other values, and connections of its own.

        Args:
            update: arguments to replace; they are checked as in the constructor.
            deep: copy `client_options` too. Callbacks, cache and rate limiter are always shared.

        Raises:
            ArgumentError: a value is not allowed.
        """
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        if deep:
            fields["client_options"] = copy.deepcopy(self.client_options)
        return type(self)(**{"api_key": self._embedder.api_key, **fields, **(update or {})})

    def __copy__(self) -> Self:
        """Return a copy with connections of its own."""
        return self.model_copy()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Return a deep copy with connections of its own."""
        return self.model_copy(deep=True)

    def close(self) -> None:
        """Close the connections of the calls that are no coroutines."""
        self._embedder.close()

    async def aclose(self) -> None:
        """Close the connections of this event loop."""
        await self._embedder.aclose()

    def get_text_embedding_batch(self, texts: list[str], show_progress: bool = False, **kwargs: Any) -> list[Numbers]:
        """Embed passages.

        Raises:
            ArgumentError: not a list, or one is no text.
        """
        _refuse_bare_text(texts)
        return super().get_text_embedding_batch(texts, show_progress, **kwargs)

    async def aget_text_embedding_batch(
        self, texts: list[str], show_progress: bool = False, **kwargs: Any
    ) -> list[Numbers]:
        """Embed passages, without blocking the event loop."""
        _refuse_bare_text(texts)
        return await super().aget_text_embedding_batch(texts, show_progress, **kwargs)

    def _get_query_embedding(self, query: str) -> Numbers:
        return self._embedder.texts([query], "query")[0]

    async def _aget_query_embedding(self, query: str) -> Numbers:
        return (await self._embedder.atexts([query], "query"))[0]

    def _get_text_embedding(self, text: str) -> Numbers:
        return self._embedder.texts([text], "passage")[0]

    async def _aget_text_embedding(self, text: str) -> Numbers:
        return (await self._embedder.atexts([text], "passage"))[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Numbers]:
        return self._embedder.texts(texts, "passage")

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Numbers]:
        return await self._embedder.atexts(texts, "passage")

    def _get_image_embedding(self, img_file_path: ImageType) -> Numbers:
        return self._get_image_embeddings([img_file_path])[0]

    async def _aget_image_embedding(self, img_file_path: ImageType) -> Numbers:
        return (await self._aget_image_embeddings([img_file_path]))[0]

    def _get_image_embeddings(self, img_file_paths: list[ImageType]) -> list[Numbers]:
        return self._embedder.images(_sources(img_file_paths))

    async def _aget_image_embeddings(self, img_file_paths: list[ImageType]) -> list[Numbers]:
        return await self._embedder.aimages(_sources(img_file_paths))


def _refuse_bare_text(texts: object) -> None:
    """Refuse a text where a list is needed: LlamaIndex would embed each of its letters."""
    if isinstance(texts, str):
        raise ArgumentError("texts must be a list, not str; for one, send a list of one")


def _sources(images: Sequence[ImageType]) -> list[ImageSource]:
    """Give the images as the client takes them: LlamaIndex holds those without a path as open files in memory."""
    return [image.getvalue() if isinstance(image, BytesIO) else image for image in images]
