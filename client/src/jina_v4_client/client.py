"""The client: checks a call, sends it batch by batch, and gives its vectors."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, overload

import numpy as np

from jina_v4_client import _arguments as arguments
from jina_v4_client._batches import (
    ImageBatch,
    TextBatch,
    batch_request,
    check_widths,
    image_batches,
    read_batch,
    text_batches,
)
from jina_v4_client._images import SINGLE_IMAGE, ImageSource, PreparedImage, describe, is_url, prepare, read_source
from jina_v4_client._model import MAX_LENGTH, Task, text_prefix
from jina_v4_client._pooling import Vector
from jina_v4_client._server import Server, check_task, frame_requests, models_request, read_frame, read_models
from jina_v4_client.errors import ImageError, ServerError

if TYPE_CHECKING:
    import httpx2


class EmbeddingsClient:
    """A jina-embeddings-v4 server, called as the published model is.

    The server may be one of ours (``make serve-retrieval``) or a stock vLLM that serves one of the merged checkpoints
    with all-token pooling; the vectors are the same. What it is and which task it serves is asked at the first call.

    A client may be used by several threads. Use it in a ``with`` block, or call :meth:`close`.

    Args:
        base_url: the server's address, with or without ``/v1``: ``http://127.0.0.1:8000``.
        api_key: the server's key; JINA_V4_API_KEY of the environment if None. OPENAI_* variables are never read.
        task: what the vectors are for, where a call does not say.
        model: the name of the served model; None for the server's first.
        timeout_s: how long each request may take to be answered. Connecting may take 5 s of it.
        max_retries: how often a request is repeated after a broken connection, a timeout, 408, 409, 429 or 5xx, with
            growing pauses that follow the server's Retry-After. Other refusals are never repeated.
        http_client: an ``httpx2.Client`` to send with, for proxies or certificates; the caller closes it.
        server_task: the task that a stock vLLM serves, where its model's name does not end with it.

    Raises:
        ArgumentError: one of these is not allowed.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        task: Task | None = None,
        model: str | None = None,
        timeout_s: float = 600.0,
        max_retries: int = 2,
        http_client: "httpx2.Client | None" = None,
        server_task: Task | None = None,
    ) -> None:
        from jina_v4_client._transport import Transport, fetch_image

        self._url = arguments.check_base_url(base_url)
        self._task = None if task is None else arguments.check_known_task(task)
        self._model = model
        self._server_task = None if server_task is None else arguments.check_known_task(server_task)
        self._transport = Transport(
            self._url,
            api_key=arguments.choose_api_key(api_key),
            timeout_s=arguments.check_timeout_s(timeout_s),
            max_retries=arguments.check_count("max_retries", max_retries, at_least=0),
            http_client=http_client,
        )
        self._fetch_image = fetch_image
        self._server: Server | None = None

    @overload
    def encode_text(  # type: ignore[overload-overlap]  # a str is a sequence of str as well
        self,
        texts: str,
        task: Task | None = None,
        max_length: int = MAX_LENGTH,
        batch_size: int = 8,
        return_multivector: bool = False,
        return_numpy: bool = False,
        truncate_dim: int | None = None,
        prompt_name: str | None = None,
    ) -> Vector: ...
    @overload
    def encode_text(
        self,
        texts: Sequence[str],
        task: Task | None = None,
        max_length: int = MAX_LENGTH,
        batch_size: int = 8,
        return_multivector: bool = False,
        *,
        return_numpy: Literal[True],
        truncate_dim: int | None = None,
        prompt_name: str | None = None,
    ) -> Vector: ...
    @overload
    def encode_text(
        self,
        texts: Sequence[str],
        task: Task | None = None,
        max_length: int = MAX_LENGTH,
        batch_size: int = 8,
        return_multivector: bool = False,
        return_numpy: Literal[False] = False,
        truncate_dim: int | None = None,
        prompt_name: str | None = None,
    ) -> list[Vector]: ...
    def encode_text(
        self,
        texts: str | Sequence[str],
        task: Task | None = None,
        max_length: int = MAX_LENGTH,
        batch_size: int = 8,
        return_multivector: bool = False,
        return_numpy: bool = False,
        truncate_dim: int | None = None,
        prompt_name: str | None = None,
    ) -> Vector | list[Vector]:
        """Embed texts.

        Args:
            texts: one text or several.
            task: "retrieval", "text-matching" or "code"; the client's if None.
            max_length: how many tokens of a text are read, its prefix included; the rest is cut off. Above the server's
                own limit nothing is cut off, and the server refuses a text that is longer than it can read.
            batch_size: how many texts are sent in one request.
            return_multivector: not offered yet.
            return_numpy: give several vectors as one array instead of a list.
            truncate_dim: 128, 256, 512, 1024 or 2048 dimensions; all of the model's if None.
            prompt_name: "query" (also if None) or "passage"; text-matching takes both for the same.

        Returns:
            For one text (dim,) float32, of unit length. For several, in their order, a list of such vectors, or with
            return_numpy one (n, dim) float32 array.

        Raises:
            ArgumentError: an argument is not allowed; nothing was sent.
            ServerError: the server did not give the vectors; none is returned.
        """
        arguments.check_prompt_name(prompt_name)
        dim = arguments.check_truncate_dim(truncate_dim)
        chosen = arguments.choose_task(task, self._task)
        arguments.refuse_multivector(return_multivector)
        limit = arguments.check_max_length(max_length)
        size = arguments.check_count("batch_size", batch_size, at_least=1)
        items, single = arguments.as_list("texts", texts, (str,))
        prefix = text_prefix(chosen, prompt_name)
        prompts = [prefix + text for text in arguments.check_texts(items)]

        def cut(server: Server) -> Iterator[TextBatch]:
            return text_batches(server, prompts, batch_size=size, max_length=limit, truncate_dim=dim)

        vectors = self._embed(chosen, cut, for_images=False)
        return _as_asked(vectors, single=single, return_numpy=return_numpy)

    @overload
    def encode_image(  # type: ignore[overload-overlap]  # a str is a sequence of str as well
        self,
        images: ImageSource,
        task: Task | None = None,
        batch_size: int = 8,
        return_multivector: bool = False,
        return_numpy: bool = False,
        truncate_dim: int | None = None,
        max_pixels: int | None = None,
    ) -> Vector: ...
    @overload
    def encode_image(
        self,
        images: Sequence[ImageSource],
        task: Task | None = None,
        batch_size: int = 8,
        return_multivector: bool = False,
        *,
        return_numpy: Literal[True],
        truncate_dim: int | None = None,
        max_pixels: int | None = None,
    ) -> Vector: ...
    @overload
    def encode_image(
        self,
        images: Sequence[ImageSource],
        task: Task | None = None,
        batch_size: int = 8,
        return_multivector: bool = False,
        return_numpy: Literal[False] = False,
        truncate_dim: int | None = None,
        max_pixels: int | None = None,
    ) -> list[Vector]: ...
    def encode_image(
        self,
        images: ImageSource | Sequence[ImageSource],
        task: Task | None = None,
        batch_size: int = 8,
        return_multivector: bool = False,
        return_numpy: bool = False,
        truncate_dim: int | None = None,
        max_pixels: int | None = None,
    ) -> Vector | list[Vector]:
        """Embed images.

        All of them are read, fetched and checked before the first is sent, and kept as compressed files until then.

        Args:
            images: one image or several: a path, an http or https URL (fetched by this process, up to 64 MiB), a data
                URI, the bytes of a file, or a PIL image.
            task: "retrieval", "text-matching" or "code"; the client's if None.
            batch_size: how many images are sent in one request; a stock vLLM takes one at a time.
            return_multivector: not offered yet.
            return_numpy: give several vectors as one array instead of a list.
            truncate_dim: 128, 256, 512, 1024 or 2048 dimensions; all of the model's if None.
            max_pixels: larger images are scaled down to so many pixels, at least 3136; the server's limit if None. A
                stock vLLM must be started with --trust-request-mm-kwargs for it.

        Returns:
            For one image (dim,) float32, of unit length. For several, in their order, a list of such vectors, or with
            return_numpy one (n, dim) float32 array.

        Raises:
            ArgumentError: an argument is not allowed; nothing was sent. ImageError if it is an image.
            ServerError: the server did not give the vectors; none is returned.
        """
        dim = arguments.check_truncate_dim(truncate_dim)
        chosen = arguments.choose_task(task, self._task)
        arguments.refuse_multivector(return_multivector)
        limit = arguments.check_max_pixels(max_pixels)
        size = arguments.check_count("batch_size", batch_size, at_least=1)
        items, single = arguments.as_list("images", images, SINGLE_IMAGE)
        prepared = [self._prepare(index, source) for index, source in enumerate(items)]

        def cut(server: Server) -> Iterator[ImageBatch]:
            return image_batches(server, prepared, batch_size=size, max_pixels=limit, truncate_dim=dim)

        vectors = self._embed(chosen, cut, for_images=True)
        return _as_asked(vectors, single=single, return_numpy=return_numpy)

    def close(self) -> None:
        """Close the connections; the client is of no use afterwards."""
        self._transport.close()

    def __enter__(self) -> Self:
        """Give this client."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the connections."""
        self.close()

    def _prepare(self, index: int, source: object) -> PreparedImage:
        try:
            return prepare(self._fetch_image(source) if is_url(source) else read_source(source))
        except ImageError as error:
            raise ImageError(f"images[{index}] ({describe(source)}): {error}") from error

    def _embed(
        self, task: Task, cut: Callable[[Server], Iterator[TextBatch | ImageBatch]], *, for_images: bool
    ) -> list[Vector]:
        vectors: list[Vector] = []
        try:
            server = self._find_server(task, for_images=for_images)
            for batch in cut(server):
                vectors += read_batch(server, batch, self._transport.send(batch_request(server, batch)))
            check_widths(vectors)
        except ServerError:
            # Whatever went wrong, the next call asks anew who is there: servers are restarted and replaced.
            self._server = None
            raise
        return vectors

    def _find_server(self, task: Task, *, for_images: bool) -> Server:
        send = self._transport.send
        server = self._server
        if server is None:
            server = read_models(send(models_request()), self._url, self._model, self._server_task)
        check_task(server, task)
        if for_images and not server.pools and server.frame is None:
            head, tail = frame_requests(server)
            server = replace(server, frame=read_frame(server, send(head), send(tail)))
        self._server = server
        return server


def _as_asked(vectors: list[Vector], *, single: bool, return_numpy: bool) -> Vector | list[Vector]:
    if single:
        return vectors[0]
    return np.stack(vectors) if return_numpy else vectors
