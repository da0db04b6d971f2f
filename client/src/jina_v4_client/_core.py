"""What both clients share: settings, the checks of a call, and its outcome. No sockets but those that fetch images."""

import functools
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np

from jina_v4_client import _arguments as arguments
from jina_v4_client._batches import Batch, Images, Output, Texts
from jina_v4_client._dispatch import Dispatcher, Limits
from jina_v4_client._embedding import Embedding
from jina_v4_client._fetches import Fetch, Fetches
from jina_v4_client._images import SINGLE_IMAGE, PreparedImage, describe, is_image_file, is_url, prepare, read_source
from jina_v4_client._inquiry import Inquiry
from jina_v4_client._model import MAX_LENGTH, PROMPT_NAMES, TASKS, PromptName, Task, text_prefix
from jina_v4_client._pooling import Vector
from jina_v4_client._progress import Meter
from jina_v4_client._projector import read_projector
from jina_v4_client._server import Known
from jina_v4_client.errors import ArgumentError, ImageError, JinaV4Error
from jina_v4_client.results import Both, Embedded

SENTENCES_MAX_LENGTH = 8192  # tokens, in the published sentence-transformers code
T = TypeVar("T")
Outcome = Vector | list[Vector] | Embedded


@dataclass(frozen=True)
class Options:
    """What a call wants beside its items; as the caller gave it, so that checks come in the published order."""

    task: object
    batch_size: object
    return_multivector: bool
    return_numpy: bool
    truncate_dim: object
    progress: object
    on_error: object
    max_length: object = MAX_LENGTH
    prompt_name: object = None
    max_pixels: object = None
    both: bool = False

    @property
    def outputs(self) -> tuple[Output, ...]:
        """What the servers are asked for."""
        if self.both:
            return ("dense", "multivector")
        return ("multivector",) if self.return_multivector else ("dense",)


@dataclass
class Call:
    """One call that has been checked.

    Attributes:
        dispatcher: sees it through.
    """

    dispatcher: Dispatcher
    _embedding: Embedding
    _meter: Meter
    _n_items: int
    _single: bool
    _as_array: bool
    _skip: bool

    def outcome(self) -> Outcome:
        """Give what the caller asked for, where it is vectors of one kind."""
        found, errors = self._embedding.result()
        vectors = cast(dict[int, Vector], found)
        if self._skip:
            return Embedded([vectors.get(place) for place in range(self._n_items)], dict(sorted(errors.items())))
        ordered = [vectors[place] for place in range(self._n_items)]
        if self._single:
            return ordered[0]
        return np.stack(ordered) if self._as_array else ordered

    def both(self) -> list[Both]:
        """Give what the caller asked for, where it is vectors of both kinds."""
        found, _ = self._embedding.result()
        return [cast(Both, found[place]) for place in range(self._n_items)]

    def close(self) -> None:
        """Leave the progress as it is."""
        self._meter.close()


class Core:
    """A client without its sockets; the arguments are those of the clients."""

    def __init__(
        self,
        base_url: str,
        *,
        task: Task | None,
        model: str | None,
        timeout_s: float,
        total_timeout_s: float | None,
        max_retries: int,
        max_concurrency: int,
        server_task: Task | None,
        projector: str | os.PathLike[str] | None,
        wire_format: str,
        wire_dtype: str,
        revision: str | None,
        fetch_image: Fetch,
    ) -> None:
        self.url = arguments.check_base_url(base_url)
        self._task = None if task is None else arguments.check_known_task(task)
        self._model = arguments.check_model(model, self._task)
        stock_task = None if server_task is None else arguments.check_known_task(server_task)
        self._projector = None if projector is None else read_projector(projector)
        form, self._wire_dtype = arguments.check_wire(wire_format, wire_dtype)
        self._limits = Limits(
            arguments.check_seconds("timeout_s", timeout_s),
            None if total_timeout_s is None else arguments.check_seconds("total_timeout_s", total_timeout_s),
            arguments.check_count("max_retries", max_retries, at_least=0),
            arguments.check_count("max_concurrency", max_concurrency, at_least=1),
        )
        self._fetch_image = fetch_image
        self._known = Known(self.url, self._model, stock_task, form)
        if (only := arguments.check_revision(revision)) is not None:
            self._known.revisions.update(dict.fromkeys(TASKS, only))

    def inquiry(self, task: object) -> tuple[Inquiry, Dispatcher]:
        """Check a question for the revision that serves a task."""
        inquiry = Inquiry(self._known, self._choose_task(task))
        return inquiry, Dispatcher(inquiry, self._limits, time.monotonic())

    def texts(self, texts: object, options: Options) -> Call:
        """Check a call of encode_text."""
        begun_at = time.monotonic()
        prompt_name = arguments.check_prompt_name(options.prompt_name)
        dim = arguments.check_truncate_dim(options.truncate_dim)
        task = self._choose_task(options.task)
        limit = arguments.check_max_length(options.max_length)
        items, single = arguments.as_list("texts", texts, (str,))
        skip = arguments.check_on_error(options.on_error)
        checked, errors = _sorted_out(items, lambda place, item: arguments.check_text(f"texts[{place}]", item), skip)
        whole = Texts(list(checked.values()), list(checked), prompt_name, limit, options.outputs, dim)
        return self._call(begun_at, task, [whole], errors, options, single=single)

    def images(self, images: object, options: Options, fetches: Fetches | None = None) -> Call:
        """Check a call of encode_image; read, fetch and check its images."""
        begun_at = time.monotonic()
        dim = arguments.check_truncate_dim(options.truncate_dim)
        task = self._choose_task(options.task)
        limit = arguments.check_max_pixels(options.max_pixels)
        arguments.check_count("batch_size", options.batch_size, at_least=1)
        items, single = arguments.as_list("images", images, SINGLE_IMAGE)
        skip = arguments.check_on_error(options.on_error)
        check = functools.partial(_prepared, "images")
        prepared, errors = self._sorted_out_fetched(items, check, skip, begun_at, fetches)
        whole = Images(list(prepared.values()), list(prepared), limit, options.outputs, dim)
        return self._call(begun_at, task, [whole], errors, options, single=single)

    def sentences(self, sentences: object, options: Options, prompt: object, fetches: Fetches | None = None) -> Call:
        """Check a call of encode; read, fetch and check its images."""
        begun_at = time.monotonic()
        task = self._choose_task(options.task)
        prompt_name = _prompt_of(options.prompt_name, prompt)
        dim = arguments.check_truncate_dim(options.truncate_dim)
        limit = arguments.check_max_pixels(options.max_pixels)
        arguments.check_count("batch_size", options.batch_size, at_least=1)
        items, single = arguments.as_list("sentences", sentences, SINGLE_IMAGE)
        skip = arguments.check_on_error(options.on_error)

        def check(place: int, item: object, fetched: bytes | ImageError | None) -> str | PreparedImage:
            if fetched is None and isinstance(item, str) and not is_image_file(item):
                return arguments.check_sentence(f"sentences[{place}]", item, prompt_name)
            return _prepared("sentences", place, item, fetched)

        checked, errors = self._sorted_out_fetched(items, check, skip, begun_at, fetches)
        texts = {place: item for place, item in checked.items() if isinstance(item, str)}
        images = {place: item for place, item in checked.items() if not isinstance(item, str)}
        outputs = options.outputs
        wholes: list[Batch] = []
        if texts:
            wholes.append(Texts(list(texts.values()), list(texts), prompt_name, SENTENCES_MAX_LENGTH, outputs, dim))
        if images:
            wholes.append(Images(list(images.values()), list(images), limit, outputs, dim))
        return self._call(begun_at, task, wholes, errors, options, single=single)

    def _call(
        self,
        begun_at: float,
        task: Task,
        wholes: Sequence[Batch],
        errors: dict[int, JinaV4Error],
        options: Options,
        *,
        single: bool,
    ) -> Call:
        skip = arguments.check_on_error(options.on_error)
        batch_size = arguments.check_count("batch_size", options.batch_size, at_least=1)
        n_items = len(errors) + sum(len(whole.items) for whole in wholes)
        meter = Meter(options.progress, n_items)
        try:
            embedding = Embedding(
                self._known,
                task,
                wholes,
                batch_size=batch_size,
                errors=errors,
                skip=skip,
                meter=meter,
                projector=self._projector,
                wire_dtype=self._wire_dtype,
            )
        except JinaV4Error:
            meter.close()
            raise
        as_array = options.return_numpy and not options.return_multivector
        dispatcher = Dispatcher(embedding, self._limits, begun_at)
        return Call(dispatcher, embedding, meter, n_items, single, as_array, skip)

    def _choose_task(self, task: object) -> Task:
        chosen = arguments.choose_task(task, self._task)
        arguments.check_model(self._model, chosen)
        return chosen

    def _sorted_out_fetched(
        self,
        items: Sequence[object],
        check: Callable[[int, object, bytes | ImageError | None], T],
        skip: bool,
        begun_at: float,
        fetches: Fetches | None,
    ) -> tuple[dict[int, T], dict[int, JinaV4Error]]:
        """Check every item where some may be URLs of images; `check` gets what was fetched, or None of other items."""
        passed: dict[int, T] = {}
        errors: dict[int, JinaV4Error] = {}
        urls: dict[int, str] = {}

        def take(place: int, fetched: bytes | ImageError | None = None) -> bool:
            try:
                passed[place] = check(place, items[place], fetched)
            except ArgumentError as error:
                errors[place] = error
                return skip
            return True

        for place, item in enumerate(items):
            if is_url(item):
                urls[place] = item
            elif not take(place):
                break  # what stands before it may fail as well, and is then the first
        total_s, n_at_a_time = self._limits.total_timeout_s, self._limits.max_concurrency
        deadline = math.inf if total_s is None else begun_at + total_s
        (fetches or Fetches()).run(urls, self._fetch_image, take, max_concurrency=n_at_a_time, deadline=deadline)
        if errors and not skip:
            raise errors[min(errors)]
        return dict(sorted(passed.items())), errors


def _sorted_out(
    items: Sequence[object], check: Callable[[int, object], T], skip: bool
) -> tuple[dict[int, T], dict[int, JinaV4Error]]:
    """Check every item; give those that pass, and the errors of those that do not, by place."""
    passed: dict[int, T] = {}
    errors: dict[int, JinaV4Error] = {}
    for place, item in enumerate(items):
        try:
            passed[place] = check(place, item)
        except ArgumentError as error:
            if not skip:
                raise
            errors[place] = error
    return passed, errors


def _prepared(name: str, place: int, source: object, fetched: bytes | ImageError | None) -> PreparedImage:
    """Prepare an image that was fetched, or None if it is to be read."""
    try:
        if isinstance(fetched, ImageError):
            raise fetched
        return prepare(read_source(source) if fetched is None else fetched)
    except ImageError as error:
        raise ImageError(f"{name}[{place}] ({describe(source)}): {error}") from error


def _prompt_of(prompt_name: object, prompt: object) -> PromptName | None:
    """Give the name of a prompt that may be given as its text; None for no prompt."""
    if prompt is None:
        return None if prompt_name is None else arguments.check_prompt_name(prompt_name)
    texts = {text_prefix("retrieval", name): name for name in (*PROMPT_NAMES, None)}
    if prompt_name is not None or prompt not in texts:
        raise ArgumentError(f"prompt={prompt!r} is not offered: give prompt_name='query' or 'passage' instead")
    return texts[str(prompt)]
