"""GPUs, memory, cores, and what the system allows a process."""

import os
import platform
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jina_v4_serve import cpu
from jina_v4_serve.doctor.finding import GIB, Finding, gib, read_text

MIN_FILES = 4096  # a connection is a file; so are a server's own 80
MIN_SHARED_BYTES = GIB  # where several GPUs serve one model; one device needs none
MIN_CACHE_BYTES = 2 * GIB  # of compiled kernels
OLDEST_BFLOAT16 = 8.0  # compute capability
_CPU_INFO = Path("/proc/cpuinfo")
_MEMORY_INFO = Path("/proc/meminfo")
_SHARED = Path("/dev/shm")  # noqa: S108 - looked at only
_QUERY = ("name", "driver_version", "memory.total", "memory.free", "compute_cap", "mig.mode.current")


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi describes it."""

    name: str
    driver: str
    total_bytes: int
    free_bytes: int
    compute_capability: float
    mig: bool


def read_gpus() -> list[Gpu] | str:
    """Ask nvidia-smi; return the GPUs, none where there is no such program, or in words why it does not tell."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi fails: {error}"
    if done.returncode != 0:
        return f"nvidia-smi fails: {(done.stdout + done.stderr).strip().splitlines()[-1:] or done.returncode}"
    try:
        return [_gpu(line.split(", ")) for line in done.stdout.strip().splitlines()]
    except ValueError as error:
        return f"nvidia-smi answers something else: {error}"


def _gpu(cells: Sequence[str]) -> Gpu:
    name, driver, total_mib, free_mib, capability, mig = (cell.strip() for cell in cells)
    return Gpu(name, driver, int(total_mib) * 2**20, int(free_mib) * 2**20, float(capability), mig.lower() == "enabled")


def check_machine(gpus: list[Gpu] | str) -> Iterator[Finding]:
    """Look at the machine.

    Args:
        gpus: as `read_gpus` tells.
    """
    yield from check_gpus(gpus)
    yield check_memory()
    yield check_cores()
    yield check_processor(on_cpu=not gpus)
    if not gpus:
        yield check_allocator()
    yield check_shared_memory(0 if isinstance(gpus, str) else len(gpus))
    yield check_open_files()
    yield check_room("temporary files", Path(tempfile.gettempdir()), GIB // 4)
    yield check_room("kernel cache", _cache_folder(), MIN_CACHE_BYTES)
    yield check_clock(time.time())


def check_gpus(gpus: list[Gpu] | str) -> Iterator[Finding]:
    """Say what GPUs there are, and what stands in their way."""
    if isinstance(gpus, str):
        yield Finding("FAIL", "GPU", gpus, "the driver must answer before a server can; see `nvidia-smi`, `dmesg`")
        return
    if not gpus:
        yield Finding("ok", "GPU", "none: servers compute on the CPU")
    for number, gpu in enumerate(gpus):
        found = f"{gpu.name}, driver {gpu.driver}, {gib(gpu.free_bytes)} of {gib(gpu.total_bytes)} free"
        subject = f"GPU {number}"
        if gpu.mig:
            advice = "name an instance of `nvidia-smi -L`: CUDA_VISIBLE_DEVICES=MIG-..., one a server"
            named = os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("MIG-")
            yield Finding("ok" if named else "warn", subject, f"{found}; MIG is on", "" if named else advice)
        elif gpu.compute_capability < OLDEST_BFLOAT16:
            advice = "give --dtype float16 or float32"
            yield Finding("warn", subject, f"{found}; no bfloat16 (capability {gpu.compute_capability})", advice)
        elif gpu.free_bytes < gpu.total_bytes // 2:
            advice = "see with `nvidia-smi` who has the rest, or give a share with -- --gpu-memory-utilization="
            yield Finding("warn", subject, found, advice)
        else:
            yield Finding("ok", subject, found)


def available_bytes() -> int:
    """Return the memory that new programs could have now."""
    for line in read_text(_MEMORY_INFO).splitlines():
        if line.startswith("MemAvailable:"):
            return min(int(line.split()[1]) * 1024, cpu.memory_bytes())
    return cpu.memory_bytes()


def check_memory() -> Finding:
    """Say how much memory there is; whether it is enough is for the checkpoints to say."""
    whole, available = cpu.memory_bytes(), available_bytes()
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = f" (the container's limit; the machine has {gib(machine)})" if whole < machine else ""
    found = f"{gib(whole)}{limit}, {gib(available)} of it available"
    if available < whole / 4:
        return Finding("warn", "memory", found, "other programs have most of it: see `top`")
    return Finding("ok", "memory", found)


def check_cores() -> Finding:
    """Say how many cores there are, and who else decides about threads."""
    n_cores, n_allowed = cpu.n_cores(), len(os.sched_getaffinity(0))
    found = f"{n_cores}" + (f" by the container's limit, of {n_allowed}" if n_cores < n_allowed else "")
    if n_cores < 2:
        return Finding("warn", "cores", found, "two at least: the engine and the HTTP server compute at one time")
    return Finding("ok", "cores", found)


def check_processor(*, on_cpu: bool) -> Finding:
    """Say which instructions for matrix products the processor has.

    Args:
        on_cpu: whether it is what computes.
    """
    if platform.machine() != "x86_64":
        return Finding("ok", "processor", platform.machine())
    cpu_info = read_text(_CPU_INFO)
    flags = set(cpu_info.split())
    if "avx512f" in flags:
        units = "AVX-512 and AMX" if "amx_bf16" in flags else "AVX-512"
        faster = "bfloat16" if cpu.fast_in_bfloat16(cpu_info) else "float32"
        return Finding("ok", "processor", f"x86 with {units}: faster in {faster}")
    if on_cpu:
        return Finding("warn", "processor", "x86 without AVX-512", "expect it to be slow")
    return Finding("ok", "processor", "x86 without AVX-512; the GPU computes")


def check_allocator() -> Finding:
    """Say whose memory the engine's tensors will lie in."""
    preloaded = cpu.allocator().get("LD_PRELOAD") or os.environ.get("LD_PRELOAD", "")
    if "malloc" in preloaded:
        return Finding("ok", "allocator", next(path for path in preloaded.split(":") if "malloc" in path))
    return Finding("ok", "allocator", "glibc's; memory is steadier with tcmalloc (Debian's libtcmalloc-minimal4)")


def check_shared_memory(n_gpus: int) -> Finding:
    """See whether processes can share memory.

    Args:
        n_gpus: that the driver shows.
    """
    try:
        room = shutil.disk_usage(_SHARED)
    except OSError as error:
        return Finding("FAIL", "shared memory", str(error), "mount a tmpfs on /dev/shm; semaphores of vLLM lie in it")
    found = f"{gib(room.free)} of {gib(room.total)} free"
    if not os.access(_SHARED, os.W_OK):
        return Finding("FAIL", "shared memory", f"{found}; nothing can be written", "allow this user to write there")
    if n_gpus > 1 and room.free < MIN_SHARED_BYTES:
        advice = "for one server on several GPUs give the container --shm-size=1g; one GPU a server needs none"
        return Finding("warn", "shared memory", found, advice)
    return Finding("ok", "shared memory", found)


def check_open_files() -> Finding:
    """Compare the limit of open files with what many connections need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MIN_FILES:
        advice = f"ulimit -n {MIN_FILES}" if hard >= MIN_FILES else "raise the hard limit (systemd: LimitNOFILE=65536)"
        return Finding("warn", "open files", f"{soft} at most: each connection is one", advice)
    return Finding("ok", "open files", f"{soft} at most")


def check_room(subject: str, folder: Path, min_free_bytes: int) -> Finding:
    """See whether a folder, or the one that it will be made in, can be written to and has room.

    Args:
        subject: what lies there.
        folder: need not be there yet.
        min_free_bytes: below which to warn.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    found = f"{folder}, {gib(free)} free"
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding("FAIL", subject, f"{folder}: nothing can be written", "name another in TMPDIR, VLLM_CACHE_ROOT")
    if free < min_free_bytes:
        return Finding("warn", subject, found, f"make room: {gib(min_free_bytes)} at least")
    return Finding("ok", subject, found)


def _cache_folder() -> Path:
    """Return where vLLM keeps what it compiles."""
    if root := os.environ.get("VLLM_CACHE_ROOT"):
        return Path(root).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vllm"


def check_clock(now_s: float) -> Finding:
    """See whether the clock is behind what was installed: certificates and logs would be wrong.

    Args:
        now_s: since 1970.
    """
    found = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now_s))
    if now_s + 86400 < Path(__file__).stat().st_mtime:
        return Finding("warn", "clock", f"{found}, before this program was installed", "set it (timedatectl, NTP)")
    return Finding("ok", "clock", found)
