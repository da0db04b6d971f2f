"""vLLM's options for this model and this machine, and the options that nobody may change."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jina_v4_serve.api.door import MAX_HEAD_BYTES
from jina_v4_serve.checkpoint import Checkpoint
from jina_v4_serve.errors import OptionError
from jina_v4_serve.exported import Adapter
from jina_v4_serve.facts import MODEL, model_name
from jina_v4_serve.launch import cpu
from jina_v4_serve.launch.gpu import Gpu
from jina_v4_serve.launch.options import count_of, says_data_parallel, says_parallel, value_of
from jina_v4_serve.launch.server import ServerSettings
from jina_v4_serve.launch.sizing import held_bytes, kv_cache_bytes, memory_share, served_dtype, step_of
from jina_v4_serve.settings import read_settings
from jina_v4_serve.vllm_side.plugin import ARCHITECTURE, PROJECTORS
from jina_v4_serve.vllm_side.versions import is_replaced

DRAIN_S = 30  # how long a server that stops may take to answer the requests in flight
CORES_AN_API_PROCESS = 4  # a choice, not measured: it uses one or two, and the engine needs some
MOST_API_PROCESSES = 4
ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values of vLLM's --max-lora-rank

_COARSER_TYPES = (
    "quantization_config", "calculate_kv_scales", "kv_cache_dtype_skip_layers", "override_attention_dtype",
    "mm_encoder_fp8_scale_path",
)  # fmt: skip
_ADAPTERS = (
    "enable_lora", "lora_modules", "max_lora_rank", "max_loras", "max_cpu_loras", "lora_dtype", "lora_target_modules",
    "default_mm_loras", "enable_tower_connector_lora",
)  # fmt: skip
# The user's options may not change these: each would change the vectors, or run other code than ours.
FIXED = {
    "model_tag": "use --checkpoint for the checkpoint",
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
    "mm_processor_kwargs": "use --max-pixels for the image size",
    "limit_mm_per_prompt": "the published model takes one image per prompt",
    "trust_remote_code": "code in a checkpoint is never run",
    "kv_sharing_fast_prefill": "it computes the last token only, and the mean is over all",
    "prefill_context_parallel_size": "each GPU would have a part of the tokens, and the mean is over all",
    **dict.fromkeys(
        ("tokenizer", "tokenizer_mode", "skip_tokenizer_init", "hf_config_path", "config_format", "model_weights"),
        "the weights need the checkpoint's own",
    ),
    **dict.fromkeys(
        ("model_impl", "model_class_overrides", "worker_cls", "worker_extension_cls", "scheduler_cls"),
        "only our model class, worker and scheduler are tested",
    ),
    **dict.fromkeys(
        ("language_model_only", "mm_encoder_only", "enable_mm_embeds"), "the server embeds both texts and images"
    ),
    **dict.fromkeys(
        ("kv_transfer_config", "kv_offloading_size", "ec_transfer_config"),
        "cached tokens have no hidden states, and the mean needs them",
    ),
    **dict.fromkeys(
        _COARSER_TYPES,
        "the revision would not show it; it shows --quantization, --kv-cache-dtype and --mm-encoder-attn-dtype",
    ),
    "scheduling_policy": "requests have a priority",
    "middleware": "yours would replace the one that guards the routes",
    "allowed_methods": "each route has its own",
    "allowed_headers": "every header is allowed",
    "allow_credentials": "no route reads cookies",
    **dict.fromkeys(_ADAPTERS, "adapters are folded into the checkpoint, or loaded with --one-base"),
}


def vllm_arguments(
    settings: ServerSettings, checkpoint: Checkpoint, on_cpu: bool, adapters: Mapping[str, Adapter], gpu: Gpu | None
) -> list[str]:
    """Return the arguments of `vllm serve` for this model and this machine.

    Args:
        settings: of the server.
        checkpoint: a merged checkpoint, or an exported base.
        on_cpu: whether vLLM computes on the CPU.
        adapters: of an exported base, by task; else empty.
        gpu: None if it is unknown.
    """
    dtype = served_dtype(settings.dtype, settings.n_servers, checkpoint, on_cpu)
    overrides: dict[str, Any] = {"architectures": [ARCHITECTURE]}
    if adapters:  # vLLM's adapters cannot hold a projector
        overrides[PROJECTORS] = {task: str(adapter.folder) for task, adapter in adapters.items()}
    arguments = [
        str(checkpoint.folder),
        f"--served-model-name={MODEL if adapters else model_name(settings.task)}",
        f"--host={settings.host}",
        f"--port={settings.port}",
        f"--dtype={dtype}",
        "--runner=pooling",
        "--hf-overrides=" + json.dumps(overrides),
        "--no-enable-prefix-caching",
        "--enable-chunked-prefill",
        "--scheduling-policy=priority",
        f"--max-model-len={checkpoint.max_model_len}",
        '--limit-mm-per-prompt={"image": 1, "video": 0}',
        "--mm-processor-cache-gb=0",  # it would keep 4 GiB of images, most of which come only once
        "--middleware=jina_v4_serve.api.guard.Guard",
        f"--allowed-origins={json.dumps(sorted(read_settings().allowed_origins))}",
        "--middleware=jina_v4_serve.vllm_side.drain.Drain",
        "--enable-offline-docs",  # this server has the files of /docs
        f"--shutdown-timeout={DRAIN_S}",
        "--disable-uvicorn-access-log",
        f"--h11-max-incomplete-event-size={MAX_HEAD_BYTES}",
    ]
    if is_replaced("scheduler", on_cpu):
        arguments.append("--scheduler-cls=jina_v4_serve.vllm_side.scheduler.make_scheduler")
    if on_cpu:
        arguments += cpu_arguments(settings, checkpoint, dtype)
    else:
        arguments += gpu_arguments(settings, checkpoint, dtype, adapters, gpu)
    if settings.max_pixels is not None:
        limits = {"min_pixels": checkpoint.min_pixels, "max_pixels": settings.max_pixels}
        arguments.append("--mm-processor-kwargs=" + json.dumps(limits))
    return arguments + (lora_arguments(adapters) if adapters else [])


def cpu_arguments(settings: ServerSettings, checkpoint: Checkpoint, dtype: str) -> list[str]:
    """Return the arguments for a server that computes on the CPU."""
    return [
        f"--max-num-batched-tokens={cpu.MAX_TOKENS_A_STEP}",
        *longest_part(checkpoint, cpu.MAX_TOKENS_A_STEP // 2, settings.vllm_options),
        "--enforce-eager",  # compiling takes 10 s of a start on two cores, and 30 to 60 s of the first start
        # By default vLLM takes nine tenths of the memory. VLLM_CPU_KVCACHE_SPACE wins over this, if it is set.
        f"--kv-cache-memory-bytes={kv_cache_bytes(checkpoint, dtype)}",
        *executor_option(settings.n_servers, settings.vllm_options),
    ]


def gpu_arguments(
    settings: ServerSettings, checkpoint: Checkpoint, dtype: str, adapters: Mapping[str, Adapter], gpu: Gpu | None
) -> list[str]:
    """Return the arguments for a server that computes on a GPU; docs/operations.md has a table of them."""
    options = settings.vllm_options
    step = step_of(gpu, options)
    held = held_bytes(checkpoint, adapters.values(), dtype, step)
    arguments = [
        f"--max-num-batched-tokens={step.tokens}",
        # With this vLLM does not profile the memory, so other servers on the GPU cannot disturb its measurement.
        f"--kv-cache-memory-bytes={kv_cache_bytes(checkpoint, dtype, step)}",
        f"--gpu-memory-utilization={memory_share(gpu, held, options):.3f}",
    ]
    arguments += longest_part(checkpoint, step.prompt_tokens, options)
    if not says_data_parallel(options):  # else vLLM chooses the number
        arguments.append(f"--api-server-count={api_processes(cpu.n_cores(), settings.n_servers)}")
    return arguments


def longest_part(checkpoint: Checkpoint, n_tokens: int, options: Sequence[str]) -> list[str]:
    """Return the option that limits a long prompt to `n_tokens` of a step, so that other prompts fit beside it."""
    longest = count_of(options, "--max-model-len") if value_of(options, "--max-model-len") else checkpoint.max_model_len
    # vLLM refuses a part that is longer than the longest prompt.
    return [] if longest is None else [f"--long-prefill-token-threshold={min(n_tokens, longest)}"]


def lora_arguments(adapters: Mapping[str, Adapter]) -> list[str]:
    """Return the arguments of `vllm serve` for adapters that are loaded at the start and stay loaded.

    Raises:
        OptionError: the rank of an adapter is too high for vLLM.
    """
    rank = max(adapter.rank for adapter in adapters.values())
    if rank > MAX_RANKS[-1]:
        raise OptionError(f"an adapter of rank {rank} cannot be served: vLLM allows {MAX_RANKS[-1]} at most")
    modules = [json.dumps({"name": model_name(task), "path": str(each.folder)}) for task, each in adapters.items()]
    return [
        "--enable-lora",
        f"--max-lora-rank={next(allowed for allowed in MAX_RANKS if allowed >= rank)}",
        f"--max-loras={len(adapters)}",  # one batch can hold all of them, so that none waits for another
        f"--max-cpu-loras={len(adapters)}",
        "--lora-modules",
        *modules,
    ]


def executor_option(n_servers: int, options: Sequence[str]) -> tuple[str, ...]:
    """Return the option that makes the engine compute in its own process, with the threads of `cpu.threads`."""
    if says_parallel(options) or not cpu.threads(n_servers):  # vLLM's own executor is kept
        return ()
    return (f"--distributed-executor-backend={ONE_PROCESS}",)


def api_processes(n_cores: int, n_servers: int) -> int:
    """Return how many API processes a server with a GPU has. Each prepares one picture at a time.

    The servers of this machine share its cores.
    """
    return min(MOST_API_PROCESSES, max(1, n_cores // (CORES_AN_API_PROCESS * n_servers)))


def check_options(ours: dict[str, Any], merged: dict[str, Any]) -> None:
    """Refuse options that would change the vectors.

    Args:
        ours: vLLM's settings from our arguments only.
        merged: vLLM's settings from our arguments and the user's options.

    Raises:
        OptionError: the message names the option and why it is fixed.
    """
    for name, reason in FIXED.items():
        if merged.get(name) != ours.get(name):
            raise OptionError(f"--{name.replace('_', '-')} cannot be changed: {reason}")
    if merged.get("load_format") == "dummy":
        raise OptionError("--load-format=dummy cannot be served: the weights would be random")
