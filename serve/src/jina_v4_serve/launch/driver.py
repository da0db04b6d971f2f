"""Checks that the driver of a GPU is new enough for torch's version of CUDA. Run as a program, it warns.

`make install` runs it before anything is installed, so it needs only Python's standard library.
"""

import os
import sys
from importlib import metadata

from jina_v4_serve.errors import OptionError
from jina_v4_serve.launch.gpu import Gpu, read_gpus

PINNED_CUDA = 13  # of the torch in requirements/gpu.txt
OLDEST = {12: 525, 13: 580}  # the driver that each CUDA needs, by major versions
COMPATIBLE = "VLLM_ENABLE_CUDA_COMPATIBILITY"  # makes vLLM load NVIDIA's cuda-compat
ADVICE = f"install a newer one, or on a data centre GPU NVIDIA's cuda-compat, and set {COMPATIBLE}=1"


def torch_cuda() -> int:
    """Return the major version of CUDA of the installed torch, or of the pinned one."""
    try:
        _, _, build = metadata.version("torch").partition("+cu")
    except metadata.PackageNotFoundError:
        return PINNED_CUDA
    return int(build[:2]) if build[:2].isdecimal() else PINNED_CUDA


def driver_failure(gpu: Gpu) -> str | None:
    """Return what is wrong with the driver; None if it is new enough, or if cuda-compat replaces it."""
    cuda = torch_cuda()
    oldest = OLDEST.get(cuda, max(OLDEST.values()))
    major = gpu.driver.partition(".")[0]
    is_replaced = os.environ.get(COMPATIBLE, "").strip().lower() in ("1", "true")
    if is_replaced or not major.isdecimal() or int(major) >= oldest:
        return None
    return f"the GPU's driver is {gpu.driver}; torch is built for CUDA {cuda}, which needs {oldest} or newer"


def check_driver(gpu: Gpu | None) -> None:
    """Refuse to start on a driver that is too old.

    Raises:
        OptionError: the message names both versions.
    """
    if gpu is not None and (failure := driver_failure(gpu)):
        raise OptionError(f"{failure}: {ADVICE}")


def main() -> None:
    """Warn of a driver that is too old; say nothing if there is no GPU."""
    try:
        failure = next(filter(None, map(driver_failure, read_gpus())), None)
    except OptionError as error:
        failure = str(error)
    if failure is not None:
        print(f"warning: {failure}: {ADVICE}", file=sys.stderr)  # noqa: T201 - the user's screen


if __name__ == "__main__":
    main()
