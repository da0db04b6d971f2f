"""The client for coroutines: the same calls, the same checks, the same vectors."""

import asyncio
import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, overload

from jina_v4_client._arguments import choose_api_key
from jina_v4_client._core import Call, Core, Options, Outcome
from jina_v4_client._dispatch import Dispatcher
from jina_v4_client._fetches import Fetches
from jina_v4_client._images import ImageSource
from jina_v4_client._model import MAX_LENGTH, Task
from jina_v4_client._pooling import Vector
from jina_v4_client._progress import Progress
from jina_v4_client._runners import run_in_tasks
from jina_v4_client._wire import WireDtype, WireFormat
from jina_v4_client.errors import ArgumentError
from jina_v4_client.results import Both, Embedded

if TYPE_CHECKING:
    import httpx2

OnError = Literal["raise", "skip"]


class AsyncEmbeddingsClient:
    """A jina-embeddings-v4 server, called from coroutines of asyncio.

    Everything is as with :class:`jina_v4_client.EmbeddingsClient`: arguments, vectors, errors. `http_client` is an
    ``httpx2.AsyncClient``. Whoever cancels a call closes the connections of its requests, and the server drops their
    work. Images are read, fetched and checked in threads. Use the client in an ``async with`` block, or await
    :meth:`close`.

    Raises:
        ArgumentError: an argument is not allowed.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        task: Task | None = None,
        model: str | None = None,
        timeout_s: float = 600.0,
        total_timeout_s: float | None = None,
        max_retries: int = 2,
        max_concurrency: int = 4,
        http_client: "httpx2.AsyncClient | None" = None,
        server_task: Task | None = None,
        projector: str | os.PathLike[str] | None = None,
        wire_format: WireFormat = "safetensors",
        wire_dtype: WireDtype = "float32",
        revision: str | None = None,
    ) -> None:
        from jina_v4_client._transport import AsyncTransport, fetch_image

        self._core = Core(
            base_url,
            task=task,
            model=model,
            timeout_s=timeout_s,
            total_timeout_s=total_timeout_s,
            max_retries=max_retries,
            max_concurrency=max_concurrency,
            server_task=server_task,
            projector=projector,
            wire_format=wire_format,
            wire_dtype=wire_dtype,
            revision=revision,
            fetch_image=fetch_image,
        )
        self._transport = AsyncTransport(self._core.url, api_key=choose_api_key(api_key), http_client=http_client)

    @overload
    async def encode_text(  # type: ignore[overload-overlap]  # a str is a sequence of str as well
        self,
        texts: str,
        task: Task | None = None,
        max_length: int = MAX_LENGTH,
        batch_size: int = 8,
        return_multivector: bool = False,
        return_numpy: bool = False,
        truncate_dim: int | None = None,
        prompt_name: str | None = None,
        *,
        progress: Progress = False,
        on_error: Literal["raise"] = "raise",
    ) -> Vector: ...
    @overload
    async def encode_text(
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
        progress: Progress = False,
        on_error: Literal["raise"] = "raise",
    ) -> Vector: ...
    @overload
    async def encode_text(
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
        progress: Progress = False,
        on_error: Literal["raise"] = "raise",
    ) -> list[Vector]: ...
    @overload
    async def encode_text(
        self,
        texts: Sequence[str],
        task: Task | None = None,
        max_length: int = MAX_LENGTH,
        batch_size: int = 8,
        return_multivector: bool = False,
        return_numpy: Literal[False] = False,
        truncate_dim: int | None = None,
        prompt_name: str | None = None,
        *,
        progress: Progress = False,
        on_error: Literal["raise"] = "raise",
    ) -> list[Vector]: ...
    @overload
    async def encode_text(
        self,
        texts: str | Sequence[str],
        task: Task | None = None,
        max_length: int = MAX_LENGTH,
        batch_size: int = 8,
        return_multivector: bool = False,
        return_numpy: bool = False,
        truncate_dim: int | None = None,
        prompt_name: str | None = None,
        *,
        progress: Progress = False,
        on_error: Literal["skip"],
    ) -> Embedded: ...
    async def encode_text(
        self,
        texts: str | Sequence[str],
        task: Task | None = None,
        max_length: int = MAX_LENGTH,
        batch_size: int = 8,
        return_multivector: bool = False,
        return_numpy: bool = False,
        truncate_dim: int | None = None,
        prompt_name: str | None = None,
        *,
        progress: Progress = False,
        on_error: OnError = "raise",
    ) -> Vector | list[Vector] | Embedded:
        """Embed texts; see :meth:`jina_v4_client.EmbeddingsClient.encode_text`."""
        options = Options(
            task,
            batch_size,
            return_multivector,
            return_numpy,
            truncate_dim,
            progress,
            on_error,
            max_length,
            prompt_name,
        )
        return await self._run(self._core.texts(texts, options))

    @overload
    async def encode_image(  # type: ignore[overload-overlap]  # a str is a sequence of str as well
        self,
        images: ImageSource,
        task: Task | None = None,
        batch_size: int = 8,
        return_multivector: bool = False,
        return_numpy: bool = False,
        truncate_dim: int | None = None,
        max_pixels: int | None = None,
        *,
        progress: Progress = False,
        on_error: Literal["raise"] = "raise",
    ) -> Vector: ...
    @overload
    async def encode_image(
        self,
        images: Sequence[ImageSource],
        task: Task | None = None,
        batch_size: int = 8,
        return_multivector: Literal[False] = False,
        *,
        return_numpy: Literal[True],
        truncate_dim: int | None = None,
        max_pixels: int | None = None,
        progress: Progress = False,
        on_error: Literal["raise"] = "raise",
    ) -> Vector: ...
    @overload
    async def encode_image(
        self,
        images: Sequence[ImageSource],
        task: Task | None = None,
        batch_size: int = 8,
        *,
        return_multivector: Literal[True],
        return_numpy: bool = False,
        truncate_dim: int | None = None,
        max_pixels: int | None = None,
        progress: Progress = False,
        on_error: Literal["raise"] = "raise",
    ) -> list[Vector]: ...
    @overload
    async def encode_image(
        self,
        images: Sequence[ImageSource],
        task: Task | None = None,
        batch_size: int = 8,
        return_multivector: bool = False,
        return_numpy: Literal[False] = False,
        truncate_dim: int | None = None,
        max_pixels: int | None = None,
        *,
        progress: Progress = False,
        on_error: Literal["raise"] = "raise",
    ) -> list[Vector]: ...
    @overload
    async def encode_image(
        self,
        images: ImageSource | Sequence[ImageSource],
        task: Task | None = None,
        batch_size: int = 8,
        return_multivector: bool = False,
        return_numpy: bool = False,
        truncate_dim: int | None = None,
        max_pixels: int | None = None,
        *,
        progress: Progress = False,
        on_error: Literal["skip"],
    ) -> Embedded: ...
    async def encode_image(
        self,
        images: ImageSource | Sequence[ImageSource],
        task: Task | None = None,
        batch_size: int = 8,
        return_multivector: bool = False,
        return_numpy: bool = False,
        truncate_dim: int | None = None,
        max_pixels: int | None = None,
        *,
        progress: Progress = False,
        on_error: OnError = "raise",
    ) -> Vector | list[Vector] | Embedded:
        """Embed images; see :meth:`jina_v4_client.EmbeddingsClient.encode_image`."""
        options = Options(
            task,
            batch_size,
            return_multivector,
            return_numpy,
            truncate_dim,
            progress,
            on_error,
            max_pixels=max_pixels,
        )
        return await self._run(await _checked(self._core.images, images, options))

    @overload
    async def encode(  # type: ignore[overload-overlap]  # a str is a sequence of str as well
        self,
        sentences: ImageSource,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: Progress | None = None,
        *,
        task: Task | None = None,
        return_multivector: bool = False,
        convert_to_numpy: bool = True,
        truncate_dim: int | None = None,
        max_pixels: int | None = None,
        on_error: Literal["raise"] = "raise",
    ) -> Vector: ...
    @overload
    async def encode(
        self,
        sentences: Sequence[ImageSource],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: Progress | None = None,
        *,
        task: Task | None = None,
        return_multivector: Literal[False] = False,
        convert_to_numpy: Literal[True] = True,
        truncate_dim: int | None = None,
        max_pixels: int | None = None,
        on_error: Literal["raise"] = "raise",
    ) -> Vector: ...
    @overload
    async def encode(
        self,
        sentences: Sequence[ImageSource],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: Progress | None = None,
        *,
        task: Task | None = None,
        return_multivector: bool = False,
        convert_to_numpy: Literal[False],
        truncate_dim: int | None = None,
        max_pixels: int | None = None,
        on_error: Literal["raise"] = "raise",
    ) -> list[Vector]: ...
    @overload
    async def encode(
        self,
        sentences: Sequence[ImageSource],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: Progress | None = None,
        *,
        task: Task | None = None,
        return_multivector: Literal[True],
        convert_to_numpy: bool = True,
        truncate_dim: int | None = None,
        max_pixels: int | None = None,
        on_error: Literal["raise"] = "raise",
    ) -> list[Vector]: ...
    @overload
    async def encode(
        self,
        sentences: ImageSource | Sequence[ImageSource],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: Progress | None = None,
        *,
        task: Task | None = None,
        return_multivector: bool = False,
        convert_to_numpy: bool = True,
        truncate_dim: int | None = None,
        max_pixels: int | None = None,
        on_error: Literal["skip"],
    ) -> Embedded: ...
    async def encode(
        self,
        sentences: ImageSource | Sequence[ImageSource],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: Progress | None = None,
        *,
        task: Task | None = None,
        return_multivector: bool = False,
        convert_to_numpy: bool = True,
        truncate_dim: int | None = None,
        max_pixels: int | None = None,
        on_error: OnError = "raise",
    ) -> Vector | list[Vector] | Embedded:
        """Embed texts and images; see :meth:`jina_v4_client.EmbeddingsClient.encode`."""
        options = Options(
            task,
            batch_size,
            return_multivector,
            convert_to_numpy,
            truncate_dim,
            show_progress_bar,
            on_error,
            prompt_name=prompt_name,
            max_pixels=max_pixels,
        )
        return await self._run(await _checked(self._core.sentences, sentences, options, prompt))

    async def encode_both(
        self,
        sentences: ImageSource | Sequence[ImageSource],
        prompt_name: str | None = None,
        batch_size: int = 8,
        *,
        task: Task | None = None,
        truncate_dim: int | None = None,
        max_pixels: int | None = None,
        progress: Progress = False,
    ) -> list[Both]:
        """Give both kinds of vectors; see :meth:`jina_v4_client.EmbeddingsClient.encode_both`."""
        options = Options(
            task,
            batch_size,
            False,
            False,
            truncate_dim,
            progress,
            "raise",
            prompt_name=prompt_name,
            max_pixels=max_pixels,
            both=True,
        )
        call = await _checked(self._core.sentences, sentences, options, None)
        try:
            await self._see_through(call.dispatcher)
            return call.both()
        finally:
            call.close()

    async def revision(self, task: Task | None = None) -> str | None:
        """Ask which revision of the model serves a task; see :meth:`jina_v4_client.EmbeddingsClient.revision`."""
        inquiry, dispatcher = self._core.inquiry(task)
        await self._see_through(dispatcher)
        return inquiry.revision

    def to(self, *_args: object, **_kwargs: object) -> Self:
        """Do nothing: the model is where its server has it. Here for code that moves a model to a device."""
        return self

    async def close(self) -> None:
        """Close the connections; the client is of no use afterwards."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        """Give this client."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the connections."""
        await self.close()

    async def _run(self, call: Call) -> Outcome:
        try:
            await self._see_through(call.dispatcher)
            return call.outcome()
        finally:
            call.close()

    async def _see_through(self, dispatcher: Dispatcher) -> None:
        if self._transport.closed:
            raise ArgumentError("this client is closed; make a new one")
        await run_in_tasks(dispatcher, self._transport.send)


async def _checked(check: Callable[..., Call], *arguments: object) -> Call:
    fetches = Fetches()
    try:
        return await asyncio.to_thread(check, *arguments, fetches)
    finally:
        fetches.cancel()  # a thread does not notice that its call was cancelled
