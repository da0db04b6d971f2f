"""The GPUs of this machine, as nvidia-smi describes them. Python's own library does, for `make install` reads this too.

What nvidia-smi writes as `[N/A]` is None here. It does so for the memory of a GPU that shares the machine's, and for
much inside a container that has a part of a GPU (MIG).
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
_INSTANCE = re.compile(r"\s+MIG (?P<profile>\d+[cg]\.(?P<gb>\d+)gb\S*)\s.*UUID: (?P<uuid>MIG-[^)]+)\)")


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one MIG instance.

    Attributes:
        name: as nvidia-smi has it; of an instance with its profile.
        driver: its version.
        total_bytes: of its memory; None where nvidia-smi does not say.
        free_bytes: the same.
        compute_capability: the same.
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
        """Whether it has no memory of its own, but uses the machine's."""
        return self.total_bytes is None and not self.mig


def read_gpus(device: str | None = None) -> list[Gpu]:
    """Ask nvidia-smi for the GPUs; there are none where there is no such program.

    Args:
        device: index or UUID of the only one to ask for.

    Raises:
        OptionError: nvidia-smi fails, or its reply cannot be read.
    """
    only = [] if device is None else ["-i", device]
    lines = _ask(*only, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits")
    try:
        return [_gpu(line.split(", ")) for line in lines]
    except ValueError as error:
        raise OptionError(f"nvidia-smi replies something else: {error}") from error


def known_gpu() -> Gpu | None:
    """Return the GPU or MIG instance that a server uses; None where nvidia-smi does not tell, which ends no start."""
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    uuid = device if device.startswith("MIG-") else None
    try:
        gpus = read_gpus(None if uuid else device)
        gpu = next((gpu for gpu in gpus if gpu.mig), next(iter(gpus), None))
        return _instance(gpu, uuid) if gpu and (gpu.mig or uuid) else gpu
    except OptionError:
        return None


def _instance(gpu: Gpu, uuid: str | None) -> Gpu:
    """Return a GPU with the memory of one of its instances, which only `nvidia-smi -L` names.

    Args:
        gpu: that is split.
        uuid: of the instance; None for the first, which CUDA takes where none is named.
    """
    for line in _ask("-L"):
        if (found := _INSTANCE.match(line)) and uuid in (None, found["uuid"]):
            total_bytes = int(found["gb"]) * 10**9
            return replace(gpu, name=f"{gpu.name} MIG {found['profile']}", total_bytes=total_bytes, free_bytes=None)
    return replace(gpu, total_bytes=None, free_bytes=None)


def _ask(*arguments: str) -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise OptionError(f"nvidia-smi fails: {error}") from error
    if done.returncode != 0:
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
