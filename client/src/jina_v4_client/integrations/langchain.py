"""LangChain's `Embeddings` by a server of this model, with images. It needs the extra ``langchain``."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from jina_v4_client._images import ImageSource
from jina_v4_client._model import Task
from jina_v4_client.integrations._embedder import Embedder, Numbers

try:
    from langchain_core.embeddings import Embeddings
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"LangChain's adapter needs {error.name}; install it with: pip install 'jina-v4-client[langchain]'",
        name=error.name,
    ) from error

__all__ = ["JinaV4Embeddings"]


class JinaV4Embeddings(Embeddings):
    """A jina-embeddings-v4 server as LangChain's embeddings: documents are passages, queries are queries.

    Vector stores that take images look for `embed_image` and call it with paths: Chroma's and LanceDB's ``add_images``,
    for example. For others embed the images and add the vectors. LangChain's `CacheBackedEmbeddings` is right unless it
    is made with ``query_embedding_cache=True``: a query then gets the vector of the same words as a document.

    Use it in a ``with`` block, or call :meth:`close`. Coroutines have connections of their own in each event loop;
    await :meth:`aclose` in it at the end.

    Args:
        base_url: the server's or gateway's address.
        api_key: its key; JINA_V4_API_KEY of the environment if None.
        task: "retrieval", "text-matching" or "code".
        truncate_dim: 128, 256, 512, 1024 or 2048 dimensions; all of the model's if None.
        max_pixels: larger images are scaled down to so many pixels; the server's limit if None.
        client_options: further arguments of :class:`jina_v4_client.EmbeddingsClient`; no `http_client`, which is either
            for threads or for coroutines.

    Raises:
        ArgumentError: one of these is not allowed.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        task: Task = "retrieval",
        truncate_dim: int | None = None,
        max_pixels: int | None = None,
        client_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._embedder = Embedder(
            base_url,
            api_key,
            task=task,
            truncate_dim=truncate_dim,
            max_pixels=max_pixels,
            client_options=client_options,
        )

    def embed_documents(self, texts: list[str]) -> list[Numbers]:
        """Embed passages.

        Raises:
            ArgumentError: not a list, or one is no text; nothing was embedded.
            ServerError: the server did not give the vectors.
        """
        return self._embedder.texts(texts, "passage")

    def embed_query(self, text: str) -> Numbers:
        """Embed a query; errors as for passages."""
        return self._embedder.texts([text], "query")[0]

    def embed_image(self, uris: Sequence[ImageSource]) -> list[Numbers]:
        """Embed images.

        Args:
            uris: paths, http or https URLs (fetched by this process), data URIs, bytes or PIL images.

        Returns:
            A vector for each, in their order, comparable with those of texts.

        Raises:
            ArgumentError: not a list.
            ImageError: one cannot be read; nothing was embedded.
            ServerError: the server did not give the vectors.
        """
        return self._embedder.images(uris)

    async def aembed_documents(self, texts: list[str]) -> list[Numbers]:
        """Embed passages, without blocking the event loop."""
        return await self._embedder.atexts(texts, "passage")

    async def aembed_query(self, text: str) -> Numbers:
        """Embed a query, without blocking the event loop."""
        return (await self._embedder.atexts([text], "query"))[0]

    async def aembed_image(self, uris: Sequence[ImageSource]) -> list[Numbers]:
        """Embed images, without blocking the event loop."""
        return await self._embedder.aimages(uris)

    def close(self) -> None:
        """Close the connections of the calls that are no coroutines."""
        self._embedder.close()

    async def aclose(self) -> None:
        """Close the connections of this event loop."""
        await self._embedder.aclose()

    def __enter__(self) -> Self:
        """Give the embeddings."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the connections of the calls that are no coroutines."""
        self.close()
