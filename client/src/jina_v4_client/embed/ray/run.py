"""A run: connects to a cluster, lays out the pipeline, and waits for its end."""

import logging
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.util.annotations import RayDeprecationWarning
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from jina_v4_client.embed.errors import StoppedError, UsageError
from jina_v4_client.embed.job import Job
from jina_v4_client.embed.places import list_files, scheme_of, without_keys
from jina_v4_client.embed.ray.corpus import Corpus, Plan, read_contents
from jina_v4_client.embed.ray.parts import Output, Parts
from jina_v4_client.embed.ray.worker import Worker

_OBJECT_STORE_BYTES = 2**29  # of a Ray of our own: what is in flight, and no more
_CALLS_A_WORKER = 2  # at a time, so that its server has the next block when it is done with one
_TRIES = 5  # of a block whose worker was lost: it may be what ends them
# Rows a block: a second or more of a GPU, as the driver schedules each block. Pages and multi-vectors are large.
_ROWS_A_BLOCK, _LARGE_ROWS_A_BLOCK = 1024, 128
_BLOCK_BYTES = 2**26  # blocks are cut at about this size
_ROWS_READ = 64  # at a time
_OURS = re.compile(r"\bjina_v4_client\.\S*errors\.(\w+): (.+)")  # an error in what Ray passes on, which is text alone


def run(
    plan: Plan,
    inputs: Sequence[str],
    output: str,
    address: str,
    n_workers: int | None,
    *,
    force: bool,
    restart: bool,
    quiet: bool,
) -> tuple[int, str]:
    """Embed what is not done yet; return how many rows have errors, and what to tell of the run.

    Args:
        plan: what every process of the run knows.
        inputs: files, folders or patterns, as paths or URIs.
        output: a folder.
        address: of the cluster; "local" starts one on this machine.
        n_workers: how many; None for one a GPU of the cluster or an address, or one.
        force: whether to replace an output that is there.
        restart: whether to throw away what an earlier run has done.
        quiet: whether to show no progress.

    Raises:
        UsageError: the run cannot begin.
        StoppedError: it cannot go on; what is written is kept.
    """
    start = time.monotonic()
    files, filesystems, fingerprints = list_files(inputs, output)
    folder = output if scheme_of(output) else str(Path(output).absolute())  # for processes that run elsewhere
    with _cluster(address, n_workers, quiet=quiet), _errors_in_words():
        corpus, parts, holder = Corpus(files, filesystems, plan), Parts(Output(folder)), _hold(folder)
        ray.get(holder.begin.remote(Job(plan.options, fingerprints), force=force, restart=restart))
        DataContext.get_current().checkpoint_config = Output(folder).checkpoints()
        are_large = plan.options["multivector"] or plan.options["image-column"] or any(file.in_folder for file in files)
        n_gpus = 0 if plan.urls else int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call] # Ray's
        rows = ray.data.read_datasource(corpus, override_num_blocks=len(corpus.tasks))
        rows = rows.repartition(target_num_rows_per_block=_LARGE_ROWS_A_BLOCK if are_large else _ROWS_A_BLOCK)
        read = partial(read_contents, filesystems=filesystems, plan=plan)
        rows.map_batches(read, batch_size=_ROWS_READ, batch_format="pyarrow").map_batches(
            Worker,
            fn_constructor_args=(holder, plan),
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                size=n_workers or len(plan.urls) or max(1, n_gpus),
                max_concurrent_calls_per_actor=_CALLS_A_WORKER,
                max_tasks_in_flight_per_actor=2 * _CALLS_A_WORKER,
                enable_true_multi_threading=True,
            ),
            num_cpus=0 if n_gpus else 1,
            num_gpus=1 if n_gpus else 0,
            max_task_retries=_TRIES - 1,
        ).write_datasink(parts)
        try:
            is_as_it_was = list_files(inputs, output)[2] == fingerprints
        except UsageError as error:
            raise StoppedError(str(error)) from error
        if not is_as_it_was:
            raise StoppedError("an input changed during the run: put it back as it was, or start anew with --restart")
        n_failed = ray.get(holder.finish.remote())
    took_s = time.monotonic() - start
    shown = without_keys(output)
    lines = f"{parts.n_rows:,} rows in {took_s:,.1f} s, {parts.n_rows / took_s:,.1f} rows/s\nwrote {shown}\n"
    return n_failed, lines + f"{n_failed:,} rows have no vector; {shown}/errors says why\n" * bool(n_failed)


def _hold(output: str) -> Any:
    """Start the actor that holds the run together, on this machine."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    name = f"jina-v4-embed {Output(output).path}"
    options = {"name": name, "namespace": "jina-v4-embed", "num_cpus": 0, "scheduling_strategy": here}
    try:
        return ray.remote(Output).options(**options).remote(output)
    except ValueError as error:  # the name is in use
        raise UsageError(f"{without_keys(output)}: another run on this cluster is at work in it") from error


@contextmanager
def _errors_in_words() -> Iterator[None]:
    """Raise the error of ours that a worker met; of any other, one of ours with its text."""
    try:
        yield
    except ray.exceptions.RayError as error:
        found = _OURS.findall(str(error))  # the last was raised from those before it, and names the row
        name, message = found[-1] if found else ("", f"Ray cannot go on: {str(error).splitlines()[-1]}")
        raise (UsageError if name == "UsageError" else StoppedError)(message) from error


@contextmanager
def _cluster(address: str, n_workers: int | None, *, quiet: bool) -> Iterator[None]:
    """Connect to a cluster, or start one here; Ray reports to nobody, and leaves the signals to us."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    handler = signal.getsignal(signal.SIGTERM)
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == "local":
        n_cpus = (n_workers or 1) + max(3, os.cpu_count() or 1)  # beside workers, tasks that read, filter and write
        options |= {"num_cpus": n_cpus, "object_store_memory": _OBJECT_STORE_BYTES, "include_dashboard": False}
    try:
        ray.init(address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(f"--ray {address}: {error}") from error
    finally:
        signal.signal(signal.SIGTERM, handler)
    # Ray has no other way yet to bound the tries; without a bound, a block that ends workers ends all.
    warnings.filterwarnings("ignore", ".*ray_remote_args", RayDeprecationWarning)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what fails is said once, in words of ours
    context = DataContext.get_current()
    context.enable_progress_bars = sys.stderr.isatty() and not quiet
    context.target_max_block_size = _BLOCK_BYTES
    try:
        yield
    finally:
        ray.shutdown()
