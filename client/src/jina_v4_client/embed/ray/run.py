"""A run: connects to a cluster, lays out the pipeline, and waits for its end."""

import contextlib
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext

from jina_v4_client.embed.errors import ChangedError, StoppedError, UsageError
from jina_v4_client.embed.job import Job, check_unchanged
from jina_v4_client.embed.places import File, FileSystems, list_files, without_keys
from jina_v4_client.embed.progress import Progress
from jina_v4_client.embed.ray import Plan
from jina_v4_client.embed.ray.corpus import Corpus, read_contents
from jina_v4_client.embed.ray.parts import Output
from jina_v4_client.embed.ray.worker import Worker

_OBJECT_STORE_BYTES = 2**29  # of a Ray of our own: what is in flight, and no more
_CALLS_A_WORKER = 2  # at a time, so that its server has the next block when it is done with one
_TRIES = 5  # of a block whose worker was lost: it may be what ends them
# Rows a block: a second or more of a GPU, as the driver schedules each block. Pages and multi-vectors are large.
_ROWS_A_BLOCK, _LARGE_ROWS_A_BLOCK = 1024, 128
_BLOCK_BYTES = 2**26  # blocks are cut at about this size
_ROWS_READ = 64  # at a time
_OURS = re.compile(r"\bjina_v4_client\.\S*errors\.(\w+): (.+)")  # an error of ours in the text of one of Ray's


def run(plan: Plan, *, force: bool, restart: bool) -> int:
    """Embed what is not done yet, and say so; return how many rows have errors.

    Raises:
        UsageError: the run cannot begin.
        StoppedError: it cannot go on; what is written is kept.
    """
    progress = Progress(None, 0, quiet=True)  # Ray shows its own
    files, filesystems, fingerprints = list_files(plan.inputs, plan.output)
    job = Job(plan.options, fingerprints)
    try:
        with _connect(plan):
            output = Output(plan.output)
            holder = _hold(output)
            output.begin(job, force=force, restart=restart)
            try:
                _embed(plan, files, filesystems, output, holder)
            except BaseException:
                with contextlib.suppress(ChangedError, UsageError):
                    _list_again(plan, files, output)  # notes a change, whatever ended the run
                raise
            check_unchanged(job, partial(_list_again, plan, files, output))
            n_failed = output.finish()
    except ray.exceptions.RayError as error:
        # What workers met reaches us as text alone; the last error was raised from those before it, and names the row.
        found = _OURS.findall(str(error))
        name, message = found[-1] if found else ("", f"Ray cannot go on: {str(error).splitlines()[-1]}")
        raise (UsageError if name == "UsageError" else StoppedError)(message) from error
    progress.add(output.n_rows)
    if n_failed or not plan.quiet:
        sys.stderr.write(f"{progress.summary()}\nwrote {without_keys(plan.output)}\n")
    if n_failed:
        sys.stderr.write(f"{n_failed:,} rows have no vector; {without_keys(plan.output)}/errors says why\n")
    return n_failed


def _list_again(plan: Plan, files: Sequence[File], output: Output) -> Sequence[Mapping[str, object]]:
    """List the inputs at the end of a run; return their fingerprints.

    Raises:
        ChangedError: a file that was to be read has changed: rows that are done may be of either state.
    """
    now, _, fingerprints = list_files(plan.inputs, plan.output)
    unchanged = set(now)
    if changed := next((file for file in files if file not in unchanged), None):
        output.note_change()
        raise ChangedError(f"{changed.name} changed during the run; start anew with --restart")
    return fingerprints


def _hold(output: Output) -> Any:
    """Start the actor that holds the run together, on this machine."""
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    actor = ray.remote(num_cpus=0, label_selector=here)(Output)
    try:
        return actor.options(name=f"jina-v4-embed {output.path}", namespace="jina-v4-embed").remote(output.uri)
    except ValueError as error:  # the name is in use
        raise UsageError(f"{output.name}: another run on this cluster is at work in it") from error


def _embed(plan: Plan, files: Sequence[File], filesystems: FileSystems, output: Output, holder: Any) -> None:
    """Embed the rows that no checkpoint has."""
    DataContext.get_current().checkpoint_config = output.checkpoints()
    are_large = plan.options["multivector"] or plan.options["image-column"] or any(file.in_folder for file in files)
    n_rows = _LARGE_ROWS_A_BLOCK if are_large else _ROWS_A_BLOCK
    n_gpus = 0 if plan.urls else int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call] # Ray's
    corpus = Corpus(files, filesystems, plan)
    rows = ray.data.read_datasource(corpus, override_num_blocks=len(corpus.tasks))
    rows = rows.repartition(target_num_rows_per_block=n_rows)
    rows = rows.map_batches(read_contents, fn_args=(filesystems, plan), batch_size=_ROWS_READ, batch_format="pyarrow")
    rows.map_batches(
        Worker,
        fn_constructor_args=(holder, plan),
        batch_size=n_rows if n_gpus else None,  # with a GPU Ray wants a number; None takes a block as it is
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            size=plan.n_workers or len(plan.urls) or max(1, n_gpus),
            max_concurrent_calls_per_actor=_CALLS_A_WORKER,
            enable_true_multi_threading=True,
        ),
        num_cpus=0 if n_gpus else 1,
        num_gpus=1 if n_gpus else 0,
        max_task_retries=_TRIES - 1,
    ).write_datasink(output)


def _connect(plan: Plan) -> Any:
    """Connect to a cluster, or start one here; return what leaves it again. Ray leaves the signals to us."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if plan.address == "local":
        n_cpus = (plan.n_workers or 1) + max(3, os.cpu_count() or 1)  # beside workers, tasks read, filter and write
        options |= {"num_cpus": n_cpus, "object_store_memory": _OBJECT_STORE_BYTES, "include_dashboard": False}
    # Ray has no other way yet to bound the tries; without a bound, a block that ends workers ends all.
    warnings.filterwarnings("ignore", ".*ray_remote_args", DeprecationWarning)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what fails is said once, in words of ours
    context = DataContext.get_current()
    context.enable_progress_bars = sys.stderr.isatty() and not plan.quiet
    context.target_max_block_size = _BLOCK_BYTES
    handler = signal.getsignal(signal.SIGTERM)
    try:
        return ray.init(plan.address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(f"--ray {plan.address}: {error}") from error
    finally:
        signal.signal(signal.SIGTERM, handler)
