"""What all benchmarks do with their figures."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def percentile(ordered: Sequence[float], percent: float) -> float | None:
    """Return the smallest value that so many percent of the values do not exceed; None of none.

    Args:
        ordered: from the smallest to the largest.
        percent: above 0, at most 100.
    """
    if not ordered:
        return None
    return ordered[max(math.ceil(percent / 100 * len(ordered)), 1) - 1]


def store(measured: dict[str, Any], folder: Path | None) -> None:
    """Write the figures into a folder, if there is one."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{measured['benchmark']}.json"
    path.write_text(json.dumps(measured) + "\n")
