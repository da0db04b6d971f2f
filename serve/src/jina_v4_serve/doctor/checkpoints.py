"""Checks the checkpoints: complete, with a canary, folded alike; the dtype to compute in; the memory they need."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from jina_v4_serve.checkpoint import BASE, CANARY, MANIFEST, Checkpoint, read_checkpoint, read_json
from jina_v4_serve.doctor.finding import Finding, gib
from jina_v4_serve.doctor.machine import OLDEST_BFLOAT16, available_bytes
from jina_v4_serve.errors import CheckpointError, OptionError
from jina_v4_serve.exported import read_adapters
from jina_v4_serve.facts import TASKS, model_name
from jina_v4_serve.launch import cpu
from jina_v4_serve.launch.checks import check_int8
from jina_v4_serve.launch.gpu import Gpu
from jina_v4_serve.launch.server import DTYPES
from jina_v4_serve.launch.sizing import held_bytes, needed_bytes, offered_bytes, room_bytes, served_dtype, step_of
from jina_v4_serve.vllm_side.versions import find_vllm


def check_checkpoints(folders: Sequence[Path], dtype: str, gpus: Sequence[Gpu]) -> Iterator[Finding]:
    """Check the checkpoints (one folder per task) of all servers of this machine; the first GPU is used."""
    complete: list[Checkpoint] = []
    for folder in folders:
        try:
            checkpoint = read_checkpoint(folder, task_of(folder))
            adapters = read_adapters(checkpoint)
        except CheckpointError as error:
            yield Finding("FAIL", "checkpoint", str(error), "jina-v4-merge verify finds out more; docs/merge.md")
            continue
        complete.append(checkpoint)
        size = gib(checkpoint.weight_bytes)
        yield Finding("ok", "checkpoint", f"{checkpoint.task}: complete, {checkpoint.precision}, {size}, {folder}")
        if not adapters:
            yield check_canary(checkpoint.task, folder)
        for task, adapter in adapters.items():
            yield Finding("ok", "adapter", f"{task}: complete, rank {adapter.rank}, {adapter.folder}")
            yield check_canary(task, adapter.folder)
    if not complete:
        return
    yield check_weights(complete)
    if len(complete) > 1:
        yield check_alike(complete)
    try:
        on_cpu = find_vllm()
    except OptionError:  # `check_vllm` reports it
        return
    yield check_dtype(complete, dtype, on_cpu, gpus)
    yield check_cpu_memory(complete, dtype) if on_cpu else check_gpu_memory(complete, dtype, gpus)


def task_of(folder: Path) -> str:
    """Return the task in a folder's name, or else the one in its manifest; "" if there is none."""
    if by_name := [task for task in TASKS if folder.name == model_name(task)]:
        return by_name[0]
    try:
        return str(read_json(folder / MANIFEST).get("task", ""))
    except CheckpointError:
        return ""


def whole_digests(folders: Sequence[Path]) -> dict[str, str]:
    """Return the digests of the complete checkpoints, by task."""
    digests: dict[str, str] = {}
    for folder in folders:
        with contextlib.suppress(CheckpointError):
            checkpoint = read_checkpoint(folder, task_of(folder))
            digests[checkpoint.task] = checkpoint.digest
    return digests


def folders_in(parent: Path) -> list[Path]:
    """Return the folders in which `all` looks for the tasks' checkpoints, or with --one-base for the base."""
    if os.path.isfile(parent / BASE / MANIFEST):  # noqa: PTH113 - Path.is_file() raises an error where it may not look
        return [parent / BASE]
    return [parent / model_name(task) for task in TASKS]


def check_canary(task: str, folder: Path) -> Finding:
    """Check that there is a canary, with which a server can check its own vectors."""
    if (folder / CANARY).exists():
        return Finding("ok", "canary", f"{task}: a server compares its vectors with it before it serves")
    advice = f"jina-v4-merge verify {folder} --canary"
    return Finding("warn", "canary", f"{task}: none; wrong vectors would not be noticed", advice)


def check_weights(checkpoints: Sequence[Checkpoint]) -> Finding:
    """Report whether the weights are random or real."""
    random = [checkpoint.task for checkpoint in checkpoints if checkpoint.random_weights]
    if random:
        found = f"RANDOM ones of the stand-in ({', '.join(random)}): the vectors mean nothing"
        return Finding("warn", "weights", found, "fine for trying it out; else fold the real base")
    return Finding("ok", "weights", "real; the published ones are not for commercial use (Qwen Research License)")


def check_alike(checkpoints: Sequence[Checkpoint]) -> Finding:
    """Check that the tasks' checkpoints were folded in the same way."""
    for name in ("precision", "max_pixels", "random_weights"):
        values = {checkpoint.task: getattr(checkpoint, name) for checkpoint in checkpoints}
        if len(set(values.values())) > 1:
            differ = ", ".join(f"{task} {value}" for task, value in values.items())
            return Finding("warn", "tasks", f"{name} differs: {differ}", "fold all tasks from one base, at once")
    return Finding("ok", "tasks", f"{', '.join(checkpoint.task for checkpoint in checkpoints)}: folded alike")


def check_dtype(checkpoints: Sequence[Checkpoint], dtype: str, on_cpu: bool, gpus: Sequence[Gpu]) -> Finding:
    """Report the dtype to compute in, and why."""
    if dtype not in DTYPES:
        return Finding("FAIL", "dtype", f"--dtype {dtype} is not offered", f"choose {', '.join(DTYPES)}")
    chosen, stored = served_dtype(dtype, len(checkpoints), checkpoints[0], on_cpu), checkpoints[0].dtype
    if dtype != "auto":
        found = f"{chosen}, from --dtype"
    elif chosen != stored:
        found = f"{chosen}: this processor is faster in it than in the checkpoint's {stored}, and memory suffices"
    else:
        found = f"{chosen}, the checkpoint's"
    try:
        for checkpoint in checkpoints:
            check_int8(checkpoint, on_cpu, chosen)
    except OptionError as error:
        return Finding("FAIL", "dtype", str(error), "docs/merge.md#half-the-weights")
    too_old = [gpu for gpu in gpus if (gpu.compute_capability or OLDEST_BFLOAT16) < OLDEST_BFLOAT16]
    if not on_cpu and chosen == "bfloat16" and too_old:
        return Finding("FAIL", "dtype", f"{found}; {too_old[0].name} has no bfloat16", "--dtype float16")
    return Finding("ok", "dtype", found)


def check_cpu_memory(checkpoints: Sequence[Checkpoint], dtype: str) -> Finding:
    """Compare what the servers need with this machine's memory."""
    chosen = served_dtype(dtype, len(checkpoints), checkpoints[0], on_cpu=True)
    needed = sum(needed_bytes(each, read_adapters(each).values(), chosen) for each in checkpoints)
    whole, available = cpu.memory_bytes(), available_bytes()
    servers = "one server" if len(checkpoints) == 1 else f"{len(checkpoints)} servers"
    found = f"{gib(needed)} for {servers} in {chosen}, of {gib(whole)}"
    if needed > whole:
        advice = "serve fewer tasks here, or use --dtype bfloat16 or a larger machine: docs/operations.md#sizing"
        return Finding("FAIL", "need", found, advice)
    if needed > available:
        advice = "end the programs that use the rest, unless they are these servers already"
        return Finding("warn", "need", f"{found}; {gib(available)} are available now", advice)
    return Finding("ok", "need", found)


def check_gpu_memory(checkpoints: Sequence[Checkpoint], dtype: str, gpus: Sequence[Gpu]) -> Finding:
    """Compare what the servers need with the memory of the GPU."""
    if not gpus:
        return Finding("FAIL", "need", "there is no GPU for the weights", "see the lines on vLLM and GPU")
    chosen = served_dtype(dtype, len(checkpoints), checkpoints[0], on_cpu=False)
    step, offered = step_of(gpus[0]), offered_bytes(gpus[0])
    room = len(checkpoints) * room_bytes(step)
    held = sum(held_bytes(each, read_adapters(each).values(), chosen, step) for each in checkpoints)
    needed = held + room
    servers = "one server" if len(checkpoints) == 1 else f"{len(checkpoints)} servers"
    found = f"{gib(needed)} for {servers} in {chosen}, {gib(room)} of it to work"
    advice = "use fewer tasks per GPU, --one-base, fold --quantize or a larger GPU: docs/operations.md#sizing"
    if offered is None:
        return Finding("warn", "need", f"{found}; the memory of the GPU is unknown", "check that it has this much")
    found = f"{found}; usable: {gib(offered)}"
    if held > offered:
        return Finding("FAIL", "need", found, advice)
    if needed > offered:
        return Finding("warn", "need", found, advice)
    return Finding("ok", "need", found)
