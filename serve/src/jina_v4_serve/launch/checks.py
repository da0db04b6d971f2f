"""The checks before vLLM is started: the checkpoint, the options, the settings, the address."""

import os
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jina_v4_serve.api.door import KEEP_ALIVE_S
from jina_v4_serve.api.keys import Keys
from jina_v4_serve.api.log import VLLM_LOG
from jina_v4_serve.checkpoint import BASE, Checkpoint, read_checkpoint
from jina_v4_serve.errors import OptionError, PortError
from jina_v4_serve.exported import check_patterns, read_adapters
from jina_v4_serve.facts import IMAGE_PROMPT_TOKENS, MODEL, PIXELS_PER_TOKEN
from jina_v4_serve.launch import cpu
from jina_v4_serve.launch.arguments import vllm_arguments
from jina_v4_serve.launch.driver import check_driver
from jina_v4_serve.launch.gpu import Gpu, known_gpu
from jina_v4_serve.launch.options import check_readable
from jina_v4_serve.launch.server import DTYPES, LOOPBACK, Launch, ServerSettings, server_url
from jina_v4_serve.launch.sizing import served_dtype, step_of
from jina_v4_serve.launch.variables import check_variables
from jina_v4_serve.settings import read_settings, served_environment, variable_of
from jina_v4_serve.vllm_side.versions import find_vllm, vllm_version

MAX_SOCKET_FOLDER_BYTES = 107 - 37  # of a socket's path, without the name that vLLM gives it


def prepare(settings: ServerSettings) -> Launch:
    """Check everything that can be checked without vLLM; return how to start it.

    Raises:
        CheckpointError: the folder is incomplete or of another task.
        PortError: the server cannot listen on the address.
        OptionError: an option, a setting or a variable is out of range, the GPU's driver too old, or no folder is
            usable for temporary files.
    """
    check_variables(os.environ)
    check_readable(settings.vllm_options)
    check_dtype(settings.dtype)
    settings = replace(settings, n_servers=max(settings.n_servers, read_settings().servers_on_machine))
    checkpoint = read_checkpoint(settings.checkpoint, settings.task)
    adapters = read_adapters(checkpoint)
    check_max_pixels(settings.max_pixels, checkpoint)
    Keys(read_settings())
    check_port(settings.host, settings.port)
    temporary_folder()
    on_cpu = find_vllm()
    check_int8(checkpoint, on_cpu, served_dtype(settings.dtype, settings.n_servers, checkpoint, on_cpu))
    check_patterns(adapters, vllm_version(on_cpu))
    gpu = None if on_cpu else known_gpu()
    check_driver(gpu)
    return Launch(
        arguments=tuple(vllm_arguments(settings, checkpoint, on_cpu, adapters, gpu)),
        options=settings.vllm_options,
        environment={**environment(settings.tasks), **(cpu.threads(settings.n_servers) if on_cpu else {})},
        url=server_url(settings.host, settings.port, settings.vllm_options),
        banner=banner(settings, checkpoint, on_cpu, gpu),
    )


def check_dtype(dtype: str) -> None:
    """Refuse a dtype that is not offered.

    Raises:
        OptionError: the message names the offered dtypes.
    """
    if dtype not in DTYPES:
        raise OptionError(f"dtype={dtype} is not offered; choose {', '.join(DTYPES)}")


def check_int8(checkpoint: Checkpoint, on_cpu: bool, dtype: str) -> None:
    """Refuse an int8 checkpoint on a CPU that computes it wrongly, or with a dtype for which vLLM has no kernel.

    Raises:
        OptionError: the message says what to serve instead.
    """
    if not on_cpu or checkpoint.quantized != "int8":
        return
    if not cpu.int8_is_exact():
        raise OptionError(
            "this processor has no VNNI: int8 products overflow, and vectors would be wrong. Serve a checkpoint that "
            "was folded without --quantize int8"
        )
    if dtype == "float32" and cpu.has_amx():
        raise OptionError("on a processor with AMX vLLM does not compute int8 in float32: add --dtype bfloat16")


def check_max_pixels(max_pixels: int | None, checkpoint: Checkpoint) -> None:
    """Refuse a largest image area that does not fit the model; None is the checkpoint's own.

    Raises:
        OptionError: the message names the allowed range.
    """
    lowest = checkpoint.min_pixels
    highest = (checkpoint.max_model_len - IMAGE_PROMPT_TOKENS) * PIXELS_PER_TOKEN
    if max_pixels is not None and not lowest <= max_pixels <= highest:
        raise OptionError(f"--max-pixels={max_pixels} is not offered; choose {lowest} to {highest}")


def check_port(host: str, port: int) -> None:
    """Check that a server can listen on an address: vLLM would notice a minute later.

    Raises:
        PortError: the message has the system's reason.
    """
    if not 0 < port < 65536:
        raise PortError(f"cannot listen on {host}:{port}: a port is 1 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise PortError(f"cannot listen on {host}:{port}: {error}. Choose another with --port (make: PORT=)") from error


def temporary_folder() -> Path:
    """Return the folder for temporary files, in which vLLM's processes also have their sockets.

    Raises:
        OptionError: there is none, or its path is too long for a socket.
    """
    name = "VLLM_RPC_BASE_PATH" if os.environ.get("VLLM_RPC_BASE_PATH") else "TMPDIR"
    try:
        folder = os.environ.get("VLLM_RPC_BASE_PATH") or tempfile.gettempdir()
    except FileNotFoundError as error:
        raise OptionError(f"no folder for temporary files is writable and has space: {error}. Set TMPDIR") from error
    if (n_bytes := len(os.fsencode(folder))) > MAX_SOCKET_FOLDER_BYTES:
        raise OptionError(
            f"{folder} is too long for the path of a socket: {n_bytes} bytes, {MAX_SOCKET_FOLDER_BYTES} at most. "
            f"Set {name} to a shorter folder"
        )
    return Path(folder)


def environment(tasks: Sequence[str]) -> dict[str, str]:
    """Return the environment variables to add for vLLM's processes."""
    defaults = {
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_S),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # nvidia-smi's, so that the GPU in use is the one that was read
    }
    if read_settings().log == "json" and not os.environ.get("VLLM_LOGGING_LEVEL"):  # the file sets a level too
        defaults["VLLM_LOGGING_CONFIG_PATH"] = str(VLLM_LOG)
    plugins = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
    return {
        **{name: os.environ.get(name) or value for name, value in defaults.items()},
        "VLLM_PLUGINS": ",".join(dict.fromkeys([*plugins, "jina_v4"])),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0",  # the adapters are fixed and checked at the start
        **served_environment(tasks),
    }


def key_warning(host: str) -> list[str]:
    """Return a line for the operator if a server on a host is open to others than this machine; else none."""
    if host in LOOPBACK or not Keys(read_settings()).open:
        return []
    return [f"warning: no key is set: everyone who can reach {host} may use it; set {variable_of('api_key_file')}"]


def banner(settings: ServerSettings, checkpoint: Checkpoint, on_cpu: bool, gpu: Gpu | None) -> str:
    """Return the lines for the operator: what will be served, and where."""
    dtype = served_dtype(settings.dtype, settings.n_servers, checkpoint, on_cpu)
    computed_in = replace(checkpoint, dtype=dtype).precision
    url = server_url(settings.host, settings.port, settings.vllm_options)
    lines = [
        f"{MODEL}, task {settings.task}, {computed_in}, from {checkpoint.folder}"
        if settings.task != BASE
        else f"{MODEL}, one base for {', '.join(settings.tasks)}, {dtype}, from {checkpoint.folder.parent}",
    ]
    if checkpoint.random_weights:
        lines.append("these are the stand-in's RANDOM weights: the vectors mean nothing")
    if on_cpu and checkpoint.quantized == "fp8":
        lines.append("fp8 is slow on a CPU: fold without --quantize, or with --quantize int8 for a CPU with VNNI")
    if settings.dtype == "auto" and dtype != checkpoint.dtype:
        lines.append(f"this processor is faster in {dtype} than in the checkpoint's {checkpoint.dtype} (--dtype)")
    if not on_cpu:
        tokens = step_of(gpu, settings.vllm_options).tokens
        name = f"the GPU is {gpu.name}" if gpu else "the GPU is unknown to nvidia-smi"
        lines.append(f"{name}: each step computes up to {tokens:,} tokens (docs/operations.md)")
    lines.append(f"starting vLLM; it will answer on {url}/v1 within a minute or two")
    return "\n".join([*lines, *key_warning(settings.host)])
