"""Checkpoints: whole, with a canary, of one kind; what they will be computed in, and whether memory holds that."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from jina_v4_serve import cpu
from jina_v4_serve.checkpoint import BASE, CANARY, MANIFEST, STORED_DTYPES, Checkpoint, read_checkpoint, read_json
from jina_v4_serve.doctor.finding import Finding, gib
from jina_v4_serve.doctor.machine import Gpu, available_bytes
from jina_v4_serve.errors import CheckpointError, OptionError
from jina_v4_serve.fleet import memory_share
from jina_v4_serve.launcher import PORTS, Settings, adapters_of, find_vllm, served_dtype
from jina_v4_serve.room import GPU_ROOM_BYTES, needed_bytes

_ALONE = 0.92  # of a GPU's whole memory: vLLM's own default for one server


def check_checkpoints(folders: Sequence[Path], dtype: str, gpus: Sequence[Gpu]) -> Iterator[Finding]:
    """Look at checkpoints that are to be served on this machine together.

    Args:
        folders: one a task.
        dtype: as --dtype.
        gpus: that the driver shows; the first is the one that is used.
    """
    found: list[Checkpoint] = []
    for folder in folders:
        try:
            checkpoint = read_checkpoint(folder, task_of(folder))
            adapters = adapters_of(checkpoint)
        except CheckpointError as error:
            yield Finding("FAIL", "checkpoint", str(error), "jina-v4-merge verify says more; docs/merge.md")
            continue
        found.append(checkpoint)
        size = gib(checkpoint.weight_bytes)
        yield Finding("ok", "checkpoint", f"{checkpoint.task}: whole, {checkpoint.dtype}, {size}, {folder}")
        if not adapters:
            yield check_canary(checkpoint.task, folder)
        for task, adapter in adapters.items():
            yield Finding("ok", "adapter", f"{task}: whole, rank {adapter.rank}, {adapter.folder}")
            yield check_canary(task, adapter.folder)
    if not found:
        return
    yield check_weights(found)
    if len(found) > 1:
        yield check_alike(found)
    try:
        on_cpu = find_vllm()
    except OptionError:  # told by `check_vllm`
        return
    yield check_dtype(found, dtype, on_cpu, gpus)
    yield check_cpu_memory(found, dtype) if on_cpu else check_gpu_memory(found, dtype, gpus)


def task_of(folder: Path) -> str:
    """Return the task that a folder's manifest names; an empty text where it names none."""
    try:
        return str(read_json(folder / MANIFEST).get("task", ""))
    except CheckpointError:
        return ""


def whole_digests(folders: Sequence[Path]) -> dict[str, str]:
    """Return the digests of the checkpoints that are whole, by task."""
    digests: dict[str, str] = {}
    for folder in folders:
        with contextlib.suppress(CheckpointError):
            checkpoint = read_checkpoint(folder, task_of(folder))
            digests[checkpoint.task] = checkpoint.digest
    return digests


def folders_in(parent: Path) -> list[Path]:
    """Return the folders in which `all` looks for the tasks' checkpoints, or with --one-base for the base."""
    if (parent / BASE / MANIFEST).is_file():
        return [parent / BASE]
    return [parent / f"jina-embeddings-v4-{task}" for task in PORTS]


def check_canary(task: str, folder: Path) -> Finding:
    """See whether a server will be able to check its own vectors."""
    if (folder / CANARY).exists():
        return Finding("ok", "canary", f"{task}: there; a server compares its vectors before it serves")
    advice = f"jina-v4-merge verify {folder} --canary"
    return Finding("warn", "canary", f"{task}: none; wrong vectors would not be noticed", advice)


def check_weights(checkpoints: Sequence[Checkpoint]) -> Finding:
    """Say whose weights these are."""
    random = [checkpoint.task for checkpoint in checkpoints if checkpoint.random_weights]
    if random:
        found = f"RANDOM ones of the stand-in ({', '.join(random)}): the vectors mean nothing"
        return Finding("warn", "weights", found, "fine for trying; else fold the real base")
    return Finding("ok", "weights", "not random; the published ones are for no commercial use (Qwen Research License)")


def check_alike(checkpoints: Sequence[Checkpoint]) -> Finding:
    """See whether the tasks' checkpoints were folded in one way."""
    for name in ("dtype", "max_pixels", "random_weights"):
        values = {checkpoint.task: getattr(checkpoint, name) for checkpoint in checkpoints}
        if len(set(values.values())) > 1:
            differ = ", ".join(f"{task} {value}" for task, value in values.items())
            return Finding("warn", "tasks", f"{name} differs: {differ}", "fold all tasks from one base, at once")
    return Finding("ok", "tasks", f"{', '.join(checkpoint.task for checkpoint in checkpoints)}: folded alike")


def _dtype(checkpoints: Sequence[Checkpoint], dtype: str, on_cpu: bool) -> str:
    first = checkpoints[0]
    return served_dtype(Settings(first.task, first.folder, dtype=dtype, n_servers=len(checkpoints)), first, on_cpu)


def check_dtype(checkpoints: Sequence[Checkpoint], dtype: str, on_cpu: bool, gpus: Sequence[Gpu]) -> Finding:
    """Say what will be computed in, and why."""
    if dtype not in ("auto", *STORED_DTYPES):
        return Finding("FAIL", "dtype", f"--dtype {dtype} is not offered", f"choose auto, {', '.join(STORED_DTYPES)}")
    chosen, stored = _dtype(checkpoints, dtype, on_cpu), checkpoints[0].dtype
    if dtype != "auto":
        found = f"{chosen}, as you say"
    elif chosen != stored:
        found = f"{chosen}: this processor is faster in it than in the checkpoint's {stored}, and memory has room"
    else:
        found = f"{chosen}, the checkpoint's"
    too_old = [gpu for gpu in gpus if gpu.compute_capability < 8]
    if not on_cpu and chosen == "bfloat16" and too_old:
        return Finding("FAIL", "dtype", f"{found}; {too_old[0].name} has no bfloat16", "--dtype float16")
    return Finding("ok", "dtype", found)


def check_cpu_memory(checkpoints: Sequence[Checkpoint], dtype: str) -> Finding:
    """Compare what the servers will take with the memory that there is."""
    chosen = _dtype(checkpoints, dtype, on_cpu=True)
    needed = sum(needed_bytes(each, adapters_of(each).values(), chosen, on_cpu=True) for each in checkpoints)
    whole, available = cpu.memory_bytes(), available_bytes()
    found = f"{gib(needed)} for {_servers(checkpoints)} in {chosen}, of {gib(whole)}"
    if needed > whole:
        advice = "serve fewer tasks here, or take --dtype bfloat16, or a larger machine: docs/operations.md#sizing"
        return Finding("FAIL", "need", found, advice)
    if needed > available:
        advice = "end what has the rest, unless that is these servers, running already"
        return Finding("warn", "need", f"{found}; {gib(available)} are available now", advice)
    return Finding("ok", "need", found)


def check_gpu_memory(checkpoints: Sequence[Checkpoint], dtype: str, gpus: Sequence[Gpu]) -> Finding:
    """Compare what each server will take with its share of the GPU."""
    if not gpus:
        return Finding("FAIL", "need", "there is no GPU to hold the weights", "see the lines on vLLM and GPU")
    gpu, n_servers = gpus[0], len(checkpoints)
    chosen = _dtype(checkpoints, dtype, on_cpu=False)
    needed = max(needed_bytes(each, adapters_of(each).values(), chosen, on_cpu=False) for each in checkpoints)
    held = needed - GPU_ROOM_BYTES
    share = _ALONE * gpu.total_bytes
    if n_servers > 1:
        share = memory_share(gpu.free_bytes, gpu.total_bytes, n_servers) * gpu.total_bytes
    found = f"{gib(held)} at least and some {gib(GPU_ROOM_BYTES)} to work, each, in {chosen}; its share: {gib(share)}"
    advice = "fewer tasks a GPU, a larger one, or docs/operations.md#sizing"
    if held > share or (n_servers == 1 and share > gpu.free_bytes):
        return Finding("FAIL", "need", f"{found}, {gib(gpu.free_bytes)} free", advice)
    if needed > share:
        return Finding("warn", "need", found, advice)
    return Finding("ok", "need", found)


def _servers(checkpoints: Sequence[Checkpoint]) -> str:
    return "one server" if len(checkpoints) == 1 else f"{len(checkpoints)} servers"
