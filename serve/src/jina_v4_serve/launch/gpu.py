"""The GPUs of this machine, from nvidia-smi. Only the standard library is imported, as `make install` runs this too.

`[N/A]` of nvidia-smi becomes None. It writes this for the memory of a GPU that shares the machine's memory, and for
many values inside a container with a part of a GPU (MIG).
"""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jina_v4_serve.errors import OptionError

_QUERY = ("name", "driver_version", "memory.total", "memory.free", "compute_cap", "mig.mode.current")
_TIMEOUT_S = 30.0
_WORKS = (0, 14)  # exit codes; after 14 a line warns that the infoROM of a GPU is damaged, which hinders nothing
_INSTANCE = re.compile(r"\s+MIG (?P<profile>(?:\d+c\.)?\d+g\.(?P<gb>\d+)gb\S*)\s.*UUID: (?P<uuid>MIG-[^)]+)\)")


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one MIG instance.

    Attributes:
        name: the name of the GPU; of an instance, also its profile.
        driver: the version of its driver.
        total_bytes: its memory; None if nvidia-smi does not know it.
        free_bytes: its free memory, or None.
        compute_capability: such as 9.0, or None.
        mig: whether it is split into instances.
    """

    name: str
    driver: str
    total_bytes: int | None
    free_bytes: int | None
    compute_capability: float | None
    mig: bool

    @property
    def shares_memory(self) -> bool:
        """Whether it has no memory of its own but uses the machine's."""
        return self.total_bytes is None and not self.mig


def read_gpus(device: str | None = None) -> list[Gpu]:
    """Ask nvidia-smi for the GPUs; return none if that program is not installed.

    Args:
        device: the index or UUID of one GPU; None for all GPUs.

    Raises:
        OptionError: nvidia-smi fails, or its reply cannot be read.
    """
    only = [] if device is None else ["-i", device]
    lines = _ask(*only, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits")
    try:
        return [_gpu(line.split(", ")) for line in lines if not line.startswith("WARNING: ")]
    except ValueError as error:
        raise OptionError(f"the reply of nvidia-smi cannot be read: {error}") from error


def known_gpu() -> Gpu | None:
    """Return the GPU or MIG instance that a server uses. None if nvidia-smi fails: a server starts all the same."""
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"
    uuid = device if device.startswith("MIG-") else None
    try:
        gpus = read_gpus(None if uuid else device)
        gpu = next((gpu for gpu in gpus if gpu.mig), next(iter(gpus), None))
        return _instance(gpu, uuid) if gpu and (gpu.mig or uuid) else gpu
    except OptionError:
        return None


def _instance(gpu: Gpu, uuid: str | None) -> Gpu:
    """Return a GPU with the name and memory of one of its instances, from `nvidia-smi -L`.

    Args:
        gpu: a GPU that is split.
        uuid: of the instance; None for the first, which CUDA uses by default.
    """
    for line in _ask("-L"):
        if (match := _INSTANCE.match(line)) and uuid in (None, match["uuid"]):
            total_bytes = int(match["gb"]) * 10**9
            return replace(gpu, name=f"{gpu.name} MIG {match['profile']}", total_bytes=total_bytes, free_bytes=None)
    return replace(gpu, total_bytes=None, free_bytes=None)


def _ask(*arguments: str) -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise OptionError(f"nvidia-smi fails: {error}") from error
    if done.returncode not in _WORKS:
        reason = (done.stdout + done.stderr).strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise OptionError(f"nvidia-smi fails: {reason[0]}")
    return done.stdout.rstrip().splitlines()


def _gpu(cells: Sequence[str]) -> Gpu:
    name, driver, total_mib, free_mib, capability, mig = (cell.strip() for cell in cells)
    return Gpu(
        name, driver, _bytes(total_mib), _bytes(free_mib), _number(capability), mig=mig.lower().startswith("enabled")
    )


def _number(cell: str) -> float | None:
    return None if cell.startswith("[") or cell == "N/A" else float(cell)


def _bytes(mib: str) -> int | None:
    number = _number(mib)
    return None if number is None else int(number) * 2**20
