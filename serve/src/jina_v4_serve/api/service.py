"""Computes the vectors of a request: makes prompts, calls the engine; and knows whether the server is ready."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import InitVar, dataclass, replace
from functools import partial
from typing import Protocol

from PIL import Image

from jina_v4_serve import heartbeat
from jina_v4_serve.api import metrics, threads
from jina_v4_serve.api.budget import TokenBudget
from jina_v4_serve.api.door import Door
from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.api.images import ImageLoader
from jina_v4_serve.api.liveness import Liveness
from jina_v4_serve.api.pdf import PdfPages, PdfReader
from jina_v4_serve.api.prompts import Prompt, PromptMaker
from jina_v4_serve.api.record import current
from jina_v4_serve.api.request import EmbedRequest, Item, Limits, RankRequest
from jina_v4_serve.api.start_check import TEXT
from jina_v4_serve.api.vectors import Floats, NonFiniteError, Origin, Vectors
from jina_v4_serve.facts import IMAGE_PROMPT_TOKENS, MODEL, PIXELS_PER_TOKEN
from jina_v4_serve.token_pooling import pool_tokens

logger = logging.getLogger("jina_v4_serve")

READY_AGE_S = 10.0  # the engine works if it has finished work in this time
PROBE_TIMEOUT_S = 4.0
CONCURRENT_IMAGES = 8  # images of one request that are fetched at a time
BYTES_A_TEXT = 64  # the fixed cost of a text: tokenising this many bytes takes as long
BYTES_PER_TOKEN = 4  # of text: an estimate for the budget, before texts are tokenised


class Engine(Protocol):
    """Computes vectors; `vllm_side.engine` is vLLM's."""

    n_waiting: int  # prompts that are not finished

    @property
    def dead(self) -> bool:
        """Whether the engine has ended or failed."""

    async def embed(
        self, prompts: Sequence[Prompt], request_id: str, request: EmbedRequest, *, adapted: bool
    ) -> list[Vectors]:
        """Embed the prompts of one request."""


def pool(vectors: Sequence[Vectors], factor: int) -> list[Vectors]:
    """Return the vectors with fewer rows in each multi-vector."""
    return [replace(each, multivector=pool_tokens(each.multivector, factor)) for each in vectors]


@asynccontextmanager
async def _decoded(picture: Image.Image) -> AsyncIterator[Image.Image]:
    """Open a picture that is already decoded."""
    yield picture


@dataclass(eq=False)
class Service:
    """Everything that requests need; one per API process."""

    engine: Engine
    limits: Limits
    door: Door
    images: ImageLoader
    pdfs: PdfReader
    prompts: PromptMaker
    budget_tokens: InitVar[int]
    canary_failure: str | None = None
    is_broken: bool = False  # the last vectors were not finite

    def __post_init__(self, budget_tokens: int) -> None:
        """Create the state of this process."""
        self.budget = TokenBudget(budget_tokens)
        self.liveness = Liveness(heartbeat.find(), lambda: self.engine.n_waiting)
        self.worked_at = -READY_AGE_S
        self.probe_lock = asyncio.Lock()

    async def embed(self, request: EmbedRequest | RankRequest, request_id: str) -> list[Vectors]:
        """Return the vectors of a request, in order; for a ranking, those of the queries come first.

        Each item is a prompt. A PDF file is a prompt per page; a late-chunked request is a single prompt.
        """
        if self.canary_failure is not None:
            raise ApiError(503, f"this server computes wrong vectors: {self.canary_failure}", code="CANARY_FAILED")
        record = current()
        async with self.pdfs.opened([item for part in request.parts for item in part.items]) as pages:
            record.n_items["image"] += len(pages.origins) - len({origin.item for origin in pages.origins})
            estimate = sum(self._estimate(item, part) for part in request.parts for item in part.items if not item.pdf)
            estimate += len(pages.origins) * self._estimate_image(request.parts[0])
            with self.budget.spend(estimate, request.parts[0].priority):
                return await self._embed(request.parts, pages, request_id)

    async def _embed(self, parts: Sequence[EmbedRequest], pages: PdfPages, request_id: str) -> list[Vectors]:
        record = current()
        request = parts[0]  # all parts have the same options
        with record.stage("preprocessing"):
            made = [each for part in parts for each in await self._prompts(part, pages)]
        prompts = [prompt for _, prompt in made]
        with record.stage("engine"):
            vectors = await self._compute(prompts, request, request_id)
        for prompt, each in zip(prompts, vectors, strict=True):
            record.n_tokens["text" if prompt.image is None else "image"] += each.n_tokens
        self._worked()
        if request.pool_factor is not None:
            with record.stage("serialising"):
                vectors = await asyncio.to_thread(pool, vectors, request.pool_factor)
        return [replace(each, origin=origin) for (origin, _), each in zip(made, vectors, strict=True)]

    async def embed_fixed_text(self, task: str | None) -> Floats:
        """Return the dense vector of `TEXT`, with the adapter of a task, or without an adapter for None."""
        (vectors,) = await self.embed_probe(TEXT, task, adapted=task is not None)
        row: Floats = vectors.dense[0]  # (hidden,)
        return row

    async def ready(self) -> bool:
        """Tell whether the engine has worked lately; embed a text if no request did.

        The text is not embedded while requests are in the engine: behind long work it would time out.
        """
        if self.engine.dead or self.liveness.failure is not None or self.canary_failure is not None:
            return False
        async with self.probe_lock:
            worked = self.engine.n_waiting or time.monotonic() - self.worked_at < READY_AGE_S
            if worked and not self.is_broken:
                return True
            try:
                async with asyncio.timeout(PROBE_TIMEOUT_S):
                    await self.embed_probe("ready?")
            except TimeoutError:  # perhaps it waits behind work of another API process
                return not self.is_broken and self.liveness.age_s < READY_AGE_S
            except Exception:  # of whatever kind: the server is not ready
                logger.warning("the readiness probe failed", exc_info=True)
                return False
            self._worked()
            return True

    async def embed_probe(self, text: str, task: str | None = None, *, adapted: bool = True) -> list[Vectors]:
        """Return the dense vector of a text that is not from a request."""
        task = task or self.limits.tasks[0]
        prefix = self.limits.prompts[task].prefixes["query"]
        request = EmbedRequest(task, MODEL, [Item(text=text)], "query", prefix)
        prompts = self.prompts.texts([text], prefix, self.limits.max_length)
        return await self._compute(prompts, request, "probe", adapted=adapted)

    async def _compute(
        self, prompts: Sequence[Prompt], request: EmbedRequest, request_id: str, *, adapted: bool = True
    ) -> list[Vectors]:
        try:
            vectors = await self.engine.embed(prompts, request_id, request, adapted=adapted)
        except BaseExceptionGroup as failures:
            self.is_broken = self.is_broken or failures.subgroup(NonFiniteError) is not None
            raise
        self.is_broken = False
        return vectors

    def _worked(self) -> None:
        self.worked_at = time.monotonic()
        metrics.LAST_VECTORS.set_to_current_time()

    def _estimate(self, item: Item, request: EmbedRequest) -> int:
        if item.text is None:
            return self._estimate_image(request)
        longest = request.max_length or self.limits.max_length
        return min(len(item.text.encode(errors="replace")) // BYTES_PER_TOKEN + 2, longest)

    def _estimate_image(self, request: EmbedRequest) -> int:
        return (request.max_pixels or self.limits.max_pixels) // PIXELS_PER_TOKEN + IMAGE_PROMPT_TOKENS

    async def _prompts(self, request: EmbedRequest, pages: PdfPages) -> list[tuple[Origin, Prompt]]:
        """Make the prompts of a request, in order."""
        texts = {i: item.text for i, item in enumerate(request.items) if item.text is not None}
        if request.late_chunking:
            return [(Origin(0), await asyncio.to_thread(self.prompts.chunks, list(texts.values()), request.prefix))]
        async with asyncio.TaskGroup() as group:
            rendered = group.create_task(pages.pictures())
            paths = [request.items[i].path for i in texts]
            n_bytes = sum(BYTES_A_TEXT + len(text.encode(errors="replace")) for text in texts.values())
            made_texts = await threads.run(
                n_bytes, self.prompts.texts, list(texts.values()), request.prefix, request.max_length, paths
            )
        made = list(zip(map(Origin, texts), made_texts, strict=True))
        at_once = asyncio.Semaphore(CONCURRENT_IMAGES)
        for i, item in enumerate(request.items):
            if item.image is not None:
                made.append((Origin(i), self.prompts.image(partial(self._opened, item.image, item.path, at_once))))
        for origin, picture in zip(pages.origins, rendered.result(), strict=True):
            made.append((origin, self.prompts.image(partial(_decoded, picture))))
        return sorted(made, key=lambda each: (each[0].item, each[0].page or 0))

    @asynccontextmanager
    async def _opened(self, source: str, path: str, at_once: asyncio.Semaphore) -> AsyncIterator[Image.Image]:
        """Load a picture and keep it while vLLM prepares it. `at_once` limits how many are loaded."""
        async with at_once, AsyncExitStack() as stack:
            with current().stage("preprocessing"):
                picture = await stack.enter_async_context(self.images.opened(source, path))
            yield picture
