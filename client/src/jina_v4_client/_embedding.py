"""What one call asks of a server, what the replies mean, and what becomes of items that fail. No sockets, no clock.

First it is asked who is there, if that is not known; then the items are sent, batch by batch. Each request is written
no sooner than it is sent, so that no more of them are in memory than are in flight.

With ``skip`` a batch that the server refuses is sent again without the item that the refusal names, or in two halves,
down to single items: at most twice as many requests as it has items. So is one that it answers with 500, which a single
item may bring about. Where the server fails otherwise or is gone, the batch's items have failed. After a few of these
in a row the rest is given up. A refusal of what the call asks for, and not of an item, ends it all the same.
"""

import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

from jina_v4_client import _ours as ours
from jina_v4_client import _stock as stock
from jina_v4_client._batches import Batch, BatchLimits, Images, Item, check_widths, cut, part
from jina_v4_client._dispatch import Job
from jina_v4_client._model import Task
from jina_v4_client._progress import Meter
from jina_v4_client._projector import Projector
from jina_v4_client._server import (
    Known,
    Server,
    check_revision,
    check_unchanged,
    frame_requests,
    models_request,
    read_frame,
    server_for,
)
from jina_v4_client._wire import WIRE_FORMATS, Reply, WireDtype, WireFormat
from jina_v4_client.errors import JinaV4Error, ServerAuthenticationError, ServerError, ServerRefusedError

_MAX_FAILURES = 3
_MAX_FAILED_ITEMS = 10
_REFUSED_ITEM_STATUSES = (400, 413, 415, 422)
_OF_THE_CALL = ("model", "task", "dimensions", "max_length", "max_pixels", "prompt_name", "outputs")  # not of an item
_NAMED_ITEM = re.compile(r"input\[(\d+)\]")


class Embedding:
    """The agenda of one call.

    Args:
        known: what is known of the servers; this call adds to it.
        task: what the vectors are for.
        wholes: all items, texts and images apart.
        batch_size: how many items go into one request at most.
        errors: of items that are not sent, by place.
        skip: whether an item that fails is left out, or ends the call.
        meter: is told how far it is.
        projector: for multi-vectors of a stock server.
        wire_dtype: in which a server of ours sends vectors.

    Raises:
        JinaV4Error: what is known of the servers already rules the call out.
    """

    def __init__(
        self,
        known: Known,
        task: Task,
        wholes: Sequence[Batch],
        *,
        batch_size: int,
        errors: Mapping[int, JinaV4Error],
        skip: bool,
        meter: Meter,
        projector: Projector | None,
        wire_dtype: WireDtype,
    ) -> None:
        self._known = known
        self._task = task
        self._wholes = wholes
        self._batch_size = batch_size
        self._errors = dict(errors)
        self._skip = skip
        self._meter = meter
        self._projector = projector
        self._wire_dtype = wire_dtype
        self._vectors: dict[int, Item] = {}
        self._n_left = sum(len(whole.items) for whole in wholes)
        self._n_failures = 0
        self._server: Server | None = None
        self._met: Server | None = None
        self._questions: deque[Job] = deque()
        self._answers: dict[Job, Reply | None] = {}
        self._batches: Iterator[Batch] = iter(())
        self._again: deque[Batch] = deque()
        meter.advance(len(errors))
        if known.servers is None:
            self._questions.append(Job(models_request()))
            return
        try:
            self._meet(server_for(known.servers, task))
        except ServerError:
            known.forget()
            raise

    @property
    def done(self) -> bool:
        """Whether every item has its vector or its error."""
        return self._n_left == 0

    def take(self) -> Job | None:
        """Give what is to be sent next; None if a reply must come first, or nothing is left."""
        if self._questions:
            return self._questions.popleft()
        if self._server is None:
            return None
        batch = self._again.popleft() if self._again else next(self._batches, None)
        if batch is None:
            return None
        if not self._server.pools:
            return Job(stock.write_request(self._server, batch), batch)
        wire_format = self._known.spoken
        return Job(ours.write_request(self._server, batch, self._wire_dtype, wire_format), batch, wire_format)

    def receive(self, job: Job, reply: Reply) -> None:
        """Take in a reply."""
        try:
            if job.batch is None:
                self._learn(job, reply)
                return
            vectors = self._read(job, job.batch, reply)
        except ServerError as error:
            self.fail(job, error)
            return
        self._n_failures = 0
        self._vectors.update(zip(job.batch.places, vectors, strict=True))
        self._count(len(vectors))

    def fail(self, job: Job, error: ServerError) -> None:
        """Take in that a job was refused, or not answered, for good."""
        batch = job.batch
        if batch is not None and (wire_format := ours.next_format(job.wire_format, error)) is not None:
            self._speak(wire_format)
            self._again.append(batch)
            return
        refused = isinstance(error, ServerRefusedError) and error.status_code in _REFUSED_ITEM_STATUSES
        if batch is None or not self._skip or (refused and error.param in _OF_THE_CALL):
            self._known.forget()
            raise error if batch is None else _located(error, batch)
        if refused or error.status_code == 500:
            named = _named_item(error, batch) if refused else None
            if named is not None:
                self._give_up([batch.places[named]], error)
                rest = [index for index in range(len(batch.items)) if index != named]
                self._again.extend([part(batch, rest)] if rest else [])
                return
            if len(batch.items) > 1:
                middle = len(batch.items) // 2
                self._again.extend([part(batch, range(middle)), part(batch, range(middle, len(batch.items)))])
                return
        self._give_up(batch.places, error)
        if refused:
            return
        self._known.forget()
        self._n_failures += 1
        most = _MAX_FAILED_ITEMS if error.status_code == 500 else _MAX_FAILURES
        if self._n_failures >= most or isinstance(error, ServerAuthenticationError):
            self.abandon(error)

    def abandon(self, error: ServerError) -> None:
        """Take in that nothing more can be sent."""
        self._known.forget()
        if not self._skip or self._server is None:
            raise error
        places = [place for whole in self._wholes for place in whole.places]
        self._give_up([place for place in places if place not in self._vectors and place not in self._errors], error)

    def result(self) -> tuple[dict[int, Item], dict[int, JinaV4Error]]:
        """Give vectors and errors by place in the call.

        Raises:
            BadReplyError: vectors of different dimensions.
        """
        try:
            check_widths(list(self._vectors.values()))
        except ServerError:
            self._known.forget()
            raise
        return self._vectors, self._errors

    def _learn(self, job: Job, reply: Reply) -> None:
        """Take in an answer about the server."""
        if job not in self._answers:
            self._meet(server_for(self._known.learn(reply), self._task))
            return
        self._answers[job] = reply
        head, tail = self._answers.values()
        if self._met is not None and head is not None and tail is not None:
            server = replace(self._met, frame=read_frame(self._met, head, tail))
            self._known.servers = {server.task: server}  # a stock server has one task
            self._begin(server)

    def _meet(self, server: Server) -> None:
        """Check whether a server can do what is asked, and ask it what is not known."""
        check_revision(server, self._known.revisions.get(self._task))
        self._met = server  # the server is not asked for vectors before all of this is settled
        if server.pools:
            self._begin(server)
            return
        refused = {place: error for whole in self._wholes for place, error in stock.check_items(whole).items()}
        if refused and not self._skip:
            raise refused[min(refused)]
        if any("multivector" in whole.outputs for whole in self._wholes):
            stock.check_projector(server, self._projector)
        self._give_up(list(refused), refused)
        if server.frame is None and any(isinstance(whole, Images) for whole in self._wholes):
            self._questions.extend(map(Job, frame_requests(server)))
            self._answers = dict.fromkeys(self._questions)
        else:
            self._begin(server)

    def _begin(self, server: Server) -> None:
        """Cut the batches for a server."""
        self._server = server
        self._batches = chain.from_iterable(cut(self._unspoilt(whole), self._limits(whole)) for whole in self._wholes)

    def _unspoilt(self, whole: Batch) -> Batch:
        if not self._errors:
            return whole
        return part(whole, [index for index, place in enumerate(whole.places) if place not in self._errors])

    def _limits(self, whole: Batch) -> BatchLimits:
        if self._server is None or self._server.pools:
            return BatchLimits(min(self._batch_size, ours.MAX_ITEMS), ours.MAX_TOKENS, ours.MAX_BYTES)
        return BatchLimits(stock.batch_size(whole, self._batch_size), stock.MAX_TOKENS, ours.MAX_BYTES)

    def _read(self, job: Job, batch: Batch, reply: Reply) -> list[Item]:
        if self._server is None:
            raise ValueError("a batch was answered by a server that is not known")
        check_unchanged(self._server, reply)
        if not self._server.pools:
            return stock.read_reply(self._server, batch, reply, self._projector)
        vectors = ours.read_reply(self._server, batch, reply, self._wire_dtype, job.wire_format)
        if job.wire_format == "safetensors" and ours.is_json(reply):
            self._speak("base64")
        return vectors

    def _speak(self, wire_format: WireFormat) -> None:
        """Ask for no better format any more; replies to requests from before may come late."""
        self._known.spoken = max(self._known.spoken, wire_format, key=WIRE_FORMATS.index)

    def _give_up(self, places: Sequence[int], error: JinaV4Error | Mapping[int, JinaV4Error]) -> None:
        self._errors.update({place: error if isinstance(error, JinaV4Error) else error[place] for place in places})
        self._count(len(places))

    def _count(self, n_items: int) -> None:
        self._n_left -= n_items
        self._meter.advance(n_items)


def _named_item(error: ServerError, batch: Batch) -> int | None:
    """Give the item that a refusal names, counted in its request."""
    found = _NAMED_ITEM.match(error.param or "")
    index = int(found.group(1)) if found else -1
    return index if 0 <= index < len(batch.items) else None


def _located(error: ServerError, batch: Batch) -> ServerError:
    """Say which item of the call is meant, where the server could only count those of one request."""
    index = _named_item(error, batch)
    if index is not None and batch.places[index] != index:
        error.args = (f"{error} (input[{index}] is item {batch.places[index]} of the call)",)
    return error
