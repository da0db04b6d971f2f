"""All sums of memory: what a server takes, whether several fit this machine, and in which dtype they compute."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jina_v4_serve.checkpoint import STORED_DTYPES, Checkpoint, read_checkpoint
from jina_v4_serve.errors import OptionError
from jina_v4_serve.exported import Adapter
from jina_v4_serve.facts import TASKS, model_name
from jina_v4_serve.launch import cpu
from jina_v4_serve.launch.gpu import Gpu, known_gpu
from jina_v4_serve.launch.options import count_of, says_holding_less
from jina_v4_serve.vllm_side.versions import find_vllm

GIB = 2**30
# Of each server beside its weights, keys and values: Python and libraries in two processes (1.7 GiB with the tiny
# stand-in), activations of a step.
CPU_ROOM_BYTES = 2 * GIB
# On a GPU: the context of CUDA, captured graphs and the allocator's holes (a guess), and activations of a step: up and
# gate projection (11,008 each), their product, and some of the hidden size, in 2 bytes; the vision tower has as many.
GPU_ROOM_BYTES = 2 * GIB
GPU_ROOM_BYTES_A_TOKEN = 128 * 2**10
USABLE = 0.9  # of the GPU's free memory; the rest is for what these sums leave out
UNKNOWN_SHARE = 0.05  # of a GPU whose memory nothing tells: vLLM only asks that so much is free at the start


@dataclass(frozen=True)
class Step:
    """What a GPU computes at one time.

    Attributes:
        tokens: of a scheduling step.
        prompt_tokens: of one prompt among others in a step: a long one leaves the rest to those that came after it.
    """

    tokens: int
    prompt_tokens: int

    @property
    def n_begun(self) -> int:
        """How many prompts can be half-way between two steps: each that is has had its whole part of the last one."""
        return math.ceil(self.tokens / self.prompt_tokens)


# A step is about as long on a small GPU as on a large one: a text that comes waits for it. Memory stands for speed.
STEPS = ((70 * 10**9, 8192), (35 * 10**9, 4096), (0, 2048))


@dataclass(frozen=True)
class Fit:
    """Whether the servers of all tasks fit this machine.

    Attributes:
        fits: whether they do.
        line: for people.
    """

    fits: bool
    line: str


def step_of(gpu: Gpu | None, options: Sequence[str] = ()) -> Step:
    """Return what a GPU computes at one time; one that nothing tells about (None) is taken for a small one."""
    total_bytes = (gpu.total_bytes if gpu else None) or 0
    by_size = next(tokens for least_bytes, tokens in STEPS if total_bytes >= least_bytes)
    tokens = count_of(options, "--max-num-batched-tokens") or by_size
    return Step(tokens, count_of(options, "--long-prefill-token-threshold") or max(tokens // 2, 1))


def kv_cache_bytes(checkpoint: Checkpoint, dtype: str, step: Step | None = None) -> int:
    """Return the memory that pooling needs for keys and values.

    A prompt's are kept for its one pass only, and the scheduler goes on with what it has begun before it begins
    anything new of the same priority. So there are those of the prompts that are half-way, and of what a step begins.
    On a CPU, where `step` is None, two prompts are half-way at most, and others wait while both are longest. A more
    urgent prompt may begin beside them; where it lacks room on its way, vLLM drops one of theirs and begins it anew.
    """
    _, value_bytes = STORED_DTYPES[dtype]
    longest = checkpoint.max_model_len
    n_tokens = 2 * longest if step is None else step.n_begun * longest + step.tokens
    return n_tokens * checkpoint.kv_values * value_bytes


def held_bytes(checkpoint: Checkpoint, adapters: Iterable[Adapter], dtype: str, step: Step | None = None) -> int:
    """Return the memory that one server's weights, keys and values take; `step` is a GPU's, None for a CPU."""
    _, stored_bytes = STORED_DTYPES[checkpoint.dtype]
    _, value_bytes = STORED_DTYPES[dtype]
    plain_bytes = (checkpoint.weight_bytes - checkpoint.quantized_bytes) * value_bytes // stored_bytes
    weight_bytes = plain_bytes + checkpoint.quantized_bytes
    return weight_bytes + sum(each.weight_bytes for each in adapters) + kv_cache_bytes(checkpoint, dtype, step)


def room_bytes(step: Step | None) -> int:
    """Return the memory that one server needs beside what it holds, to work."""
    return CPU_ROOM_BYTES if step is None else GPU_ROOM_BYTES + GPU_ROOM_BYTES_A_TOKEN * step.tokens


def needed_bytes(checkpoint: Checkpoint, adapters: Iterable[Adapter], dtype: str, step: Step | None = None) -> int:
    """Return all the memory that one server takes: what it holds, and room to work; arguments as of `held_bytes`."""
    return held_bytes(checkpoint, adapters, dtype, step) + room_bytes(step)


def offered_bytes(gpu: Gpu | None) -> int | None:
    """Return the memory of a GPU that servers may take; None where nothing tells."""
    if gpu is None:
        return None
    free_bytes = gpu.free_bytes if gpu.free_bytes is not None else gpu.total_bytes
    if free_bytes is None and gpu.shares_memory:
        free_bytes = cpu.memory_bytes()
    return None if free_bytes is None else int(USABLE * free_bytes)


def memory_share(gpu: Gpu | None, held: int, options: Sequence[str] = ()) -> float:
    """Return the share of a GPU's memory that must be free when a server starts.

    vLLM profiles no memory where the bytes of keys and values are given, and takes no more than they say: the share is
    a check alone. It is what the server surely holds, so that one of several can start again beside busy ones.

    Args:
        gpu: None where nothing tells.
        held: what the server holds, in bytes.
        options: of vLLM, the user's.

    Raises:
        OptionError: that is more than the GPU has.
    """
    if gpu is None or gpu.total_bytes is None or says_holding_less(options):
        return UNKNOWN_SHARE
    if held > gpu.total_bytes:
        raise OptionError(
            f"weights, keys and values take {held / GIB:.1f} GiB, {gpu.name} has {gpu.total_bytes / GIB:.1f} GiB:"
            " take a larger one, or fold with --quantize int8, or -- --tensor-parallel-size over several"
        )
    return math.ceil(1000 * held / gpu.total_bytes) / 1000


def served_dtype(dtype: str, n_servers: int, checkpoint: Checkpoint, on_cpu: bool) -> str:
    """Return the dtype that is computed in, for --dtype and the number of servers that share this machine."""
    if dtype != "auto":
        return dtype
    n_bytes = n_servers * held_bytes(checkpoint, (), "float32")
    return "float32" if on_cpu and cpu.float32_is_faster(n_bytes) else checkpoint.dtype


def fit(checkpoints: Path, dtype: str = "auto") -> Fit:
    """Compare what the servers of all tasks take with the memory of this machine, or with the free one of its GPU.

    Raises:
        CheckpointError: one is missing or not whole.
    """
    on_cpu = find_vllm()
    gpu = None if on_cpu else known_gpu()
    step = None if on_cpu else step_of(gpu)
    needed = 0
    for task in TASKS:
        checkpoint = read_checkpoint(checkpoints / model_name(task), task)
        chosen = served_dtype(dtype, len(TASKS), checkpoint, on_cpu)
        needed += needed_bytes(checkpoint, (), chosen, step)
    sum_of = f"{len(TASKS)} servers take {needed / GIB:.1f} GiB in {chosen}"
    offered = cpu.memory_bytes() if on_cpu else offered_bytes(gpu)
    if offered is None:
        return Fit(False, f"{sum_of}, and nothing tells how much memory the GPU has: they may not fit")
    of_what = "memory" if on_cpu else "usable memory on the GPU"
    fits = needed <= offered
    return Fit(fits, f"{sum_of}, of {offered / GIB:.1f} GiB of {of_what}: they {'fit' if fits else 'do not fit'}")
