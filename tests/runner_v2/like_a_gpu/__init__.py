"""What vLLM's CPU build needs to choose and run Model Runner V2; `tests/runners.py` puts it where a server finds it.

Triton and vLLM find it by the entry points of the dist-info folder beside this one:

- vLLM chooses V2 where Triton works. Its CPU build asks only whether Triton has a backend named cpu, and Triton loads
  a backend's modules `compiler` and `driver`. With TRITON_INTERPRET=1 kernels run as Python, and no backend is used.
- vLLM switches asynchronous scheduling off on a CPU. `platform` is the same platform without that.
"""


def platform() -> str:
    """Return the name of the class that vLLM takes for its platform."""
    return "like_a_gpu.platform.LikeAGpu"
