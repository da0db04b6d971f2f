"""Older processors in disguise: torch and oneDNN compute as on one, and vLLM loads its library for such a one.

Processes started with `disguise(...)` in their environment are disguised, and so are those that they start.
"""

import os
from pathlib import Path

# torch's name for the instructions, and vLLM's libraries for processors that have no more than these
LIBRARIES = {"avx2": "_C_AVX2", "avx512": "_C_AVX512"}
_NEEDED = {"avx2": "avx2", "avx512": "avx512f"}
_ONEDNN = {"avx2": "AVX2", "avx512": "AVX512_CORE_VNNI"}


def disguise(instructions: str) -> dict[str, str]:
    """Return the variables of a process that is to use no newer instructions; none where this processor lacks them.

    Args:
        instructions: avx2, or avx512 without its part for bfloat16.
    """
    if _NEEDED[instructions] not in Path("/proc/cpuinfo").read_text().split():
        return {}
    folders = [str(Path(__file__).parent / "disguise"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "ATEN_CPU_CAPABILITY": instructions,
        "ONEDNN_MAX_CPU_ISA": _ONEDNN[instructions],
        "PYTHONPATH": os.pathsep.join(folders),
    }
