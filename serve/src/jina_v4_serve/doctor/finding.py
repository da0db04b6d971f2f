"""What a check says."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GIB = 2**30
Verdict = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """One line of the screen.

    Attributes:
        verdict: FAIL is what keeps a server from starting, or would make it wrong or unsafe.
        subject: what was looked at.
        found: there.
        advice: what to do; empty where all is well.
    """

    verdict: Verdict
    subject: str
    found: str
    advice: str = ""


def gib(n_bytes: float) -> str:
    """Write a number of bytes for people."""
    return f"{n_bytes / GIB:.1f} GiB" if n_bytes >= GIB else f"{n_bytes / 2**20:.0f} MiB"


def read_text(path: Path) -> str:
    """Read a file of the kernel's; empty where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""
