"""The client: checks a call, sends it batch by batch, and gives its vectors."""

import os
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, overload

import numpy as np

from jina_v4_client import _arguments as arguments
from jina_v4_client import _ours as ours
from jina_v4_client import _stock as stock
from jina_v4_client._batches import Images, Texts, check_widths, cut
from jina_v4_client._images import SINGLE_IMAGE, ImageSource, PreparedImage, describe, is_url, prepare, read_source
from jina_v4_client._model import MAX_LENGTH, Task
from jina_v4_client._pooling import Vector
from jina_v4_client._projector import read_projector
from jina_v4_client._server import (
    Server,
    check_unchanged,
    frame_requests,
    models_request,
    read_frame,
    read_models,
    server_for,
)
from jina_v4_client._wire import WireDtype
from jina_v4_client.errors import ImageError, ServerError

if TYPE_CHECKING:
    import httpx2


class EmbeddingsClient:
    """A jina-embeddings-v4 server, called as the published model is.

    The server may be one of ours (``make serve-retrieval``), a gateway in front of several of ours, or a stock vLLM
    that serves one of the merged checkpoints with all-token pooling; the vectors are the same. What it is and which
    tasks it serves is asked at the first call.

    A client may be used by several threads. Use it in a ``with`` block, or call :meth:`close`.

    Args:
        base_url: the server's address, with or without ``/v1``: ``http://127.0.0.1:8000``.
        api_key: the server's key; JINA_V4_API_KEY of the environment if None. OPENAI_* variables are never read.
        task: what the vectors are for, where a call does not say.
        model: the name of the served model; None for the server's first, behind a gateway for that of the call's task.
        timeout_s: how long each request may take to be answered. Connecting may take 5 s of it.
        max_retries: how often a request is repeated after a broken connection, a timeout, 408, 409, 429 or 5xx, with
            growing pauses that follow the server's Retry-After. Other refusals are never repeated.
        http_client: an ``httpx2.Client`` to send with, for proxies or certificates; the caller closes it.
        server_task: the task that a stock vLLM serves, where its model's name does not end with it.
        projector: the path of the served checkpoint's multi_vector_projector.safetensors, with which the multi-vectors
            of a stock vLLM are made; a server of ours has its own.
        wire_dtype: how a server of ours sends vectors. "float16" halves the bytes and rounds every number to about 3
            digits; what a call returns is float32 of unit length either way. A stock vLLM always sends float32.

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
        projector: str | os.PathLike[str] | None = None,
        wire_dtype: WireDtype = "float32",
    ) -> None:
        from jina_v4_client._transport import Transport, fetch_image

        self._url = arguments.check_base_url(base_url)
        self._task = None if task is None else arguments.check_known_task(task)
        self._model = arguments.check_model(model, self._task)
        self._server_task = None if server_task is None else arguments.check_known_task(server_task)
        self._projector = None if projector is None else read_projector(projector)
        self._wire_dtype = arguments.check_wire_dtype(wire_dtype)
        self._transport = Transport(
            self._url,
            api_key=arguments.choose_api_key(api_key),
            timeout_s=arguments.check_timeout_s(timeout_s),
            max_retries=arguments.check_count("max_retries", max_retries, at_least=0),
            http_client=http_client,
        )
        self._fetch_image = fetch_image
        self._servers: dict[Task, Server] | None = None

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
        return_multivector: Literal[False] = False,
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
        *,
        return_multivector: Literal[True],
        return_numpy: bool = False,
        truncate_dim: int | None = None,
        prompt_name: str | None = None,
    ) -> list[Vector]: ...
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
            return_multivector: give a vector of 128 dimensions for each token instead of one for all.
            return_numpy: give several vectors as one array instead of a list. Multi-vectors stay a list, because they
                differ in their number of tokens.
            truncate_dim: 128, 256, 512, 1024 or 2048 dimensions; all of the model's if None. Multi-vectors are never
                cut.
            prompt_name: "query" (also if None) or "passage"; text-matching takes both for the same.

        Returns:
            For one text (dim,) float32, of unit length, or with return_multivector (n_tokens, 128) float32, each row
            of unit length. For several, in their order, a list of these; with return_numpy and without
            return_multivector one (n, dim) float32 array.

        Raises:
            ArgumentError: an argument is not allowed; nothing was embedded.
            ServerError: the server did not give the vectors; none is returned.
        """
        prompt = arguments.check_prompt_name(prompt_name)
        dim = arguments.check_truncate_dim(truncate_dim)
        chosen = self._choose_task(task)
        limit = arguments.check_max_length(max_length)
        size = arguments.check_count("batch_size", batch_size, at_least=1)
        items, single = arguments.as_list("texts", texts, (str,))
        batch = Texts(arguments.check_texts(items), prompt, limit, bool(return_multivector), dim)
        vectors = self._embed(chosen, batch, size)
        return _as_asked(vectors, single=single, as_array=return_numpy and not return_multivector)

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
        return_multivector: Literal[False] = False,
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
        *,
        return_multivector: Literal[True],
        return_numpy: bool = False,
        truncate_dim: int | None = None,
        max_pixels: int | None = None,
    ) -> list[Vector]: ...
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
            return_multivector: give a vector of 128 dimensions for each token instead of one for all.
            return_numpy: give several vectors as one array instead of a list. Multi-vectors stay a list, because they
                differ in their number of tokens.
            truncate_dim: 128, 256, 512, 1024 or 2048 dimensions; all of the model's if None. Multi-vectors are never
                cut.
            max_pixels: larger images are scaled down to so many pixels, at least 3136; the server's limit if None. A
                stock vLLM must be started with --trust-request-mm-kwargs for it.

        Returns:
            For one image (dim,) float32, of unit length, or with return_multivector (n_tokens, 128) float32, each row
            of unit length. For several, in their order, a list of these; with return_numpy and without
            return_multivector one (n, dim) float32 array.

        Raises:
            ArgumentError: an argument is not allowed; nothing was embedded. ImageError if it is an image.
            ServerError: the server did not give the vectors; none is returned.
        """
        dim = arguments.check_truncate_dim(truncate_dim)
        chosen = self._choose_task(task)
        limit = arguments.check_max_pixels(max_pixels)
        size = arguments.check_count("batch_size", batch_size, at_least=1)
        items, single = arguments.as_list("images", images, SINGLE_IMAGE)
        prepared = [self._prepare(index, source) for index, source in enumerate(items)]
        vectors = self._embed(chosen, Images(prepared, limit, bool(return_multivector), dim), size)
        return _as_asked(vectors, single=single, as_array=return_numpy and not return_multivector)

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

    def _choose_task(self, task: object) -> Task:
        chosen = arguments.choose_task(task, self._task)
        arguments.check_model(self._model, chosen)
        return chosen

    def _prepare(self, index: int, source: object) -> PreparedImage:
        try:
            return prepare(self._fetch_image(source) if is_url(source) else read_source(source))
        except ImageError as error:
            raise ImageError(f"images[{index}] ({describe(source)}): {error}") from error

    def _embed(self, task: Task, whole: Texts | Images, size: int) -> list[Vector]:
        vectors: list[Vector] = []
        try:
            server = self._find_server(task)
            if not server.pools:
                stock.check_batch(server, whole, self._projector)
                size = stock.batch_size(whole, size)
                if isinstance(whole, Images):
                    server = self._find_frame(server)
            for batch in cut(whole, size):
                vectors += self._send(server, batch)
            check_widths(vectors)
        except ServerError:
            # Whatever went wrong, the next call asks anew who is there: servers are restarted and replaced.
            self._servers = None
            raise
        return vectors

    def _find_server(self, task: Task) -> Server:
        servers = self._servers
        if servers is None:
            servers = read_models(self._transport.send(models_request()), self._url, self._model, self._server_task)
            self._servers = servers
        return server_for(servers, task)

    def _find_frame(self, server: Server) -> Server:
        if server.frame is None:
            head, tail = frame_requests(server)
            server = replace(server, frame=read_frame(server, self._transport.send(head), self._transport.send(tail)))
            self._servers = {server.task: server}  # a stock server has one task
        return server

    def _send(self, server: Server, batch: Texts | Images) -> list[Vector]:
        if server.pools:
            reply = self._transport.send(ours.write_request(server, batch, self._wire_dtype))
            check_unchanged(server, reply)
            return ours.read_reply(server, batch, reply, self._wire_dtype)
        reply = self._transport.send(stock.write_request(server, batch))
        check_unchanged(server, reply)
        return stock.read_reply(server, batch, reply, self._projector)


def _as_asked(vectors: list[Vector], *, single: bool, as_array: bool) -> Vector | list[Vector]:
    if single:
        return vectors[0]
    return np.stack(vectors) if as_array else vectors
