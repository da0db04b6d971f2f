"""The workers of a run, behind the two calls that a run makes: `encode` and `revision`."""

import itertools
import logging
import os
import pickle
import signal
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jina_v4_client.embed.content import Kind
from jina_v4_client.embed.encoder import Vector
from jina_v4_client.embed.errors import StoppedError, UsageError
from jina_v4_client.embed.ray.feed import Feed, Source
from jina_v4_client.embed.ray.server import ServerSettings
from jina_v4_client.embed.ray.worker import Answer, Call, Worker
from jina_v4_client.errors import WrongServerError

CALLS_A_WORKER = 4  # at a time, so that its server has the next batch when it is done with one
_LOCAL = "local"
_OBJECT_STORE_BYTES = 2**29  # of a Ray of our own: what is in flight, and no more


class Pool:
    """Workers on a Ray cluster, each with a server of its own. Use it in a `with` block.

    Args:
        address: of the cluster; "local" starts one on this machine.
        n_workers: as many; None for one a GPU of the cluster, one without any.
        server: how each is started.
        client: arguments of each worker's client.
        options: of the command, by the name of the flag.

    Raises:
        UsageError: there is no cluster at the address, or it has no room.
    """

    def __init__(
        self,
        address: str,
        n_workers: int | None,
        server: ServerSettings,
        client: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        _connect(address, n_workers)
        n_gpus = int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call] # Ray's
        self.n_workers = n_workers or max(1, n_gpus)
        on_gpu = n_gpus > 0
        self._numbers = itertools.count()
        self._waiting: dict[int, Future[Answer]] = {}
        self._revision: str | None = None
        self._failure: StoppedError | None = None
        self._changing = threading.Lock()
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._feed: Any = ray.remote(Feed).options(num_cpus=0, scheduling_strategy=here, max_concurrency=1000).remote()
        answers = self._stream(
            (self._feed, replace(server, on_gpu=on_gpu), dict(client), dict(options)), n_gpus=int(on_gpu)
        )
        self._receiver = threading.Thread(target=self._receive, args=(answers,), name="ray-answers", daemon=True)
        self._receiver.start()

    @property
    def n_requests(self) -> int:
        """How many calls keep all workers busy."""
        return CALLS_A_WORKER * self.n_workers

    def encode(self, kind: Kind, values: list[Any]) -> list[Vector]:
        """Embed contents of one kind, on any worker; to be called by several threads."""
        answer = self._ask(Call(kind, values))
        if answer.error is not None:
            raise answer.error
        if answer.revision != self._revision:
            raise WrongServerError(
                f"one worker serves revision {self._revision} and another {answer.revision}: vectors of the two do not"
                " go together. Give every node the same checkpoint, and say the same --dtype in --server-args"
            )
        return answer.vectors

    def revision(self) -> str | None:
        """Wait for a worker, and go on with the revision of its model only."""
        answer = self._ask(Call("text", []))
        if answer.error is not None:
            raise answer.error
        self._revision = answer.revision
        return self._revision

    def close(self) -> None:
        """End the workers and their servers."""
        ray.shutdown()

    def __enter__(self) -> Self:
        """Give this pool."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the stream as it should be ended, or at once after an error; then the workers."""
        if error is None:
            self._feed.end.remote()
            self._receiver.join()
        self.close()

    def _stream(self, arguments: tuple[Any, ...], n_gpus: int) -> Dataset:
        calls: Dataset = ray.data.read_datasource(Source(self._feed), override_num_blocks=1, num_cpus=0)
        return calls.map_batches(
            Worker,
            fn_constructor_args=arguments,
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                size=self.n_workers,
                max_concurrent_calls_per_actor=CALLS_A_WORKER,
                max_tasks_in_flight_per_actor=CALLS_A_WORKER,
                enable_true_multi_threading=True,
            ),
            num_cpus=0 if n_gpus else 1,
            num_gpus=n_gpus,
        )  # Ray Data restarts a worker that was lost, and repeats its calls, without end; the feed counts them

    def _ask(self, call: Call) -> Answer:
        future: Future[Answer] = Future()
        with self._changing:
            if self._failure is not None:
                raise self._failure
            number = next(self._numbers)
            self._waiting[number] = future
        self._feed.put.remote(number, pickle.dumps(call, protocol=5))
        return future.result()

    def _receive(self, answers: Dataset) -> None:
        """Hand out answers as they come: what the receiver's thread runs."""
        failure = StoppedError("the workers have ended")
        try:
            tables: Iterable[Any] = answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
            for table in tables:
                for row in table.to_pylist():
                    self._feed.answered.remote(row["number"])
                    with self._changing:
                        future = self._waiting.pop(row["number"], None)
                    if future is not None:  # else it was done twice
                        future.set_result(pickle.loads(row["answer"]))  # noqa: S301 - our worker's
        except Exception as error:
            failure = StoppedError(f"Ray's workers cannot go on: {error}")
        with self._changing:
            self._failure = failure
            waiting, self._waiting = list(self._waiting.values()), {}
        for future in waiting:
            future.set_exception(failure)


def _connect(address: str, n_workers: int | None) -> None:
    """Connect to a cluster, or start one here; Ray tells nobody of it, and leaves the signals to us."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    handler = signal.getsignal(signal.SIGTERM)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if address == _LOCAL:
            ray.init(
                "local",
                num_cpus=None if n_workers is None else max(n_workers, os.cpu_count() or 1),
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                **quiet,
            )
        else:
            ray.init(address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(f"--ray {address}: {error}") from error
    finally:
        signal.signal(signal.SIGTERM, handler)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # every call goes on by itself, none is collected with others
