"""Settings for vLLM's CPU build that use all of a small machine.

By default vLLM leaves one core to a process that waits by spinning: with two cores, only half of the machine computes.
Here the engine computes in its own process, on all cores, and no process spins. Freed memory and a few compiled matrix
products are kept for the next step. benchmarks/LOG.md has what each setting is worth.
"""

import os
import platform
import sys
from collections.abc import Iterator
from ctypes.util import find_library
from pathlib import Path

# On larger machines one idle core costs little, and vLLM's binding keeps the memory of each socket local.
MAX_CORES = 8
MAX_TOKENS_A_STEP = 2048
# oneDNN compiles a matrix product for each number of rows, of 0.3 MiB each, and would keep 1,024 of them.
MATRIX_PRODUCTS_KEPT = 128
_USABLE = 0.7  # the share of the memory for weights, keys and values of all servers
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_CPU_INFO = Path("/proc/cpuinfo")
_VNNI = {"avx512_vnni", "avx_vnni", "amx_int8"}


def n_cores() -> int:
    """Return how many cores this process may use, within the limits of its container, service or job."""
    allowed = len(os.sched_getaffinity(0))
    for folder in _own_cgroups("cpu"):
        limit = read_text(folder / "cpu.max").split() or [
            read_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
        ]
        if len(limit) == 2 and all(part.isdecimal() for part in limit):
            allowed = min(allowed, max(1, int(limit[0]) // int(limit[1])))
    return allowed


def memory_bytes() -> int:
    """Return the memory of the machine, or the limit of the container, service or job if that is less."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder in _own_cgroups("memory"):
        limit = (read_text(folder / "memory.max") or read_text(folder / "memory.limit_in_bytes")).strip()
        whole = min(whole, int(limit)) if limit.isdecimal() else whole
    return whole


def _own_cgroups(controller: str) -> Iterator[Path]:
    """Yield the folders with the limits of a controller: of this process's cgroup and of those above, v2 and v1."""
    # In a container the root is its own cgroup. The path may be the machine's, where nothing is then.
    for line in filter(None, read_text(_OWN_CGROUPS).splitlines() or ["0::/"]):
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            root = _CGROUPS / controller if controllers else _CGROUPS
            own = root / path.lstrip("/")
            yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(root))


def threads(n_servers: int) -> dict[str, str]:
    """Return the variables by which the servers of this machine share its cores.

    There are none if the operator has set one, or if vLLM's own binding is better.
    """
    if os.environ.get("VLLM_CPU_OMP_THREADS_BIND") or os.environ.get("OMP_NUM_THREADS"):
        return {}
    if n_cores() > MAX_CORES:
        # vLLM binds threads to all cores that it sees, also beyond the limit of its container.
        is_limited = n_cores() < len(os.sched_getaffinity(0))
        return _unbound(n_cores() // n_servers) if is_limited or n_servers > 1 else {}
    # Each server may use all cores, as often only one of them has work. Waiting threads must not block the others then.
    wait_policy = {} if n_servers == 1 else {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY") or "passive"}
    return {**_unbound(n_cores()), **wait_policy}


def allocator() -> dict[str, str]:
    """Return the variables that make the engine's processes keep freed memory. Values that the operator has set win.

    A tensor of a step has some megabytes. glibc returns such blocks to the system at once, and the next operation waits
    until the system has cleared new pages. tcmalloc is better at this, where it is installed.
    """
    defaults = {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(MATRIX_PRODUCTS_KEPT),
    }
    preloaded = os.environ.get("LD_PRELOAD", "")
    library = None if "malloc" in preloaded else tcmalloc()
    preload = {"LD_PRELOAD": f"{library}:{preloaded}".rstrip(":")} if library else {}
    return {**{name: os.environ.get(name) or value for name, value in defaults.items()}, **preload}


def tcmalloc() -> str | None:
    """Return the path or name of tcmalloc, from `make install` or the system; None if there is none."""
    installed = Path(sys.prefix, "lib/tcmalloc/libtcmalloc_minimal.so.4")
    if installed.exists() and not set(str(installed)) & {" ", ":"}:  # either ends a path in LD_PRELOAD
        return str(installed)
    return find_library("tcmalloc_minimal") or find_library("tcmalloc")


def float32_is_faster(n_bytes: int) -> bool:
    """Tell whether to compute in float32: the processor has no fast bfloat16, and the memory is large enough.

    The result depends on the machine only, not on other programs, so that a restarted server uses the same dtype.

    Args:
        n_bytes: the size of weights, keys and values of all servers on this machine in float32.
    """
    slow_in_bfloat16 = platform.machine() == "x86_64" and not fast_in_bfloat16(read_text(_CPU_INFO))
    return slow_in_bfloat16 and n_bytes <= _USABLE * memory_bytes()


def fast_in_bfloat16(cpu_info: str) -> bool:
    """Tell whether an x86 processor multiplies matrices faster in bfloat16 than in float32.

    AMX is made for it. The instruction of AVX-512 has 2.3 times the rate of float32 on AMD's cores. On Intel's, which
    have two units for float32, half of that was measured. `cpu_info` is the text of /proc/cpuinfo.
    """
    flags = set(cpu_info.split())
    return "amx_bf16" in flags or {"avx512_bf16", "AuthenticAMD"} <= flags


def int8_is_exact() -> bool:
    """Tell whether oneDNN multiplies int8 exactly on this processor.

    An x86 processor needs VNNI for it. Without it, sums of two products saturate at 16 bits: vectors were 3e-3 to 8e-3
    off (1 - cosine, 2 layers), while int8 itself costs 1e-4.
    """
    return platform.machine() != "x86_64" or bool(_VNNI & set(read_text(_CPU_INFO).split()))


def has_amx() -> bool:
    """Tell whether the processor has AMX. vLLM's int8 kernels for it support bfloat16 and float16, but not float32."""
    return "amx_tile" in read_text(_CPU_INFO).split()


def _unbound(n_threads: int) -> dict[str, str]:
    return {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(n_threads)}


def read_text(path: Path) -> str:
    """Read a file of the kernel; return "" if it does not exist."""
    try:
        return path.read_text()
    except OSError:
        return ""
