"""The two clients: the same calls, awaited by `AsyncEmbeddingsClient` and waited for by `EmbeddingsClient`."""

import functools
import os
import weakref
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypedDict, TypeVar, Unpack, cast, overload

import numpy as np

from jina_v4_client._calls import (
    FIRST,
    LAST,
    SENTENCES_MAX_LENGTH,
    Call,
    check_count,
    check_known_task,
    check_model,
    check_revision,
    check_seconds,
    check_wire,
    choose_task,
)
from jina_v4_client._images import ImageSource
from jina_v4_client._loop import BackgroundLoop
from jina_v4_client._model import MAX_LENGTH, TASKS, Output, Task
from jina_v4_client._pdf import Pages, PdfSource, embed_files
from jina_v4_client._progress import Post, Progress
from jina_v4_client._server import Known, WireDtype, WireFormat
from jina_v4_client._stock import read_projector
from jina_v4_client.results import DenseAndMulti, PartialResult, Vector

if TYPE_CHECKING:
    import httpx2
    import openai

    from jina_v4_client._send import Core

# What a call returns: itself from the one client, a coroutine of it from the other.
One = TypeVar("One")
Many = TypeVar("Many")
Partial = TypeVar("Partial")
Two = TypeVar("Two")
Paged = TypeVar("Paged")
Revision = TypeVar("Revision")
Images = Sequence[ImageSource]
Raise = Literal["raise"]
Skip = Literal["skip"]
Work = Callable[[Post], Coroutine[Any, Any, Any]]
R = TypeVar("R")
Async = Coroutine[Any, Any, R]


# The arguments of each call by name, for its overloads; the options are those that do not decide what it returns.
class _TextOptions(TypedDict, total=False):
    max_length: int
    batch_size: int
    truncate_dim: int | None
    prompt_name: str | None
    progress: Progress


class _TextArgs(_TextOptions, total=False):
    return_multivector: bool
    return_numpy: bool


class _ImageOptions(TypedDict, total=False):
    batch_size: int
    truncate_dim: int | None
    max_pixels: int | None
    progress: Progress


class _ImageArgs(_ImageOptions, total=False):
    return_multivector: bool
    return_numpy: bool


class _SentenceOptions(TypedDict, total=False):
    prompt_name: str | None
    prompt: str | None
    batch_size: int
    show_progress_bar: Progress | None
    task: Task | None
    truncate_dim: int | None
    max_pixels: int | None


class _SentenceArgs(_SentenceOptions, total=False):
    return_multivector: bool
    convert_to_numpy: bool


class _Client(Generic[One, Many, Partial, Two, Paged, Revision]):
    """The calls of both clients; how one is run is the client's."""

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        task: Task | None = None,
        model: str | None = None,
        timeout_s: float = 600.0,
        total_timeout_s: float | None = None,
        max_retries: int = 2,
        max_concurrency: int = 4,
        http_client: "httpx2.AsyncClient | None" = None,
        openai_client: "openai.AsyncOpenAI | None" = None,
        server_task: Task | None = None,
        projector: str | os.PathLike[str] | None = None,
        wire_format: WireFormat = "safetensors",
        wire_dtype: WireDtype = "float32",
        revision: str | None = None,
        priority: int = FIRST,
    ) -> None:
        # Not imported before a client is made: the HTTP libraries take about a second.
        from jina_v4_client._send import Core
        from jina_v4_client._transport import Transport

        transport = Transport(base_url, api_key, http_client, openai_client)
        self._task = None if task is None else check_known_task(task)
        stock_task = None if server_task is None else check_known_task(server_task)
        spoken, dtype = check_wire(wire_format, wire_dtype)
        known = Known(transport.url, check_model(model, self._task), stock_task, spoken)
        if (only := check_revision(revision)) is not None:
            known.revisions.update(dict.fromkeys(TASKS, only))
        self._core = Core(
            transport,
            known,
            timeout_s=check_seconds("timeout_s", timeout_s),
            total_timeout_s=None if total_timeout_s is None else check_seconds("total_timeout_s", total_timeout_s),
            max_retries=check_count("max_retries", max_retries, at_least=0),
            max_concurrency=check_count("max_concurrency", max_concurrency, at_least=1),
            projector=None if projector is None else read_projector(projector),
            wire_dtype=dtype,
            priority=check_count("priority", priority, at_least=FIRST, at_most=LAST),
        )
        self._open()

    def _open(self) -> None:
        """Prepare what runs the calls."""

    def _do(self, work: Work) -> Any:
        """Run the work of a call, or return it as a coroutine."""
        raise NotImplementedError

    @overload
    def encode_text(
        self, texts: str, task: Task | None = None, *, on_error: Raise = "raise", **options: Unpack[_TextArgs]
    ) -> One: ...
    @overload
    def encode_text(
        self,
        texts: Sequence[str],
        task: Task | None = None,
        *,
        return_multivector: Literal[False] = False,
        return_numpy: Literal[True],
        on_error: Raise = "raise",
        **options: Unpack[_TextOptions],
    ) -> One: ...
    @overload
    def encode_text(
        self, texts: Sequence[str], task: Task | None = None, *, on_error: Raise = "raise", **options: Unpack[_TextArgs]
    ) -> Many: ...
    @overload
    def encode_text(
        self, texts: str | Sequence[str], task: Task | None = None, *, on_error: Skip, **options: Unpack[_TextArgs]
    ) -> Partial: ...
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
        on_error: Raise | Skip = "raise",
    ) -> Any:
        """Embed texts.

        Args:
            texts: one text or several.
            task: "retrieval", "text-matching" or "code"; the client's if None.
            max_length: how many tokens of a text are read, its prefix included; the rest is cut off. Above the server's
                own limit nothing is cut off, and the server refuses a text that is longer than it can read.
            batch_size: how many texts are sent in one request at most; fewer if they are long.
            return_multivector: return a vector of 128 dimensions for each token instead of one for all.
            return_numpy: return several vectors as one array instead of a list. Multi-vectors stay a list, because they
                differ in their number of tokens.
            truncate_dim: 128, 256, 512, 1024 or 2048 dimensions; all of the model's if None. Multi-vectors are never
                cut.
            prompt_name: "query" (also if None) or "passage"; for text-matching both are the same.
            progress: True for a bar (needs tqdm), or a function that gets the items done and the number of all. It is
                called where the caller waits.
            on_error: "raise" ends the call at the first item that fails. "skip" leaves such items out: those that are
                no text, those that the server refuses, and those for which it fails, once the retries are used up.
                After three such failures in a row, or at the end of total_timeout_s, the rest is left out as well.

        Returns:
            For one text (dim,) float32, of unit length, or with return_multivector (n_tokens, 128) float32, each row
            of unit length. For several, in their order, a list of these; with return_numpy and without
            return_multivector one (n, dim) float32 array. With on_error="skip" always :class:`PartialResult`, which has
            None for an item that failed, and its error.

        Raises:
            ArgumentError: an argument is not allowed; nothing was embedded.
            ServerError: the server did not return the vectors; none is returned.
        """
        shared = (task, batch_size, truncate_dim, progress, on_error, _outputs(return_multivector), return_numpy)
        return self._run("texts", texts, *shared, max_length=max_length, prompt_name=prompt_name)

    @overload
    def encode_image(
        self, images: ImageSource, task: Task | None = None, *, on_error: Raise = "raise", **options: Unpack[_ImageArgs]
    ) -> One: ...
    @overload
    def encode_image(
        self,
        images: Images,
        task: Task | None = None,
        *,
        return_multivector: Literal[False] = False,
        return_numpy: Literal[True],
        on_error: Raise = "raise",
        **options: Unpack[_ImageOptions],
    ) -> One: ...
    @overload
    def encode_image(
        self, images: Images, task: Task | None = None, *, on_error: Raise = "raise", **options: Unpack[_ImageArgs]
    ) -> Many: ...
    @overload
    def encode_image(
        self, images: ImageSource | Images, task: Task | None = None, *, on_error: Skip, **options: Unpack[_ImageArgs]
    ) -> Partial: ...
    def encode_image(
        self,
        images: ImageSource | Images,
        task: Task | None = None,
        batch_size: int = 8,
        return_multivector: bool = False,
        return_numpy: bool = False,
        truncate_dim: int | None = None,
        max_pixels: int | None = None,
        *,
        progress: Progress = False,
        on_error: Raise | Skip = "raise",
    ) -> Any:
        """Embed images.

        All of them are read, fetched and checked before the first is sent, and kept as compressed files until then.

        Args:
            images: one image or several: a path, an http or https URL (fetched by this process, up to 64 MiB), a data
                URI, base64, the bytes of a file, or a PIL image.
            task: "retrieval", "text-matching" or "code"; the client's if None.
            batch_size: how many images are sent in one request at most; a stock vLLM takes one at a time.
            return_multivector: return a vector of 128 dimensions for each token instead of one for all.
            return_numpy: as for texts.
            truncate_dim: as for texts.
            max_pixels: larger images are scaled down to so many pixels, at least 3136; the server's limit if None. A
                stock vLLM must be started with --trust-request-mm-kwargs for it.
            progress: as for texts.
            on_error: as for texts; an image that cannot be read or fetched is left out as well.

        Returns:
            As for texts; the tokens of a multi-vector are those of the whole image prompt.

        Raises:
            ArgumentError: an argument is not allowed; nothing was embedded. ImageError if it is an image.
            ServerError: the server did not return the vectors; none is returned.
        """
        shared = (task, batch_size, truncate_dim, progress, on_error, _outputs(return_multivector), return_numpy)
        return self._run("images", images, *shared, max_pixels=max_pixels)

    @overload
    def encode(self, sentences: ImageSource, *, on_error: Raise = "raise", **options: Unpack[_SentenceArgs]) -> One: ...
    @overload
    def encode(
        self,
        sentences: Images,
        *,
        return_multivector: Literal[False] = False,
        convert_to_numpy: Literal[True] = True,
        on_error: Raise = "raise",
        **options: Unpack[_SentenceOptions],
    ) -> One: ...
    @overload
    def encode(self, sentences: Images, *, on_error: Raise = "raise", **options: Unpack[_SentenceArgs]) -> Many: ...
    @overload
    def encode(
        self, sentences: ImageSource | Images, *, on_error: Skip, **options: Unpack[_SentenceArgs]
    ) -> Partial: ...
    def encode(
        self,
        sentences: ImageSource | Images,
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
        on_error: Raise | Skip = "raise",
    ) -> Any:
        """Embed texts and images in the form of sentence-transformers.

        A string that is an http or https URL, a data URI or the path of an image file is an image; so is a PIL image.
        A file is one by its name or how it begins, and an error if it is broken. Texts are cut to 8192 tokens, as in
        the published code.

        Without prompt_name nothing is put before a text, as in sentence-transformers: other vectors than those of
        ``encode_text``, which puts "Query: " then. For retrieval and code say which side a text is of.

        Args:
            sentences: one item or several, texts and images mixed.
            prompt_name: "query" or "passage"; for text-matching both are the same. None: texts as they are.
            prompt: the same as its text: ``"Query: "``, ``"Passage: "`` or ``""``.
            batch_size: how many items are sent in one request at most.
            show_progress_bar: as `progress` of :meth:`encode_text`.
            task: "retrieval", "text-matching" or "code"; the client's if None.
            return_multivector: return a vector of 128 dimensions for each token instead of one for all.
            convert_to_numpy: return one array instead of a list.
            truncate_dim: as for texts.
            max_pixels: as for images.
            on_error: as for texts and images.

        Returns:
            For one item (dim,) float32, of unit length; for several one (n, dim) float32 array, or with
            convert_to_numpy=False a list. With return_multivector (n_tokens, 128) instead, several always as a list.
            With on_error="skip" always :class:`PartialResult`.

        Raises:
            ArgumentError: an argument is not allowed; nothing was embedded. ImageError if it is an image.
            ServerError: the server did not return the vectors; none is returned.
        """
        outputs = _outputs(return_multivector)
        shared = (task, batch_size, truncate_dim, show_progress_bar, on_error, outputs, convert_to_numpy)
        rest: dict[str, Any] = {"max_length": SENTENCES_MAX_LENGTH, "max_pixels": max_pixels, "prompt": prompt}
        return self._run("sentences", sentences, *shared, prompt_name=prompt_name, **rest)

    def encode_both(
        self,
        sentences: ImageSource | Images,
        prompt_name: str | None = None,
        batch_size: int = 8,
        *,
        task: Task | None = None,
        truncate_dim: int | None = None,
        max_pixels: int | None = None,
        progress: Progress = False,
    ) -> Two:
        """Embed texts and images as :meth:`encode`, and return both kinds of vectors of each from one pass.

        For an index that finds candidates by dense vectors and orders them by multi-vectors, at half the work.

        Args:
            sentences: one item or several, texts and images mixed; see :meth:`encode` for what is an image.
            prompt_name: as of :meth:`encode`.
            batch_size: how many items are sent in one request at most.
            task: "retrieval", "text-matching" or "code"; the client's if None.
            truncate_dim: of the dense vectors, as for texts.
            max_pixels: as for images.
            progress: as for texts.

        Returns:
            For each item, in order, its dense (dim,) and its multivector (n_tokens, 128), float32 of unit length.

        Raises:
            ArgumentError: an argument is not allowed; nothing was embedded. ImageError if it is an image.
            ServerError: the server did not return the vectors; none is returned.
        """
        shared = (task, batch_size, truncate_dim, progress, "raise", ("dense", "multivector"))
        rest: dict[str, Any] = {"max_length": SENTENCES_MAX_LENGTH, "max_pixels": max_pixels}
        return cast(Two, self._run("sentences", sentences, *shared, prompt_name=prompt_name, **rest))

    def encode_pdf(
        self,
        files: PdfSource | Sequence[PdfSource],
        task: Task | None = None,
        batch_size: int = 8,
        return_multivector: bool = False,
        truncate_dim: int | None = None,
        max_pixels: int | None = None,
        *,
        pages: Sequence[int] | None = None,
        progress: Progress = False,
    ) -> Paged:
        """Embed the pages of PDF files, which a server of ours renders; a stock vLLM does not.

        Args:
            files: one file or several: a path, or the bytes of a file.
            task: "retrieval", "text-matching" or "code"; the client's if None.
            batch_size: how many pages one request embeds at most; their file is sent with each request.
            return_multivector: return a vector of 128 dimensions for each token instead of one for all.
            truncate_dim: as for texts.
            max_pixels: as for images.
            pages: numbers of pages, from 1, of every file; all if None.
            progress: as for texts. Without pages it counts the first pages, then the others.

        Returns:
            For each file, in order, a dict from the number of a page to its vector, as for images.

        Raises:
            ArgumentError: an argument is not allowed; nothing was embedded. ImageError if it is a file.
            ServerError: the server did not return the vectors; none is returned.
        """
        shared = (task, batch_size, truncate_dim, progress, "raise", _outputs(return_multivector))
        return cast(Paged, self._run("files", files, *shared, max_pixels=max_pixels, pages=pages))

    def revision(self, task: Task | None = None) -> Revision:
        """Ask which revision of the model serves a task, and accept only that one from now on.

        Store it beside the vectors. From then on this client refuses vectors of another revision for this task; so
        does a new one that is made with it.

        Args:
            task: "retrieval", "text-matching" or "code"; the client's if None.

        Returns:
            16 digits of a hash of the checkpoint's files, the precision computed in and the largest image area in
            pixels: ``"94ab5b9a669fa4df-bfloat16-602112"``. None from a stock vLLM, which has none.

        Raises:
            ArgumentError: an argument is not allowed.
            ServerError: the server does not answer. WrongServerError if it serves another revision than before.
        """
        chosen = choose_task(self._task if task is None else task)
        return cast(Revision, self._do(lambda _: self._core.requests().revision(chosen)))

    def to(self, *_args: object, **_kwargs: object) -> Self:
        """Do nothing: the model is where its server has it. Here for code that moves a model to a device."""
        return self

    def _run(self, name: str, items: Any, task: Task | None, *shared: Any, **rest: Any) -> Any:
        chosen: Any = self._task if task is None else task  # None is refused like other arguments, in their order
        call = Call(name, items, chosen, *shared, **rest)  # a sequence is read here, in the caller's thread
        return self._do(lambda post: _embed(self._core, post, call))


class EmbeddingsClient(_Client[Vector, list[Vector], PartialResult, list[DenseAndMulti], Pages, str | None]):
    """A jina-embeddings-v4 server, called as the published model is.

    The server may be one of ours (``make serve-retrieval``), a gateway in front of several of ours, or a stock vLLM
    that serves one of the merged checkpoints with all-token pooling; the vectors are the same. What it is and which
    tasks it serves is asked at the first call.

    A client may be used by several threads, in a running event loop (it blocks it) and in forked children. Its requests
    run in an event loop of its own, in a thread that the first call starts. Use it in a ``with`` block, or call
    :meth:`close`.

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
        http_client: an ``httpx2.AsyncClient`` to send with, for proxies or certificates. This client closes it with
            itself, because its connections belong to the loop in which they were made; AsyncEmbeddingsClient leaves it.
        openai_client: an ``openai.AsyncOpenAI`` to send with, instead of base_url, api_key and http_client: its
            address, key, headers and HTTP client are used. Closed as http_client is.
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
        priority: 0 to 999; a server of ours computes what waits in this order, and refuses the last first where it has
            too much work.

    Raises:
        ArgumentError: one of these is not allowed.
    """

    def _open(self) -> None:
        self._core.transport.take_callers()
        self._loop = BackgroundLoop(functools.partial(self._core.transport.close, callers=True))
        # Also when nobody closed it: collected, or at the end of the program.
        self._end = weakref.finalize(self, self._loop.stop)

    def close(self) -> None:
        """Close the connections; the client is of no use afterwards."""
        self._end()

    def __enter__(self) -> Self:
        """Return this client."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections."""
        self.close()

    def _do(self, work: Work) -> Any:
        return self._loop.run(work)


class AsyncEmbeddingsClient(
    _Client[
        Async[Vector],
        Async[list[Vector]],
        Async[PartialResult],
        Async[list[DenseAndMulti]],
        Async[Pages],
        Async[str | None],
    ]
):
    """A jina-embeddings-v4 server, called from coroutines of asyncio.

    Everything is as with :class:`jina_v4_client.EmbeddingsClient`: arguments, vectors, errors; every call is awaited.
    Whoever cancels a call closes the connections of its requests, and the server drops their work. Images are read and
    checked in threads. Use the client in an ``async with`` block, or await :meth:`close`. It may be used in one event
    loop after another.

    Raises:
        ArgumentError: an argument is not allowed.
    """

    async def close(self) -> None:
        """Close the connections; the client is of no use afterwards."""
        await self._core.transport.close()

    async def __aenter__(self) -> Self:
        """Return this client."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connections."""
        await self.close()

    def _do(self, work: Work) -> Any:
        return work(lambda act: act())


def _as_coroutine(call: Callable[..., Any]) -> Callable[..., Any]:
    """Make a call a coroutine function in name as well, for `inspect` and for mocks of this class."""

    @functools.wraps(call)
    async def awaited(self: AsyncEmbeddingsClient, *args: Any, **kwargs: Any) -> Any:
        return await call(self, *args, **kwargs)

    return awaited


for _name in ("encode_text", "encode_image", "encode", "encode_both", "encode_pdf", "revision"):
    setattr(AsyncEmbeddingsClient, _name, _as_coroutine(getattr(_Client, _name)))


def _outputs(return_multivector: bool) -> tuple[Output]:
    return ("multivector",) if return_multivector else ("dense",)


async def _embed(core: "Core", post: Post, call: Call) -> Any:
    """Embed the items of a call, and return what the caller asked for."""
    if call.name == "files":
        return await embed_files(core, call, post)
    found, errors = await core.requests().embed(call, post)
    places = range(len(call.items))
    if call.skip:
        return PartialResult([cast(Vector | None, found.get(place)) for place in places], errors)
    ordered = [found[place] for place in places]
    if call.single and len(call.outputs) == 1:
        return ordered[0]
    return np.stack(cast(list[Vector], ordered)) if call.as_array else ordered
