"""Machines with GPUs, by what their nvidia-smi says: a program of that name, and metadata of vLLM's ordinary build."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

INSTANCE = "MIG-6f3e2f6c-8a0e-5f0f-9b44-0c8a5d0c1d11"


@dataclass(frozen=True)
class Machine:
    """What nvidia-smi writes.

    Attributes:
        gpus: a line each for --query-gpu: name, driver, MiB in all, MiB free, compute capability, MIG.
        listing: for -L, of instances.
        devices: CUDA_VISIBLE_DEVICES.
    """

    gpus: tuple[str, ...]
    listing: str = ""
    devices: str = ""

    def install(self, folder: Path) -> dict[str, str]:
        """Write the program and the metadata into a folder; return the variables by which both are found."""
        (folder / "gpus").write_text("".join(f"{line}\n" for line in self.gpus))
        (folder / "listing").write_text(self.listing)
        program = folder / "nvidia-smi"
        program.write_text(
            f"#!/bin/sh\ncd '{folder}'\n"
            'case "$1" in -L) cat listing;; -i) sed -n "$(($2 + 1))p" gpus;; *) cat gpus;; esac\n'
        )
        program.chmod(0o755)
        metadata = folder / "vllm-0.32.0.dist-info"
        metadata.mkdir(exist_ok=True)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
        path = f"{folder}:/usr/bin:/bin"
        return {"PATH": path, "PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": self.devices}

    def use(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have this process see the machine."""
        variables = self.install(folder)
        monkeypatch.syspath_prepend(variables.pop("PYTHONPATH"))
        for name, value in variables.items():
            monkeypatch.setenv(name, value)


MACHINES: Mapping[str, Machine] = {
    "L4, 24 GB": Machine(("NVIDIA L4, 580.95.05, 23034, 22563, 8.9, [N/A]",)),
    "A10, 24 GB": Machine(("NVIDIA A10, 580.95.05, 23028, 22517, 8.6, [N/A]",)),
    "A100, 40 GB": Machine(("NVIDIA A100-SXM4-40GB, 580.95.05, 40960, 40442, 8.0, Disabled",)),
    "A100, 80 GB": Machine(("NVIDIA A100-SXM4-80GB, 580.95.05, 81920, 81221, 8.0, Disabled",)),
    "H100, 80 GB": Machine(("NVIDIA H100 80GB HBM3, 580.95.05, 81559, 81079, 9.0, Disabled",)),
    "H200, 141 GB": Machine(("NVIDIA H200, 580.95.05, 143771, 143158, 9.0, Disabled",)),
    "H100, MIG 2g.20gb": Machine(
        ("NVIDIA H100 80GB HBM3, 580.95.05, [N/A], [N/A], 9.0, Enabled",),
        f"GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-5d5ba0d6)\n  MIG 2g.20gb     Device  0: (UUID: {INSTANCE})\n",
        INSTANCE,
    ),
    "GB10, unified memory": Machine(("NVIDIA GB10, 580.95.05, [N/A], [N/A], 12.1, [N/A]",)),
    "two L4": Machine(("NVIDIA L4, 580.95.05, 23034, 22563, 8.9, [N/A]",) * 2),
    "H100, driver 550": Machine(("NVIDIA H100 80GB HBM3, 550.163.01, 81559, 81079, 9.0, Disabled",)),
}
