"""Checks GPUs, memory, cores, and the limits of a process."""

import os
import platform
import resource
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from jina_v4_serve.doctor.finding import GIB, Finding, gib
from jina_v4_serve.errors import OptionError
from jina_v4_serve.launch import cpu
from jina_v4_serve.launch.checks import temporary_folder
from jina_v4_serve.launch.driver import ADVICE, driver_failure
from jina_v4_serve.launch.gpu import Gpu

MIN_FILES = 4096  # each connection is one, and a server has 80 of its own
MIN_SHARED_BYTES = GIB  # for a server on several GPUs; other servers need none
MIN_CACHE_BYTES = 2 * GIB  # of compiled kernels
OLDEST_BFLOAT16 = 8.0  # compute capability
_CPU_INFO = Path("/proc/cpuinfo")
_MEMORY_INFO = Path("/proc/meminfo")
_SHARED = Path("/dev/shm")  # noqa: S108 - only checked


def check_machine(gpus: Sequence[Gpu], gpu_failure: str = "") -> Iterator[Finding]:
    """Check the machine; `gpu_failure` is the reason why the driver shows no GPU."""
    if gpu_failure:
        advice = "the driver must answer before a server can; see `nvidia-smi`, `dmesg`"
        yield Finding("FAIL", "GPU", gpu_failure, advice)
    else:
        yield from check_gpus(gpus)
    yield check_memory()
    yield check_cores()
    yield check_processor(on_cpu=not gpus and not gpu_failure)
    if not gpus and not gpu_failure:
        yield check_allocator()
    yield check_shared_memory(len(gpus))
    yield check_open_files()
    try:
        yield check_room("temporary files", temporary_folder(), GIB // 4)
    except OptionError as error:
        yield Finding("FAIL", "temporary files", str(error), "a server and its processes need one")
    yield check_room("kernel cache", _cache_folder(), MIN_CACHE_BYTES)
    yield check_clock(time.time())


def check_gpus(gpus: Sequence[Gpu]) -> Iterator[Finding]:
    """Report the GPUs and their limits."""
    if not gpus:
        yield Finding("ok", "GPU", "none: servers compute on the CPU")
    for number, gpu in enumerate(gpus):
        found = f"{gpu.name}, driver {gpu.driver}, {_memory(gpu)}"
        subject = f"GPU {number}"
        if failure := driver_failure(gpu):
            yield Finding("FAIL", subject, f"{found}: {failure}", ADVICE)
        elif gpu.mig:
            advice = "choose an instance of `nvidia-smi -L` per server: CUDA_VISIBLE_DEVICES=MIG-..."
            chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("MIG-")
            yield Finding("ok" if chosen else "warn", subject, f"{found}; MIG is on", "" if chosen else advice)
        elif (gpu.compute_capability or OLDEST_BFLOAT16) < OLDEST_BFLOAT16:
            advice = "use --dtype float16 or float32"
            yield Finding("warn", subject, f"{found}; no bfloat16 (capability {gpu.compute_capability})", advice)
        elif gpu.free_bytes is not None and gpu.total_bytes is not None and gpu.free_bytes < gpu.total_bytes // 2:
            yield Finding("warn", subject, found, "`nvidia-smi` shows which programs use the rest")
        else:
            yield Finding("ok", subject, found)


def _memory(gpu: Gpu) -> str:
    if gpu.shares_memory:
        return "uses the machine's memory"
    if gpu.total_bytes is None:
        return "memory unknown"
    free = "" if gpu.free_bytes is None else f"{gib(gpu.free_bytes)} free of "
    return f"{free}{gib(gpu.total_bytes)}"


def available_bytes() -> int:
    """Return the memory that is available for new programs."""
    for line in cpu.read_text(_MEMORY_INFO).splitlines():
        if line.startswith("MemAvailable:"):
            return min(int(line.split()[1]) * 1024, cpu.memory_bytes())
    return cpu.memory_bytes()


def check_memory() -> Finding:
    """Report the memory; `checkpoints` checks whether it suffices."""
    whole, available = cpu.memory_bytes(), available_bytes()
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = f" (the container's limit; the machine has {gib(machine)})" if whole < machine else ""
    found = f"{gib(whole)}{limit}, {gib(available)} of it available"
    if available < whole / 4:
        return Finding("warn", "memory", found, "other programs use most of it: see `top`")
    return Finding("ok", "memory", found)


def check_cores() -> Finding:
    """Report the cores."""
    n_cores, n_allowed = cpu.n_cores(), len(os.sched_getaffinity(0))
    found = f"{n_cores}" + (f" by the container's limit, of {n_allowed}" if n_cores < n_allowed else "")
    if n_cores < 2:
        return Finding(
            "warn", "cores", found, "use two or more: the engine and the HTTP server compute at the same time"
        )
    return Finding("ok", "cores", found)


def check_processor(*, on_cpu: bool) -> Finding:
    """Report the processor's instructions for matrix products; `on_cpu` says whether it computes the vectors."""
    if platform.machine() != "x86_64":
        return Finding("ok", "processor", platform.machine())
    cpu_info = cpu.read_text(_CPU_INFO)
    flags = set(cpu_info.split())
    if "avx512f" in flags:
        units = "AVX-512 and AMX" if "amx_bf16" in flags else "AVX-512"
        faster = "bfloat16" if cpu.fast_in_bfloat16(cpu_info) else "float32"
        return Finding("ok", "processor", f"x86 with {units}: faster in {faster}")
    if on_cpu:
        return Finding("warn", "processor", "x86 without AVX-512", "expect it to be slow")
    return Finding("ok", "processor", "x86 without AVX-512; the GPU computes")


def check_allocator() -> Finding:
    """Report the allocator of the engine's tensors."""
    preloaded = cpu.allocator().get("LD_PRELOAD") or os.environ.get("LD_PRELOAD", "")
    if "malloc" in preloaded:
        return Finding("ok", "allocator", next(path for path in preloaded.split(":") if "malloc" in path))
    return Finding("ok", "allocator", "glibc's; memory is steadier with tcmalloc (Debian's libtcmalloc-minimal4)")


def check_shared_memory(n_gpus: int) -> Finding:
    """Check that processes can share memory."""
    try:
        room = shutil.disk_usage(_SHARED)
    except OSError as error:
        return Finding("FAIL", "shared memory", str(error), "mount a tmpfs on /dev/shm; vLLM needs it for semaphores")
    found = f"{gib(room.free)} of {gib(room.total)} free"
    if not os.access(_SHARED, os.W_OK):
        return Finding("FAIL", "shared memory", f"{found}; not writable", "allow this user to write to it")
    if n_gpus > 1 and room.free < MIN_SHARED_BYTES:
        advice = "start the container with --shm-size=1g for a server on several GPUs; other servers need none"
        return Finding("warn", "shared memory", found, advice)
    return Finding("ok", "shared memory", found)


def check_open_files() -> Finding:
    """Check that the limit of open files allows many connections. Servers and gateway use all of the hard limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < MIN_FILES:
        advice = "raise the hard limit (systemd: LimitNOFILE=65536)"
        return Finding("warn", "open files", f"{hard} at most: each connection is one", advice)
    return Finding("ok", "open files", f"{hard} at most")


def check_room(subject: str, folder: Path, min_free_bytes: int) -> Finding:
    """Check that a folder, or its nearest parent that exists, is writable and has free space."""
    # Path.exists() raises an error below a folder that this user may not look into.
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))  # noqa: PTH110 - see above
    free = shutil.disk_usage(existing).free
    found = f"{folder}, {gib(free)} free"
    if not os.access(existing, os.W_OK | os.X_OK):
        return Finding("FAIL", subject, f"{folder}: not writable", "set TMPDIR or VLLM_CACHE_ROOT to another folder")
    if free < min_free_bytes:
        return Finding("warn", subject, found, f"free some space: {gib(min_free_bytes)} at least")
    return Finding("ok", subject, found)


def _cache_folder() -> Path:
    """Return the folder of vLLM's compiled kernels."""
    root = os.environ.get("VLLM_CACHE_ROOT") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/vllm"
    return Path(os.path.expanduser(root))  # noqa: PTH111 - like vLLM: a user without a home is no error


def check_clock(now_s: float) -> Finding:
    """Check that the clock (seconds since 1970) is not before our installation, which breaks certificates and logs."""
    found = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now_s))
    if now_s + 86400 < Path(__file__).stat().st_mtime:
        return Finding("warn", "clock", f"{found}, before this program was installed", "set it (timedatectl, NTP)")
    return Finding("ok", "clock", found)
