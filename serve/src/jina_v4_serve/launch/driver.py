"""Whether the driver of a GPU is new enough for the CUDA that torch is built for. Run as a program, it warns.

`make install` runs it before anything is installed: it needs Python's own library alone.
"""

import os
import sys
from importlib import metadata

from jina_v4_serve.errors import OptionError
from jina_v4_serve.launch.gpu import Gpu, read_gpus

PINNED_CUDA = 13  # of the torch in requirements/gpu.txt
OLDEST = {12: 525, 13: 580}  # the driver that each CUDA needs, by major versions
COMPATIBLE = "VLLM_ENABLE_CUDA_COMPATIBILITY"  # vLLM's: it then loads NVIDIA's cuda-compat
ADVICE = f"install a newer one, or on a data centre GPU NVIDIA's cuda-compat, and set {COMPATIBLE}=1"


def torch_cuda() -> int:
    """Return the major version of CUDA that the installed torch is built for, or is to be."""
    try:
        _, _, build = metadata.version("torch").partition("+cu")
    except metadata.PackageNotFoundError:
        return PINNED_CUDA
    return int(build[:2]) if build[:2].isdecimal() else PINNED_CUDA


def driver_failure(gpu: Gpu) -> str | None:
    """Return what is wrong with the driver; None where it is new enough, or cuda-compat is to take its place."""
    cuda = torch_cuda()
    oldest = OLDEST.get(cuda, max(OLDEST.values()))
    major = gpu.driver.partition(".")[0]
    is_replaced = os.environ.get(COMPATIBLE, "").strip().lower() in ("1", "true")
    if is_replaced or not major.isdecimal() or int(major) >= oldest:
        return None
    return f"the GPU's driver is {gpu.driver}; CUDA {cuda}, which torch is built for, needs {oldest} or newer"


def check_driver(gpu: Gpu | None) -> None:
    """Refuse to start on a driver that is too old.

    Raises:
        OptionError: naming both versions.
    """
    if gpu is not None and (failure := driver_failure(gpu)):
        raise OptionError(f"{failure}: {ADVICE}")


def main() -> None:
    """Warn of a driver that is too old; whether there is a GPU at all is for others to find out."""
    try:
        failure = next(filter(None, map(driver_failure, read_gpus())), None)
    except OptionError as error:
        failure = str(error)
    if failure is not None:
        print(f"warning: {failure}: {ADVICE}", file=sys.stderr)  # noqa: T201 - the user's screen


if __name__ == "__main__":
    main()
