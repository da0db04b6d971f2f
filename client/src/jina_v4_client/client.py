"""The client: checks a call, sends it batch by batch, several at a time, and gives its vectors."""

import os
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, overload

from jina_v4_client._arguments import choose_api_key
from jina_v4_client._core import Call, Core, Options, Outcome
from jina_v4_client._dispatch import Dispatcher
from jina_v4_client._images import ImageSource
from jina_v4_client._model import MAX_LENGTH, Task
from jina_v4_client._pooling import Vector
from jina_v4_client._progress import Progress
from jina_v4_client._runners import run_in_threads
from jina_v4_client._wire import WireDtype, WireFormat
from jina_v4_client.errors import ArgumentError
from jina_v4_client.results import Both, Embedded

if TYPE_CHECKING:
    import httpx2

OnError = Literal["raise", "skip"]


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
        total_timeout_s: how long a call may take in all, its retries and its pauses included; None for no limit.
        max_retries: how often a request is repeated after a broken connection, a timeout, 408, 409, 429 or 5xx. The
            pauses grow and vary by chance. A Retry-After is followed, by all requests of the call, if it ends within
            the call's time limit or, where there is none, within two minutes; a longer one ends the call. Other
            refusals are never repeated.
        max_concurrency: how many requests of a call are on their way at a time; before that, how many image URLs.
        http_client: an ``httpx2.Client`` to send with, for proxies or certificates; the caller closes it.
        server_task: the task that a stock vLLM serves, where its model's name does not end with it.
        projector: the path of the served checkpoint's multi_vector_projector.safetensors, with which the multi-vectors
            of a stock vLLM are made; a server of ours has its own.
        wire_format: how a server of ours sends vectors: "safetensors", "base64" or "float" (JSON, where something on
            the way wants it). The vectors are the same. What cannot do one is asked for the next by itself. A stock
            vLLM always sends bytes.
        wire_dtype: "float16" halves the bytes of safetensors and rounds every number to about 3 digits; what a call
            returns is float32 of unit length either way. A stock vLLM always sends float32.
        revision: what :meth:`revision` returned when the vectors were made that these are for; a server of another one
            is refused. Checkpoints of different tasks have different revisions.

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
        total_timeout_s: float | None = None,
        max_retries: int = 2,
        max_concurrency: int = 4,
        http_client: "httpx2.Client | None" = None,
        server_task: Task | None = None,
        projector: str | os.PathLike[str] | None = None,
        wire_format: WireFormat = "safetensors",
        wire_dtype: WireDtype = "float32",
        revision: str | None = None,
    ) -> None:
        from jina_v4_client._transport import Transport, fetch_image

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
        self._transport = Transport(self._core.url, api_key=choose_api_key(api_key), http_client=http_client)

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
        *,
        progress: Progress = False,
        on_error: Literal["raise"] = "raise",
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
        progress: Progress = False,
        on_error: Literal["raise"] = "raise",
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
        progress: Progress = False,
        on_error: Literal["raise"] = "raise",
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
        *,
        progress: Progress = False,
        on_error: Literal["raise"] = "raise",
    ) -> list[Vector]: ...
    @overload
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
        *,
        progress: Progress = False,
        on_error: Literal["skip"],
    ) -> Embedded: ...
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
        *,
        progress: Progress = False,
        on_error: OnError = "raise",
    ) -> Vector | list[Vector] | Embedded:
        """Embed texts.

        Args:
            texts: one text or several.
            task: "retrieval", "text-matching" or "code"; the client's if None.
            max_length: how many tokens of a text are read, its prefix included; the rest is cut off. Above the server's
                own limit nothing is cut off, and the server refuses a text that is longer than it can read.
            batch_size: how many texts are sent in one request at most; fewer if they are long.
            return_multivector: give a vector of 128 dimensions for each token instead of one for all.
            return_numpy: give several vectors as one array instead of a list. Multi-vectors stay a list, because they
                differ in their number of tokens.
            truncate_dim: 128, 256, 512, 1024 or 2048 dimensions; all of the model's if None. Multi-vectors are never
                cut.
            prompt_name: "query" (also if None) or "passage"; text-matching takes both for the same.
            progress: True for a bar (needs tqdm), or a function that gets the items done and the number of all.
            on_error: "raise" ends the call at the first item that fails. "skip" leaves such items out: those that are
                no text, those that the server refuses, and those for which it fails, once the retries are used up.
                After three such failures in a row, or at the end of total_timeout_s, the rest is left out as well.

        Returns:
            For one text (dim,) float32, of unit length, or with return_multivector (n_tokens, 128) float32, each row
            of unit length. For several, in their order, a list of these; with return_numpy and without
            return_multivector one (n, dim) float32 array. With on_error="skip" always :class:`Embedded`, which has
            None for an item that failed, and its error.

        Raises:
            ArgumentError: an argument is not allowed; nothing was embedded.
            ServerError: the server did not give the vectors; none is returned.
        """
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
        return self._run(self._core.texts(texts, options))

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
        *,
        progress: Progress = False,
        on_error: Literal["raise"] = "raise",
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
        progress: Progress = False,
        on_error: Literal["raise"] = "raise",
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
        progress: Progress = False,
        on_error: Literal["raise"] = "raise",
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
        *,
        progress: Progress = False,
        on_error: Literal["raise"] = "raise",
    ) -> list[Vector]: ...
    @overload
    def encode_image(
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
    def encode_image(
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
        """Embed images.

        All of them are read, fetched and checked before the first is sent, and kept as compressed files until then.

        Args:
            images: one image or several: a path, an http or https URL (fetched by this process, up to 64 MiB), a data
                URI, the bytes of a file, or a PIL image.
            task: "retrieval", "text-matching" or "code"; the client's if None.
            batch_size: how many images are sent in one request at most; a stock vLLM takes one at a time.
            return_multivector: give a vector of 128 dimensions for each token instead of one for all.
            return_numpy: give several vectors as one array instead of a list. Multi-vectors stay a list, because they
                differ in their number of tokens.
            truncate_dim: 128, 256, 512, 1024 or 2048 dimensions; all of the model's if None. Multi-vectors are never
                cut.
            max_pixels: larger images are scaled down to so many pixels, at least 3136; the server's limit if None. A
                stock vLLM must be started with --trust-request-mm-kwargs for it.
            progress: as for texts.
            on_error: as for texts; an image that cannot be read or fetched is left out as well.

        Returns:
            For one image (dim,) float32, of unit length, or with return_multivector (n_tokens, 128) float32, each row
            of unit length. For several, in their order, a list of these; with return_numpy and without
            return_multivector one (n, dim) float32 array. With on_error="skip" always :class:`Embedded`.

        Raises:
            ArgumentError: an argument is not allowed; nothing was embedded. ImageError if it is an image.
            ServerError: the server did not give the vectors; none is returned.
        """
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
        return self._run(self._core.images(images, options))

    @overload
    def encode(  # type: ignore[overload-overlap]  # a str is a sequence of str as well
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
    def encode(
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
    def encode(
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
    def encode(
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
    def encode(
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
    def encode(
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
        """Embed texts and images in the form of sentence-transformers.

        A string that is an http or https URL, or the path of an image file, is an image; so is a PIL image.
        Texts are cut to 8192 tokens, as in the published code.

        Without prompt_name nothing is put before a text, as in sentence-transformers: other vectors than those of
        ``encode_text``, which takes "query" then. For retrieval and code say which side a text is of.

        Args:
            sentences: one item or several, texts and images mixed.
            prompt_name: "query" or "passage"; text-matching takes both for the same. None: texts as they are.
            prompt: the same as its text: ``"Query: "``, ``"Passage: "`` or ``""``.
            batch_size: how many items are sent in one request at most.
            show_progress_bar: as `progress` of :meth:`encode_text`.
            task: "retrieval", "text-matching" or "code"; the client's if None.
            return_multivector: give a vector of 128 dimensions for each token instead of one for all.
            convert_to_numpy: give one array instead of a list.
            truncate_dim: as for texts.
            max_pixels: as for images.
            on_error: as for texts and images.

        Returns:
            For one item (dim,) float32, of unit length; for several one (n, dim) float32 array, or with
            convert_to_numpy=False a list. With return_multivector (n_tokens, 128) instead, several always as a list.
            With on_error="skip" always :class:`Embedded`.

        Raises:
            ArgumentError: an argument is not allowed; nothing was embedded. ImageError if it is an image.
            ServerError: the server did not give the vectors; none is returned.
        """
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
        return self._run(self._core.sentences(sentences, options, prompt))

    def encode_both(
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
        """Embed texts and images as :meth:`encode`, and give both kinds of vectors of each from one pass.

        For an index that finds candidates by dense vectors and orders them by multi-vectors, at half the work.

        Args:
            sentences: one item or several, texts and images mixed; see :meth:`encode` for what is an image.
            prompt_name: "query" or "passage"; text-matching takes both for the same. None: texts as they are.
            batch_size: how many items are sent in one request at most.
            task: "retrieval", "text-matching" or "code"; the client's if None.
            truncate_dim: of the dense vectors, as for texts.
            max_pixels: as for images.
            progress: as for texts.

        Returns:
            For each item, in order, its dense (dim,) and its multivector (n_tokens, 128), float32 of unit length.

        Raises:
            ArgumentError: an argument is not allowed; nothing was embedded. ImageError if it is an image.
            ServerError: the server did not give the vectors; none is returned.
        """
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
        call = self._core.sentences(sentences, options, None)
        try:
            self._see_through(call.dispatcher)
            return call.both()
        finally:
            call.close()

    def revision(self, task: Task | None = None) -> str | None:
        """Ask which revision of the model serves a task, and go on with that one only.

        Store it beside the vectors. From then on this client refuses vectors of another revision for this task; so
        does a new one that is made with it.

        Args:
            task: "retrieval", "text-matching" or "code"; the client's if None.

        Returns:
            16 digits of a hash of the checkpoint's files, the precision computed in and the largest image area in
            pixels: ``"94ab5b9a669fa4df-bfloat16-602112"``. None from a stock vLLM, which does not tell.

        Raises:
            ArgumentError: an argument is not allowed.
            ServerError: the server does not answer. WrongServerError if it serves another revision than before.
        """
        inquiry, dispatcher = self._core.inquiry(task)
        self._see_through(dispatcher)
        return inquiry.revision

    def to(self, *_args: object, **_kwargs: object) -> Self:
        """Do nothing: the model is where its server has it. Here for code that moves a model to a device."""
        return self

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

    def _run(self, call: Call) -> Outcome:
        try:
            self._see_through(call.dispatcher)
            return call.outcome()
        finally:
            call.close()

    def _see_through(self, dispatcher: Dispatcher) -> None:
        if self._transport.closed:
            raise ArgumentError("this client is closed; make a new one")
        run_in_threads(dispatcher, self._transport.send)
