"""The core: runs a call from its checked arguments to its vectors. This file reads in the order in which it happens.

Check the items -> learn which server answers -> cut the items into batches -> send them, several at a time, each until
it is answered or given up -> put the vectors in order.

With ``on_error="skip"`` a batch that the server refuses is sent again without the item that the refusal names, or in
two halves, down to single items: at most twice as many requests as it has items. The same is done after a status 500,
which a single item may cause. After any other failure all items of the batch have failed, and after a few such failures
in a row the call gives up the rest. A refusal that is about the whole call, and not about an item, ends the call.
"""

import asyncio
import math
import random
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from itertools import chain
from typing import Any

from jina_v4_client import _ours as ours
from jina_v4_client import _stock as stock
from jina_v4_client._calls import Batch, Call, check_model, cut, read_items
from jina_v4_client._fetch import fetch_images
from jina_v4_client._loop import in_thread
from jina_v4_client._model import Task
from jina_v4_client._progress import Meter, Post
from jina_v4_client._server import Known, Reply, Request, Server, WireDtype
from jina_v4_client._transport import Transport
from jina_v4_client.errors import (
    ArgumentError,
    JinaV4Error,
    ServerAuthenticationError,
    ServerConnectionError,
    ServerError,
    ServerRefusedError,
    ServerTimeoutError,
)
from jina_v4_client.results import Item, check_widths

_LONGEST_WAIT_S = 120.0  # that a Retry-After is followed, where the call has no time limit of its own
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 8.0
_PASSING_STATUSES = (408, 409, 429)
_MAX_FAILURES = 3
_MAX_FAILED_ITEMS = 10
_REFUSED_ITEM_STATUSES = (400, 413, 415, 422)
_OF_THE_CALL = ("model", "task", "dimensions", "max_length", "max_pixels", "prompt_name", "outputs")  # not of an item
_NAMED_ITEM = re.compile(r"input\[(\d+)\]")


@dataclass(frozen=True)
class Core:
    """What all calls of a client share."""

    transport: Transport
    known: Known  # the calls add to it
    timeout_s: float  # of one request
    total_timeout_s: float | None  # of a whole call
    max_retries: int  # of one request
    max_concurrency: int  # requests of a call that are in flight or wait to be repeated
    projector: stock.Projector | None  # for multi-vectors of a stock server
    wire_dtype: WireDtype
    priority: int  # of all requests to a server of ours

    def requests(self) -> "Requests":
        """Begin a call."""
        return Requests(self)


class Requests:
    """The requests of one call: to which server, how long each may take, how often it is repeated, with what pauses."""

    def __init__(self, core: Core) -> None:
        if core.transport.closed:
            raise ArgumentError("this client is closed; make a new one")
        self.deadline = math.inf if core.total_timeout_s is None else _now() + core.total_timeout_s
        self.server: Server | None = None  # once it is known
        self.widths: set[int] = set()  # of the vectors so far
        self.core = core
        self._quiet_until = 0.0

    async def embed(self, call: Call, post: Post) -> tuple[dict[int, Item], dict[int, JinaV4Error]]:
        """Embed the items of the call, or of a part of it; return vectors and errors, each by place.

        Args:
            call: whose arguments are checked.
            post: runs a function where the caller waits.
        """
        check_model(self.core.known.model, call.task)
        with closing(Meter(call.progress, len(call.items), post)) as meter:
            return await _Embedding(self, call, meter).run()

    async def revision(self, task: Task) -> str | None:
        """Ask again which revision serves a task, and accept only that one from now on."""
        known = self.core.known
        check_model(known.model, task)
        async with self.time_limit():
            known.forget()
            server = await known.find(task, self.send)
        if server.revision is not None:
            known.revisions[task] = server.revision
        return server.revision

    @asynccontextmanager
    async def time_limit(self) -> AsyncIterator[None]:
        """End the block at the call's time limit. After a failure the next call asks again which server answers."""
        try:
            async with asyncio.timeout_at(self.deadline if self.deadline < math.inf else None) as limit:
                yield
        except TimeoutError as error:
            if not limit.expired():
                raise
            self.core.known.forget()
            limit_s = self.core.total_timeout_s
            raise ServerTimeoutError(f"the call did not end within total_timeout_s={limit_s:g}") from error
        except ServerError:
            self.core.known.forget()
            raise

    async def send(self, write: Callable[[], Request]) -> Reply:
        """Send a request until it is answered. It is written only now, so that only those in flight are in memory."""
        n_failures = 0
        while True:
            while (quiet_s := self._quiet_until - _now()) > 0:
                await asyncio.sleep(quiet_s)
            try:
                return await self.core.transport.send(write(), self.core.timeout_s)
            except ServerError as error:
                n_failures += 1
                pause_s = choose_pause_s(error, n_failures)
                longest_s = 1.1 * _LONGEST_WAIT_S if self.deadline == math.inf else self.deadline - _now()
                if n_failures > self.core.max_retries or not may_pass(error) or pause_s > longest_s:
                    raise
                if error.retry_after_s is not None:
                    # A Retry-After is for all requests of this call.
                    self._quiet_until = max(self._quiet_until, _now() + pause_s)
            await asyncio.sleep(pause_s)


class _Embedding:
    """One call on its way."""

    def __init__(self, requests: Requests, call: Call, meter: Meter) -> None:
        self._requests, self._core, self._call, self._meter = requests, requests.core, call, meter
        self._vectors: dict[int, Item] = {}
        self._errors: dict[int, JinaV4Error] = {}
        self._n_failures = 0  # in a row
        self._reason: ServerError | None = None  # why the call gives up its other items, if it does

    async def run(self) -> tuple[dict[int, Item], dict[int, JinaV4Error]]:
        await self._read_items()
        server = None  # until it is known and can serve the call
        try:
            async with self._requests.time_limit():
                if self._left():
                    server = await self._learn_server()
                    await self._send_all(server)
        except ServerError as error:
            over = isinstance(error, ServerTimeoutError) and self._call.skip and server is not None
            if error is not self._reason and not over:
                raise
            done = self._vectors.keys() | self._errors.keys()
            self._give_up({place: error for place in range(len(self._call.items)) if place not in done})
        for failure in self._errors.values():
            # The frames behind an error hold all items of the call; the caller may keep the error for long.
            link: BaseException | None = failure
            while link is not None:
                link.__traceback__ = None
                link = link.__cause__ or link.__context__
        return self._vectors, dict(sorted(self._errors.items()))

    async def _read_items(self) -> None:
        """Check every item, and read or fetch images."""
        call = self._call
        if call.name == "pages":  # whose files were read
            return
        is_quick = call.name == "texts"  # no file is read
        urls, errors = read_items(call) if is_quick else await in_thread(read_items, call)
        if urls:
            errors |= await fetch_images(call, urls, self._core.max_concurrency, self._requests.deadline)
        self._give_up(errors)

    def _left(self) -> list[Batch]:
        """Return a batch of all texts that can be sent, and one of all images or pages."""
        items = self._call.items
        good = [place for place in range(len(items)) if place not in self._errors]
        texts = [place for place in good if isinstance(items[place], str)]
        images = [place for place in good if not isinstance(items[place], str)]
        return [Batch(self._call, places) for places in (texts, images) if places]

    async def _learn_server(self) -> Server:
        """Find the server of the task, and learn what the requests to it need."""
        known, send = self._core.known, self._requests.send
        server = self._requests.server or await known.find(self._call.task, send)
        self._requests.server = server
        if server.pools:
            return server
        if self._call.name == "pages":
            raise ArgumentError(f"{server.url} is a stock vLLM, which takes no PDF files: send their pages as images")
        self._give_up(stock.check_items(self._left()))
        if "multivector" in self._call.outputs:
            stock.check_projector(server, self._core.projector)
        return server

    async def _send_all(self, server: Server) -> None:
        limits = ours.batch_limits if server.pools else stock.batch_limits
        left = self._left()
        batches = chain.from_iterable(cut(whole, *limits(whole)) for whole in left)

        async def work() -> None:
            for batch in batches:  # which all workers share
                await self._embed(server, batch)

        n_workers = min(self._core.max_concurrency, sum(len(whole.places) for whole in left))
        await _all_of([work() for _ in range(n_workers)])

    async def _embed(self, server: Server, batch: Batch) -> None:
        """Embed a batch. Where it fails and the call skips, embed its parts, until each item at fault is alone."""
        core, send, waiting = self._core, self._requests.send, [batch]
        while waiting:
            batch = waiting.pop()
            try:
                if server.pools:
                    vectors = await ours.embed(server, batch, send, core.wire_dtype, core.priority)
                else:
                    vectors = await stock.embed(server, batch, send, core.projector)
            except ServerError as error:
                _locate(error, batch)
                refused = isinstance(error, ServerRefusedError) and error.status_code in _REFUSED_ITEM_STATUSES
                if not self._call.skip or (refused and error.param in _OF_THE_CALL):
                    raise
                waiting.extend(reversed(self._divide(batch, error, refused=refused)))
                continue
            self._n_failures = 0
            self._vectors.update(zip(batch.places, vectors, strict=True))
            check_widths(self._requests.widths, vectors)
            self._meter.advance(len(vectors))

    def _divide(self, batch: Batch, error: ServerError, *, refused: bool) -> list[Batch]:
        """Give up the items that are at fault, and return the others, in parts that are to be sent again."""
        places = batch.places
        named = _named_item(error, batch) if refused else None
        if named is not None:
            self._give_up({places[named]: error})
            rest = [*places[:named], *places[named + 1 :]]
            return [Batch(self._call, rest)] if rest else []
        if len(places) > 1 and (refused or error.status_code == 500):
            middle = len(places) // 2
            return [Batch(self._call, places[:middle]), Batch(self._call, places[middle:])]
        self._give_up(dict.fromkeys(places, error))
        if refused:
            return []
        self._core.known.forget()
        self._n_failures += 1
        most = _MAX_FAILED_ITEMS if error.status_code == 500 else _MAX_FAILURES
        if self._n_failures >= most or isinstance(error, ServerAuthenticationError):
            self._reason = self._reason or error  # of several workers the first one's ends the call
            raise error
        return []

    def _give_up(self, errors: Mapping[int, JinaV4Error]) -> None:
        """Leave out items that failed, by their places; raise the first error if the call does not skip."""
        if errors and not self._call.skip:
            raise errors[min(errors)]
        self._errors.update(errors)
        self._meter.advance(len(errors))


async def _all_of(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run coroutines together; the first error ends the others, and is raised as it is once they have ended."""
    if len(work) == 1:
        await work[0]
        return
    tasks = [asyncio.create_task(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        tasks.clear()  # an error holds this frame, which must not hold the error


def may_pass(error: ServerError) -> bool:
    """Tell whether the same request may succeed a little later."""
    status = error.status_code
    if status is None:
        return isinstance(error, ServerConnectionError)
    return status in _PASSING_STATUSES or status >= 500


def choose_pause_s(error: ServerError, n_failures: int) -> float:
    """Choose how long to wait before the request is repeated.

    The server's own wish is never undercut; without one the pause doubles from failure to failure. Chance spreads
    clients that failed together.
    """
    if error.retry_after_s is not None:
        return error.retry_after_s * random.uniform(1, 1.1)  # noqa: S311 - no secret
    longest: float = min(_FIRST_PAUSE_S * 2 ** min(n_failures - 1, 10), _LONGEST_PAUSE_S)
    return longest * random.uniform(0.5, 1)  # noqa: S311 - no secret


def _named_item(error: ServerError, batch: Batch) -> int | None:
    """Return the item that a refusal names, counted in its request."""
    found = _NAMED_ITEM.match(error.param or "")
    index = int(found.group(1)) if found else -1
    return index if 0 <= index < len(batch.places) else None


def _locate(error: ServerError, batch: Batch) -> None:
    """Add the place in the call to an error that counts the items of one request."""
    index = _named_item(error, batch)
    if (file := batch.file) is not None:
        error.args = (f"{error} ({file.name})",)
    elif index is not None and batch.places[index] != index:
        error.args = (f"{error} (input[{index}] is item {batch.places[index]} of the call)",)


def _now() -> float:
    return asyncio.get_running_loop().time()
