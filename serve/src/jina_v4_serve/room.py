"""Whether a server a task has room on this machine, told from the checkpoints before anything is started."""

from dataclasses import dataclass
from pathlib import Path

from jina_v4_serve import cpu
from jina_v4_serve.checkpoint import read_checkpoint
from jina_v4_serve.errors import OptionError
from jina_v4_serve.fleet import USABLE, gpu_memory_mib
from jina_v4_serve.launcher import DTYPES, PORTS, Settings, find_vllm, kv_cache_bytes, served_dtype, server_bytes

GIB = 2**30
# Of each server beside its weights, keys and values: Python and libraries in two processes, activations of a step; on a
# GPU also the driver's context and captured graphs.
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
        needed += server_bytes(checkpoint, chosen) + (CPU_ROOM_BYTES if on_cpu else GPU_ROOM_BYTES)
        if not on_cpu:
            # Keys and values of one longest prompt will do: there vLLM takes what is left for more.
            needed -= kv_cache_bytes(checkpoint, chosen) // 2
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
