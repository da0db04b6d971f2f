"""vLLM's two model runners: it chooses V2 where Triton works, so on every GPU, and V1 on a CPU.

Processes started with `RUNNERS["V2"]` in their environment have V2 chosen here too: Triton's interpreter runs its
kernels.
"""

import os
import re
from pathlib import Path

_FOLDERS = [str(Path(__file__).parent / "runner_v2"), *filter(None, [os.environ.get("PYTHONPATH")])]
RUNNERS: dict[str, dict[str, str]] = {
    "V1": {},
    "V2": {"PYTHONPATH": os.pathsep.join(_FOLDERS), "TRITON_INTERPRET": "1", "VLLM_PLUGINS": "like_a_gpu"},
}


def runner_of(log: Path) -> str:
    """Return the model runner that a server's log names."""
    text = log.read_text(errors="replace")
    (runner,) = {*re.findall(r"Using (V2) Model Runner", text), *re.findall(r"using the (V1) model runner", text)}
    return str(runner)
