"""The core: sees a call through, from its checked arguments to its vectors, in the order in which things happen.

Check the items -> learn which server answers -> cut the items into batches -> send them, several at a time, each until
it is answered or given up -> put the vectors in order.

With ``on_error="skip"`` a batch that the server refuses is sent again without the item that the refusal names, or in
two halves, down to single items: at most twice as many requests as it has items. So is one that it answers with 500,
which a single item may bring about. Where the server fails otherwise or is gone, the batch's items have failed. After a
few of these in a row the rest is given up. A refusal of what the call asks for, and not of an item, ends it all the
same.
"""

import asyncio
import math
import random
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

from jina_v4_client import _ours as ours
from jina_v4_client import _stock as stock
from jina_v4_client._calls import Call, Limits, check_model
from jina_v4_client._fetch import fetch_images
from jina_v4_client._items import Batch, Item, check_widths, cut, read_items
from jina_v4_client._loop import in_thread
from jina_v4_client._model import Task
from jina_v4_client._progress import Meter, Post
from jina_v4_client._server import Known, Server, check_unchanged
from jina_v4_client._transport import Transport
from jina_v4_client._wire import Reply, Request, WireDtype
from jina_v4_client.errors import (
    ArgumentError,
    JinaV4Error,
    ServerAuthenticationError,
    ServerConnectionError,
    ServerError,
    ServerRefusedError,
    ServerTimeoutError,
)

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
    limits: Limits
    projector: stock.Projector | None  # for multi-vectors of a stock server
    wire_dtype: WireDtype
    priority: int  # of all requests to a server of ours

    async def embed(
        self, call: Call, post: Post, requests: "Requests | None" = None
    ) -> tuple[dict[int, Item], dict[int, JinaV4Error]]:
        """Embed the items of a call, or of a part of one; return vectors and errors, each by place.

        Args:
            call: whose arguments are checked.
            post: runs a function where the caller waits.
            requests: of the whole call, where this is a part of it: one server and one time limit hold for all parts.
        """
        check_model(self.known.model, call.task)
        requests = requests or self.requests()
        meter = Meter(call.progress, len(call.items), post)
        try:
            return await _Embedding(self, call, requests, meter).run()
        except ServerError:
            self.known.forget()
            raise
        finally:
            meter.close()

    async def revision(self, task: Task) -> str | None:
        """Ask anew which revision serves a task, and go on with that one only."""
        check_model(self.known.model, task)
        requests = self.requests()
        try:
            async with requests.time_limit():
                server = await self.known.find(task, requests.send, anew=True)
        except ServerError:
            self.known.forget()
            raise
        if server.revision is not None:
            self.known.revisions[task] = server.revision
        return server.revision

    def requests(self) -> "Requests":
        """Begin a call."""
        return Requests(self.transport, self.limits)


class Requests:
    """The requests of one call: to which server, how long each may take, how often it is repeated, with what pauses."""

    def __init__(self, transport: Transport, limits: Limits) -> None:
        if transport.closed:
            raise ArgumentError("this client is closed; make a new one")
        self.deadline = math.inf if limits.total_timeout_s is None else _now() + limits.total_timeout_s
        self.limits = limits
        self.server: Server | None = None  # once it is known
        self._transport = transport
        self._quiet_until = 0.0

    @asynccontextmanager
    async def time_limit(self) -> AsyncIterator[None]:
        """End what is inside at the call's time limit."""
        if self.deadline == math.inf:
            yield
            return
        try:
            async with asyncio.timeout_at(self.deadline) as limit:
                yield
        except TimeoutError as error:
            if not limit.expired():
                raise
            seconds = f"total_timeout_s={self.limits.total_timeout_s:g}"
            raise ServerTimeoutError(f"the call did not end within {seconds}") from error

    async def send(self, write: Callable[[], Request]) -> Reply:
        """Send a request until it is answered; written no sooner, only those in flight are in memory."""
        n_failures = 0
        while True:
            while (quiet_s := self._quiet_until - _now()) > 0:
                await asyncio.sleep(quiet_s)
            try:
                return await self._transport.send(write(), self.limits.timeout_s)
            except ServerError as error:
                n_failures += 1
                pause_s = choose_pause_s(error, n_failures)
                longest_s = 1.1 * _LONGEST_WAIT_S if self.deadline == math.inf else self.deadline - _now()
                if n_failures > self.limits.max_retries or not may_pass(error) or pause_s > longest_s:
                    raise
                if error.retry_after_s is not None:
                    # A server that asks to be left alone means all of this call's requests.
                    self._quiet_until = max(self._quiet_until, _now() + pause_s)
            await asyncio.sleep(pause_s)


class _GivenUpError(Exception):
    """Nothing more is sent; its argument is the error that is the reason."""


class _Embedding:
    """One call on its way."""

    def __init__(self, core: Core, call: Call, requests: Requests, meter: Meter) -> None:
        self._core, self._call, self._requests, self._meter = core, call, requests, meter
        self._vectors: dict[int, Item] = {}
        self._errors: dict[int, JinaV4Error] = {}
        self._server: Server | None = None  # unknown until it was found fit for the call
        self._n_failures = 0  # in a row

    async def run(self) -> tuple[dict[int, Item], dict[int, JinaV4Error]]:
        wholes = await self._check_items()
        try:
            async with self._requests.time_limit():
                if wholes:
                    self._server = await self._learn_server(wholes)
                    await self._send_all(self._server, wholes)
        except (ServerTimeoutError, _GivenUpError) as error:
            reason: ServerError = error.args[0] if isinstance(error, _GivenUpError) else error
            if not self._call.skip or self._server is None:
                raise
            self._core.known.forget()
            done = self._vectors.keys() | self._errors.keys()
            self._give_up([place for place in range(len(self._call.items)) if place not in done], reason)
        check_widths(list(self._vectors.values()))
        return self._vectors, dict(sorted(self._errors.items()))

    async def _check_items(self) -> list[Batch]:
        """Check every item, and fetch images; return a batch of all texts and one of all images."""
        call, requests = self._call, self._requests
        if call.name == "pages":  # whose files were read
            return [Batch(call, call.items, range(len(call.items)))]
        is_quick = call.name == "texts"  # no file is read
        ready, urls, self._errors = read_items(call) if is_quick else await in_thread(read_items, call)
        if urls:
            images, errors = await fetch_images(call, urls, requests.limits.max_concurrency, requests.deadline)
            ready.update(images)
            self._errors.update(errors)
        if self._errors and not call.skip:
            raise self._errors[min(self._errors)]
        self._meter.advance(len(self._errors))
        wholes = []
        for is_text in (True, False):
            items = {place: item for place, item in sorted(ready.items()) if isinstance(item, str) == is_text}
            wholes += [Batch(call, [*items.values()], [*items])] if items else []
        return wholes

    async def _learn_server(self, wholes: Sequence[Batch]) -> Server:
        """Find the server of the task, and what must be known of it before it is asked for vectors."""
        known, send = self._core.known, self._requests.send
        server = self._requests.server or await known.find(self._call.task, send)
        self._requests.server = server
        if server.pools:
            return server
        if self._call.name == "pages":
            raise ArgumentError(f"{server.url} is a stock vLLM, which takes no PDF files: send their pages as images")
        refused = stock.check_items(wholes)
        if refused and not self._call.skip:
            raise refused[min(refused)]
        if "multivector" in self._call.outputs:
            stock.check_projector(server, self._core.projector)
        for place, error in refused.items():
            self._give_up([place], error)
        if server.frame is None and any(not whole.is_text for whole in wholes):
            server = await stock.with_frame(server, send)
            known.servers = {server.task: server}  # a stock server has one task
        return server

    async def _send_all(self, server: Server, wholes: Sequence[Batch]) -> None:
        kind = ours if server.pools else stock
        left = wholes
        if self._errors:
            left = [whole.part([i for i, at in enumerate(whole.places) if at not in self._errors]) for whole in wholes]
        batches = chain.from_iterable(cut(whole, kind.batch_limits(whole)) for whole in left if whole.items)

        async def work() -> None:
            for batch in batches:  # which all workers share
                await self._embed(server, batch)

        n_workers = min(self._requests.limits.max_concurrency, sum(len(whole.items) for whole in left))
        await _all_of([work() for _ in range(n_workers)])

    async def _embed(self, server: Server, batch: Batch) -> None:
        """Embed a batch; where it fails and the call skips, its parts, until the items at fault are alone."""
        waiting = [batch]
        while waiting:
            batch = waiting.pop()
            try:
                vectors = await self._vectors_of(server, batch)
            except ServerError as error:
                _locate(error, batch)
                refused = isinstance(error, ServerRefusedError) and error.status_code in _REFUSED_ITEM_STATUSES
                if not self._call.skip or (refused and error.param in _OF_THE_CALL):
                    raise
                waiting.extend(reversed(self._divide(batch, error, refused=refused)))
                continue
            self._n_failures = 0
            self._vectors.update(zip(batch.places, vectors, strict=True))
            self._meter.advance(len(vectors))

    def _divide(self, batch: Batch, error: ServerError, *, refused: bool) -> list[Batch]:
        """Give up the items that are at fault, and return the others, in parts that are to be sent again."""
        named = _named_item(error, batch) if refused else None
        if named is not None:
            self._give_up([batch.places[named]], error)
            rest = [index for index in range(len(batch.items)) if index != named]
            return [batch.part(rest)] if rest else []
        if len(batch.items) > 1 and (refused or error.status_code == 500):
            middle = len(batch.items) // 2
            return [batch.part(range(middle)), batch.part(range(middle, len(batch.items)))]
        self._give_up(batch.places, error)
        if refused:
            return []
        self._core.known.forget()
        self._n_failures += 1
        most = _MAX_FAILED_ITEMS if error.status_code == 500 else _MAX_FAILURES
        if self._n_failures >= most or isinstance(error, ServerAuthenticationError):
            raise _GivenUpError(error)
        return []

    async def _vectors_of(self, server: Server, batch: Batch) -> list[Item]:
        """Ask for the vectors of a batch; a server of ours in the best format that it speaks."""
        if not server.pools:
            reply = await self._requests.send(lambda: stock.write_request(server, batch))
            check_unchanged(server, reply)
            return stock.read_reply(server, batch, reply, self._core.projector)
        known, wire_dtype, priority = self._core.known, self._core.wire_dtype, self._core.priority
        wire_format = known.spoken
        try:
            reply = await self._requests.send(
                lambda: ours.write_request(server, batch, wire_dtype, wire_format, priority)
            )
        except ServerError as error:
            worse = ours.next_format(wire_format, error)
            if worse is None:
                raise
            known.speak(worse)
            return await self._vectors_of(server, batch)
        check_unchanged(server, reply)
        vectors = ours.read_reply(server, batch, reply, wire_dtype, wire_format)
        if wire_format == "safetensors" and ours.is_json(reply):
            known.speak("base64")
        return vectors

    def _give_up(self, places: Sequence[int], error: JinaV4Error) -> None:
        # The frames behind an error hold this object; without them it goes when the caller lets go of it.
        self._errors.update(dict.fromkeys(places, error.with_traceback(None)))
        self._meter.advance(len(places))


async def _all_of(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run coroutines together; the first error cancels the others and is raised as it is."""
    if len(work) == 1:
        await work[0]
        return
    failure: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)
    except BaseExceptionGroup as failures:
        failure = failures.exceptions[0]
    try:
        if failure is not None:
            raise failure
    finally:
        del failure  # an error holds this frame, which must not hold the error


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
    return index if 0 <= index < len(batch.items) else None


def _locate(error: ServerError, batch: Batch) -> None:
    """Say which item of the call is meant, where the server could only count those of one request."""
    index = _named_item(error, batch)
    if (file := batch.file(0)) is not None:
        error.args = (f"{error} ({file.name})",)
    elif index is not None and batch.places[index] != index:
        error.args = (f"{error} (input[{index}] is item {batch.places[index]} of the call)",)


def _now() -> float:
    return asyncio.get_running_loop().time()
