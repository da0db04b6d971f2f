"""The memory that servers take, told from their checkpoints before anything is started."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jina_v4_serve import cpu
from jina_v4_serve.checkpoint import Checkpoint, read_checkpoint
from jina_v4_serve.errors import OptionError
from jina_v4_serve.fleet import USABLE, gpu_memory_mib
from jina_v4_serve.launcher import DTYPES, PORTS, Settings, find_vllm, kv_cache_bytes, served_dtype, server_bytes
from jina_v4_serve.one_base import Adapter

GIB = 2**30
# Of each server beside its weights, keys and values: Python and libraries in two processes (1.7 GiB with the tiny
# stand-in), activations of a step. On a GPU its context, activations and captured graphs: a guess.
CPU_ROOM_BYTES = 2 * GIB
GPU_ROOM_BYTES = 3 * GIB


@dataclass(frozen=True)
class Room:
    """What was found.

    Attributes:
        fits: whether all servers have room.
        line: for people.
    """

    fits: bool
    line: str


def needed_bytes(checkpoint: Checkpoint, adapters: Iterable[Adapter], dtype: str, on_cpu: bool) -> int:
    """Return the memory that one server takes; on a GPU the least that will do, as vLLM takes what is left for more.

    Args:
        checkpoint: that is served.
        adapters: that lie beside an exported base.
        dtype: that is computed in.
        on_cpu: whether the CPU's memory is meant, and not a GPU's.
    """
    n_bytes = server_bytes(checkpoint, dtype) + sum(adapter.weight_bytes for adapter in adapters)
    if on_cpu:
        return n_bytes + CPU_ROOM_BYTES
    one_prompt = kv_cache_bytes(checkpoint, dtype) // 2
    return n_bytes - one_prompt + GPU_ROOM_BYTES


def room_for(checkpoints: Path, dtype: str = "auto") -> Room:
    """Compare what the servers of all tasks take with the memory of this machine, or with the free one of its GPU.

    Args:
        checkpoints: the folder that holds the three merged checkpoints.
        dtype: as `all` is going to be given it.

    Raises:
        CheckpointError: one is missing or not whole.
        OptionError: the dtype is not offered, or nothing tells how much memory the GPU has.
    """
    if dtype not in DTYPES:
        raise OptionError(f"dtype={dtype} is not offered; choose {', '.join(DTYPES)}")
    on_cpu = find_vllm()
    needed = 0
    for task in PORTS:
        checkpoint = read_checkpoint(checkpoints / f"jina-embeddings-v4-{task}", task)
        settings = Settings(task, checkpoint.folder, dtype=dtype, n_servers=len(PORTS))
        chosen = served_dtype(settings, checkpoint, on_cpu)
        needed += needed_bytes(checkpoint, (), chosen, on_cpu)
    if on_cpu:
        offered, of_what = cpu.memory_bytes(), "memory"
    else:
        free = gpu_memory_mib()
        if free is None:
            raise OptionError("there is no nvidia-smi to tell how much memory the GPU has")
        offered, of_what = int(USABLE * free[0] * 2**20), "usable memory on the GPU"
    fits = needed <= offered
    verdict = "fit" if fits else "do not fit"
    return Room(
        fits,
        f"{len(PORTS)} servers take {needed / GIB:.1f} GiB in {chosen}, of {offered / GIB:.1f} GiB of {of_what}: they"
        f" {verdict}",
    )
