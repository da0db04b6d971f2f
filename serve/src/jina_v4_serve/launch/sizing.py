"""Computes memory: how much a server needs, whether several fit this machine, and in which dtype they compute."""

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
# What a server on a CPU needs besides weights, keys and values: Python and libraries in two processes (1.7 GiB with the
# tiny stand-in), and the activations of a step.
CPU_ROOM_BYTES = 2 * GIB
# The same on a GPU: the context of CUDA, captured graphs and the allocator's holes (a guess). The activations of a step
# are per token: up and gate projection (11,008 each), their product, and some of the hidden size, in 2 bytes; the
# vision tower has as many.
GPU_ROOM_BYTES = 2 * GIB
GPU_ROOM_BYTES_A_TOKEN = 128 * 2**10
USABLE = 0.9  # the share of a GPU's free memory that servers may use; the rest is a reserve
UNKNOWN_SHARE = 0.05  # for a GPU of unknown memory: vLLM only requires that this share is free at the start


@dataclass(frozen=True)
class Step:
    """The size of a scheduling step on a GPU.

    Attributes:
        tokens: the most tokens of a step.
        prompt_tokens: the most tokens of one prompt in a step, so that short prompts fit beside a long one.
    """

    tokens: int
    prompt_tokens: int

    @property
    def n_begun(self) -> int:
        """How many prompts can be partly computed after a step: each of them got `prompt_tokens` of it."""
        return math.ceil(self.tokens / self.prompt_tokens)


# The tokens of a step, by the least memory of a GPU. A new text waits for the running step, so a slower GPU gets
# shorter ones; GPUs with less memory are slower.
STEPS = ((70 * 10**9, 8192), (35 * 10**9, 4096), (0, 2048))


@dataclass(frozen=True)
class Fit:
    """Whether the servers of all tasks fit this machine.

    Attributes:
        fits: whether they do.
        line: the result as a sentence.
    """

    fits: bool
    line: str


def step_of(gpu: Gpu | None, options: Sequence[str] = ()) -> Step:
    """Return the size of a step on a GPU; an unknown GPU (None) counts as a small one."""
    total_bytes = (gpu.total_bytes if gpu else None) or 0
    by_size = next(tokens for least_bytes, tokens in STEPS if total_bytes >= least_bytes)
    tokens = count_of(options, "--max-num-batched-tokens") or by_size
    return Step(tokens, count_of(options, "--long-prefill-token-threshold") or max(tokens // 2, 1))


def kv_cache_bytes(checkpoint: Checkpoint, dtype: str, step: Step | None = None) -> int:
    """Return the memory that pooling needs for keys and values.

    A prompt's keys and values are kept for its one pass only, and the scheduler finishes prompts before it begins new
    ones of the same priority. So there must be room for the partly computed prompts, and for the new ones of a step. On
    a CPU (`step` is None) there is room for two of the longest prompts; others wait. A more urgent prompt may begin
    beside them: if the room does not suffice, vLLM drops the keys and values of another prompt and computes it again.
    """
    _, value_bytes = STORED_DTYPES[dtype]
    longest = checkpoint.max_model_len
    n_tokens = 2 * longest if step is None else step.n_begun * longest + step.tokens
    return n_tokens * checkpoint.kv_values * value_bytes


def held_bytes(checkpoint: Checkpoint, adapters: Iterable[Adapter], dtype: str, step: Step | None = None) -> int:
    """Return the memory for one server's weights, keys and values; `step` is a GPU's, None for a CPU."""
    _, stored_bytes = STORED_DTYPES[checkpoint.dtype]
    _, value_bytes = STORED_DTYPES[dtype]
    plain_bytes = (checkpoint.weight_bytes - checkpoint.quantized_bytes) * value_bytes // stored_bytes
    weight_bytes = plain_bytes + checkpoint.quantized_bytes
    return weight_bytes + sum(each.weight_bytes for each in adapters) + kv_cache_bytes(checkpoint, dtype, step)


def room_bytes(step: Step | None) -> int:
    """Return the memory that one server needs to work, besides `held_bytes`."""
    return CPU_ROOM_BYTES if step is None else GPU_ROOM_BYTES + GPU_ROOM_BYTES_A_TOKEN * step.tokens


def needed_bytes(checkpoint: Checkpoint, adapters: Iterable[Adapter], dtype: str, step: Step | None = None) -> int:
    """Return all the memory that one server needs: `held_bytes` and `room_bytes`."""
    return held_bytes(checkpoint, adapters, dtype, step) + room_bytes(step)


def offered_bytes(gpu: Gpu | None) -> int | None:
    """Return the memory of a GPU that servers may use; None if it is unknown."""
    if gpu is None:
        return None
    free_bytes = gpu.free_bytes if gpu.free_bytes is not None else gpu.total_bytes
    if free_bytes is None and gpu.shares_memory:
        free_bytes = cpu.memory_bytes()
    return None if free_bytes is None else int(USABLE * free_bytes)


def memory_share(gpu: Gpu | None, held: int, options: Sequence[str] = ()) -> float:
    """Return the share of a GPU's memory that must be free when a server starts.

    With a fixed size for keys and values vLLM does not profile the memory, and only checks this share. It is the least
    that the server will hold, so that one of several servers can restart while the others are busy.

    Args:
        gpu: None if it is unknown.
        held: the bytes that the server holds.
        options: the user's options for vLLM.

    Raises:
        OptionError: the server needs more memory than the GPU has.
    """
    if gpu is None or gpu.total_bytes is None or says_holding_less(options):
        return UNKNOWN_SHARE
    if held > gpu.total_bytes:
        raise OptionError(
            f"weights, keys and values need {held / GIB:.1f} GiB, {gpu.name} has {gpu.total_bytes / GIB:.1f} GiB:"
            " use a larger GPU (CUDA_VISIBLE_DEVICES), fold with --quantize int8, or add -- --tensor-parallel-size for"
            " several GPUs"
        )
    return math.ceil(1000 * held / gpu.total_bytes) / 1000


def served_dtype(dtype: str, n_servers: int, checkpoint: Checkpoint, on_cpu: bool) -> str:
    """Return the dtype to compute in, for a --dtype and the number of servers that share this machine."""
    if dtype != "auto":
        return dtype
    n_bytes = n_servers * held_bytes(checkpoint, (), "float32")
    return "float32" if on_cpu and cpu.float32_is_faster(n_bytes) else checkpoint.dtype


def fit(checkpoints: Path, dtype: str = "auto") -> Fit:
    """Compare the memory that the servers of all tasks need with that of this machine, or with what its GPU has free.

    Raises:
        CheckpointError: a checkpoint is missing or incomplete.
    """
    on_cpu = find_vllm()
    gpu = None if on_cpu else known_gpu()
    step = None if on_cpu else step_of(gpu)
    needed = 0
    for task in TASKS:
        checkpoint = read_checkpoint(checkpoints / model_name(task), task)
        chosen = served_dtype(dtype, len(TASKS), checkpoint, on_cpu)
        needed += needed_bytes(checkpoint, (), chosen, step)
    need = f"{len(TASKS)} servers need {needed / GIB:.1f} GiB in {chosen}"
    offered = cpu.memory_bytes() if on_cpu else offered_bytes(gpu)
    if offered is None:
        return Fit(False, f"{need}, and the memory of the GPU is unknown: they may not fit")
    kind = "memory" if on_cpu else "usable memory on the GPU"
    fits = needed <= offered
    return Fit(fits, f"{need}, of {offered / GIB:.1f} GiB of {kind}: they {'fit' if fits else 'do not fit'}")
