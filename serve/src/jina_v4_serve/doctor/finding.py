"""The result of a check."""

from dataclasses import dataclass
from typing import Literal

GIB = 2**30
Verdict = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        verdict: FAIL if a server would not start, or would be wrong or unsafe.
        subject: of the check.
        found: the facts.
        advice: what to do; "" if all is well.
    """

    verdict: Verdict
    subject: str
    found: str
    advice: str = ""


def gib(n_bytes: float) -> str:
    """Write a number of bytes for people."""
    return f"{n_bytes / GIB:.1f} GiB" if n_bytes >= GIB else f"{n_bytes / 2**20:.0f} MiB"
