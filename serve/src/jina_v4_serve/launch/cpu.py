"""What vLLM's CPU build is told by default, so that it uses the whole of a small machine.

Left alone, vLLM binds its arithmetic to all cores but one and keeps that one for a process that waits for the other by
spinning: on two cores half of the machine computes. Here the engine computes in its own process, on all cores, and
nobody spins. Memory that is freed is kept for the next step, and so are a few compiled products. benchmarks/LOG.md has
what each of these is worth.
"""

import os
import platform
import sys
from ctypes.util import find_library
from pathlib import Path

# On larger machines one core in reserve costs little, and vLLM's binding minds the memory of each socket.
MAX_CORES = 8
MAX_TOKENS_A_STEP = 2048
# oneDNN compiles a matrix product for each number of rows that it meets, 0.3 MiB each, and would keep 1,024 of them.
MATRIX_PRODUCTS_KEPT = 128
_USABLE = 0.7  # of the memory, for weights, keys and values of all servers; the rest is for all else
_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
_MEMORY_MAX = Path("/sys/fs/cgroup/memory.max")
_CPU_INFO = Path("/proc/cpuinfo")
_VNNI = {"avx512_vnni", "avx_vnni", "amx_int8"}


def n_cores() -> int:
    """Return the cores that this process may use, those of its container where that is less."""
    allowed = len(os.sched_getaffinity(0))
    quota, _, period = read_text(_CPU_MAX).partition(" ")
    return min(allowed, max(1, int(quota) // int(period))) if quota.isdecimal() else allowed


def memory_bytes() -> int:
    """Return the memory of the machine, that of the container where that is less."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = read_text(_MEMORY_MAX).strip()
    return min(whole, int(limit)) if limit.isdecimal() else whole


def threads(n_servers: int) -> dict[str, str]:
    """Return the variables by which the servers of this machine share its cores.

    There are none where the operator has set one, or vLLM knows better.
    """
    if "VLLM_CPU_OMP_THREADS_BIND" in os.environ or "OMP_NUM_THREADS" in os.environ:
        return {}
    if n_cores() > MAX_CORES:
        return {} if n_servers == 1 else _unbound(n_cores() // n_servers)
    # Each server has all cores: often one of several is asked. Threads that wait must leave them to the others then.
    patience = {} if n_servers == 1 else {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")}
    return {**_unbound(n_cores()), **patience}


def allocator() -> dict[str, str]:
    """Return the variables by which the engine's processes keep memory; of those the operator has set, the operator's.

    A tensor of a step is some megabytes. glibc gives such blocks back to the system at once, and the next operation
    waits for new ones to be cleared, page by page. tcmalloc, where it is installed, keeps them in better order.
    """
    defaults = {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(MATRIX_PRODUCTS_KEPT),
    }
    preloaded = os.environ.get("LD_PRELOAD", "")
    found = None if "malloc" in preloaded else tcmalloc()
    preload = {"LD_PRELOAD": f"{found}:{preloaded}".rstrip(":")} if found else {}
    return {**{name: os.environ.get(name, value) for name, value in defaults.items()}, **preload}


def tcmalloc() -> str | None:
    """Return where the loader finds tcmalloc: what `make install` fetched, or the system's; else None."""
    fetched = Path(sys.prefix, "lib/tcmalloc/libtcmalloc_minimal.so.4")
    if fetched.exists() and not set(str(fetched)) & {" ", ":"}:  # LD_PRELOAD takes them for the end of a path
        return str(fetched)
    return find_library("tcmalloc_minimal") or find_library("tcmalloc")


def float32_is_faster(n_bytes: int) -> bool:
    """Tell whether to compute in float32: the processor has no fast bfloat16, and the memory has room for it.

    It depends on the machine alone, never on what else is running: a server that starts anew computes in the same.

    Args:
        n_bytes: of weights, keys and values of all servers on this machine, in float32.
    """
    slow_in_bfloat16 = platform.machine() == "x86_64" and not fast_in_bfloat16(read_text(_CPU_INFO))
    return slow_in_bfloat16 and n_bytes <= _USABLE * memory_bytes()


def fast_in_bfloat16(cpu_info: str) -> bool:
    """Tell whether an x86 processor multiplies matrices faster in bfloat16 than in float32.

    AMX is made for it. AVX-512's own instruction is worth 2.3 times float32's rate on AMD's cores; on Intel's, where
    there are two units for float32, half as much was measured. `cpu_info` is what /proc/cpuinfo says.
    """
    words = set(cpu_info.split())
    return "amx_bf16" in words or {"avx512_bf16", "AuthenticAMD"} <= words


def int8_is_exact() -> bool:
    """Tell whether oneDNN multiplies int8 without an error on this processor.

    An x86 processor needs VNNI for it. On others pairs of products are added up in 16 bits, and what does not fit is
    cut off: vectors were 3e-3 to 8e-3 off (1 - cosine, 2 layers) where int8 itself costs 1e-4.
    """
    return platform.machine() != "x86_64" or bool(_VNNI & set(read_text(_CPU_INFO).split()))


def has_amx() -> bool:
    """Tell whether the processor has AMX; vLLM's kernels of int8 for it take bfloat16 and float16, and no float32."""
    return "amx_tile" in read_text(_CPU_INFO).split()


def _unbound(n_threads: int) -> dict[str, str]:
    return {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(n_threads)}


def read_text(path: Path) -> str:
    """Read a file of the kernel; empty where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""
