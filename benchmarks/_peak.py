"""What the machine's matrix products can do, measured: the ceiling that the other figures are shares of.

Run as a program, so that its memory and threads are its own: `python _peak.py` prints JSON.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

SECONDS = 1.5
DTYPES = ("bfloat16", "float32")


def measured_peak() -> dict[str, float]:
    """Measure in a process of its own; return FLOP/s by dtype, and the threads used."""
    program = [sys.executable, str(Path(__file__))]
    found: dict[str, float] = json.loads(subprocess.run(program, capture_output=True, check=True).stdout)
    return found


def faster_dtype(rates: dict[str, float]) -> str:
    """Return the dtype whose matrix products are faster: float32 where a processor emulates bfloat16."""
    return max(DTYPES, key=lambda name: rates[f"{name}_tflop_per_s"])


def main() -> None:
    """Multiply for a while; print the best rate of each dtype."""
    import torch

    on_gpu = torch.cuda.is_available()
    device, side = ("cuda", 8192) if on_gpu else ("cpu", 2048)
    n_threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(n_threads)
    rates: dict[str, float] = {"n_threads": n_threads}
    for name in DTYPES:
        a, b = (torch.randn(side, side, device=device).to(getattr(torch, name)) for _ in range(2))
        best, end = float("inf"), time.perf_counter() + SECONDS
        while time.perf_counter() < end:
            begin = time.perf_counter()
            torch.mm(a, b)
            if on_gpu:
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - begin)
        rates[f"{name}_tflop_per_s"] = 2 * side**3 / best / 1e12
    print(json.dumps(rates))


if __name__ == "__main__":
    main()
