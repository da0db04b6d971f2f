"""A worker: an actor that embeds blocks of rows, with a server of its own or at given addresses."""

import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, get_args

import pyarrow  # type: ignore[import-untyped] # it has no types
import ray

from jina_v4_client.embed.content import Kind, escaped
from jina_v4_client.embed.encoder import make_encode
from jina_v4_client.embed.errors import RowError, StoppedError
from jina_v4_client.embed.output import facts
from jina_v4_client.embed.ray import Plan
from jina_v4_client.errors import JinaV4Error

# Serve's own: starts `jina-v4-serve`, prints its address once it serves, and ends with its standard input.
_SERVER = (sys.executable, "-P", "-m", "jina_v4_serve.ray.child")
_PATIENCE_S = 3.0  # at the end of a run Ray ends the processes of a worker before the worker


class Worker:
    """What Ray Data runs as an actor; several threads call it. The actor `output` holds all to one revision.

    Raises:
        StoppedError: a server does not start, or has another revision.
    """

    def __init__(self, output: Any, plan: Plan) -> None:
        from jina_v4_client import EmbeddingsClient

        self._plan = plan
        clients = [EmbeddingsClient(url, **plan.client) for url in plan.urls or [_start_server(plan.server)]]
        for client in clients:
            revision = client.revision()
            ray.get(output.hold.remote(revision))
        self._metadata = {"jina_v4": facts(plan.options, revision)}
        self._encodes = itertools.cycle([make_encode(client, plan.options, plan.batch_sizes) for client in clients])

    def __call__(self, rows: pyarrow.Table) -> pyarrow.Table:
        """Embed rows: (row, id, kind, text, image, note, error) becomes (row, id, note, vector, error).

        Raises:
            StoppedError: a row cannot be embedded, and rows are not to be skipped, or no row is to blame.
        """
        options, width = self._plan.options, 0
        items = rows.to_pylist()
        for kind in get_args(Kind):
            sent = [item for item in items if item["kind"] == kind]
            values = [item["image"] if item["text"] is None else item["text"] for item in sent]
            for item, outcome in zip(sent, next(self._encodes)(kind, values) if sent else [], strict=True):
                if isinstance(outcome, JinaV4Error):
                    raise StoppedError(str(outcome))
                if isinstance(outcome, RowError):
                    item["error"] = escaped(str(outcome))
                    if not self._plan.skip:
                        raise StoppedError(f"row {item['id']}: {item['error']}")
                else:
                    vector = outcome.astype(options["dtype"], copy=False)  # (width,), of multi-vectors (n, width)
                    width = vector.shape[-1]
                    item["vector"] = list(vector) if options["multivector"] else vector
        of_one = pyarrow.list_(pyarrow.from_numpy_dtype(options["dtype"]), width)
        of_all = pyarrow.list_(of_one) if options["multivector"] else of_one
        vectors = pyarrow.array([item.get("vector") for item in items], of_all if width else None)
        made = {"vector": vectors, "error": pyarrow.array([item["error"] for item in items], "string")}
        return pyarrow.table({name: rows[name] for name in ("row", "id", "note")} | made, metadata=self._metadata)


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
