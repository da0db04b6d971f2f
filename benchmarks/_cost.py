"""What processes cost, by the kernel's count: CPU seconds and peak memory of a process and all that it has started."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Cost:
    """Of a process and its descendants.

    Attributes:
        cpu_s: on a core since their starts, those included that have ended and were waited for.
        peak_rss_mib: the sum of each one's own peak since its start. Pages that they share count for each, and their
            peaks need not have been at one time: it is never less than what was needed.
        n_processes: that live.
    """

    cpu_s: float
    peak_rss_mib: float
    n_processes: int


def cost_of(pid: int) -> Cost:
    """Ask the kernel."""
    cpu_s, peak_kib, n_processes = 0.0, 0, 0
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        for process in [first, *first.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                times = process.cpu_times()
                cpu_s += times.user + times.system + times.children_user + times.children_system
                peak_kib += _peak_kib(process.pid)
                n_processes += 1
    return Cost(cpu_s, peak_kib / 1024, n_processes)


def _peak_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    return 0
