"""A worker: an actor that embeds blocks of rows, with a server of its own or at given addresses."""

import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow  # type: ignore[import-untyped] # it has no types
import ray

from jina_v4_client.embed.content import Kind, escaped
from jina_v4_client.embed.encoder import make_encode
from jina_v4_client.embed.errors import RowError, StoppedError
from jina_v4_client.embed.output import vector_column
from jina_v4_client.embed.ray.corpus import Plan
from jina_v4_client.errors import JinaV4Error
from jina_v4_client.results import Vector

# Serve's own: starts `jina-v4-serve`, prints its address once it serves, and ends with its standard input.
_SERVER = (sys.executable, "-P", "-m", "jina_v4_serve.ray.child")
_PATIENCE_S = 3.0  # at the end of a run Ray ends the processes of a worker before the worker
_NAMES: dict[Kind, tuple[str, ...]] = {"text": ("text",), "image": ("image", "url")}


class Worker:
    """What Ray Data runs as an actor; several threads call it.

    Args:
        output: the actor that holds all workers to one revision.
        plan: of the run.

    Raises:
        StoppedError: a server does not start, or has another revision.
    """

    def __init__(self, output: Any, plan: Plan) -> None:
        from jina_v4_client import EmbeddingsClient

        self._plan = plan
        clients = [EmbeddingsClient(url, **plan.client) for url in plan.urls or [_start_server(plan.server)]]
        for client in clients:
            revision = client.revision()
            if (held := ray.get(output.hold.remote(revision))) != revision:
                raise StoppedError(
                    f"a server has revision {revision} of the model, and other vectors are of {held}: they do not go"
                    " together. Give every node the same checkpoint and the same --dtype in --server-args, or start"
                    " anew with --restart"
                )
        facts = {name: value for name, value in plan.options.items() if value is not None}
        self._metadata = {"jina_v4": json.dumps(facts | {"revision": revision})}
        self._encodes = itertools.cycle([make_encode(client, plan.options, plan.batch_sizes) for client in clients])

    def __call__(self, rows: pyarrow.Table) -> pyarrow.Table:
        """Embed rows: (row, id, kind, content, note, error) becomes (row, id, vector, note, error).

        Raises:
            StoppedError: a row cannot be embedded, and rows are not to be skipped, or no row is to blame.
        """
        ids, kinds, contents, errors = (rows[name].to_pylist() for name in ("id", "kind", "content", "error"))
        vectors: dict[int, Vector] = {}
        for kind, names in _NAMES.items():
            places = [place for place, name in enumerate(kinds) if name in names]
            values = [contents[place] if kinds[place] == "image" else contents[place].decode() for place in places]
            outcomes = next(self._encodes)(kind, values) if values else []
            for place, outcome in zip(places, outcomes, strict=True):
                if isinstance(outcome, JinaV4Error):
                    raise StoppedError(str(outcome))
                if not isinstance(outcome, RowError):
                    vectors[place] = outcome
                    continue
                errors[place] = escaped(str(outcome))
                if not self._plan.skip:
                    raise StoppedError(f"row {ids[place]}: {errors[place]}")
        made = {"vector": self._column(vectors, len(ids)), "error": pyarrow.array(errors, "string")}
        return pyarrow.table({name: rows[name] for name in ("row", "id", "note")} | made, metadata=self._metadata)

    def _column(self, vectors: Mapping[int, Vector], n_rows: int) -> Any:
        """Make the column of vectors, null where a row has none."""
        if not vectors:
            return pyarrow.nulls(n_rows)
        parts = [np.atleast_2d(vector) for vector in vectors.values()]  # (1, width), of multi-vectors (n, width)
        lengths = [len(part) for part in parts] if self._plan.options["multivector"] else None
        column = vector_column(np.concatenate(parts).astype(self._plan.options["dtype"], copy=False), lengths)
        order = {place: i for i, place in enumerate(vectors)}
        return column.take(pyarrow.array([order.get(place) for place in range(n_rows)], "int64"))


def _start_server(arguments: Sequence[str]) -> str:
    """Start a server that ends with this process, as this process ends with it; return its address."""
    process = subprocess.Popen([*_SERVER, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    url = "" if process.stdout is None else process.stdout.readline().strip()
    if not url:
        raise StoppedError(
            f"jina-v4-serve {arguments[0]} ended with exit code {process.wait()} on the node {socket.gethostname()}"
            " before it was ready. Every node that may get a worker needs jina-v4-serve[vllm]; the log of its worker,"
            " below Ray's folder for this session, says more"
        )

    def end_too() -> None:
        process.wait()
        time.sleep(_PATIENCE_S)
        os._exit(1)  # Ray starts another worker in this one's place, which gets what this one held

    threading.Thread(target=end_too, name="server-watch", daemon=True).start()
    return url
