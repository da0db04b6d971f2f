"""What a benchmark was run on, for the last line of its output."""

import contextlib
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def surroundings(packages: Sequence[str]) -> dict[str, object]:
    """Tell what was measured, and on what.

    Args:
        packages: Those whose versions matter; one that is not installed is left out.
    """
    versions = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],  # noqa: S607 - whichever git there is
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return {
        "cpu": next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine()),
        "n_cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
        "commit": git.stdout.strip(),
    }
