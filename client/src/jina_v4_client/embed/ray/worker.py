"""A worker: an actor with a server of its own, which embeds what the stream brings."""

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import ray

from jina_v4_client._model import Task
from jina_v4_client.embed.content import Kind
from jina_v4_client.embed.encoder import Encode, Vector, make_encode
from jina_v4_client.embed.errors import StoppedError
from jina_v4_client.embed.ray.feed import block
from jina_v4_client.embed.ray.server import Server, ServerSettings
from jina_v4_client.errors import JinaV4Error

_FAILED = 1  # exit code
_TRIES = 5  # of a call whose worker was lost: it may be what ends them


@dataclass(frozen=True)
class Call:
    """Contents of one kind; none only ask who is there."""

    kind: Kind
    values: list[Any]


@dataclass(frozen=True)
class Answer:
    """Vectors and the revision of the model that made them, or why there are none."""

    vectors: list[Vector]
    revision: str | None = None
    error: JinaV4Error | None = None


class Worker:
    """What Ray Data runs as an actor; its calls come from several threads.

    Args:
        feed: that its calls come from.
        server: how its server is started.
        client: arguments of the client, but for the address.
        options: of the command, by the name of the flag.
    """

    def __init__(
        self, feed: Any, server: ServerSettings, client: Mapping[str, Any], options: Mapping[str, Any]
    ) -> None:
        self._feed = feed
        self._server: Server | None = None
        self._encode: Encode | None = None
        self._revision: str | None = None
        self._error: JinaV4Error | None = None
        try:
            self._start(server, client, options)
        except JinaV4Error as error:
            self._error = error  # told with the first answer: what fails here, Ray would try again and again

    def __call__(self, table: Any) -> Any:
        """Embed a block of one call: (number, call) becomes (number, answer)."""
        (row,) = table.to_pylist()
        if ray.get(self._feed.begin.remote(row["number"])) > _TRIES:
            lost = StoppedError(f"{_TRIES} workers were lost one after the other while they had this")
            answer = Answer([], self._revision, lost)
        else:
            answer = self._answer(pickle.loads(row["call"]))  # noqa: S301 - the command's own
        return block({"number": row["number"], "answer": pickle.dumps(answer, protocol=5)})

    def __del__(self) -> None:
        """End the server: Ray Data lets go of this when the stream has ended."""
        if self._server is not None:
            self._server.stop()

    def _start(self, server: ServerSettings, client: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        from jina_v4_client import EmbeddingsClient

        running = self._server = Server(server)
        # Ray starts another in this one's place, and gives it what this one held.
        running.when_ended(lambda: os._exit(_FAILED))
        connected = EmbeddingsClient(running.url, task=cast(Task, server.task), **client)
        self._revision = connected.revision()
        self._encode = make_encode(connected, options)

    def _answer(self, call: Call) -> Answer:
        if self._encode is None:
            return Answer([], error=self._error)
        try:
            vectors = self._encode(call.kind, call.values) if call.values else []
        except JinaV4Error as error:
            return Answer([], self._revision, error)
        return Answer(vectors, self._revision)
