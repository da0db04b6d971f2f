"""What a checkpoint holds beside its weights: config, tokenizer, processor settings, prompts and index.

Everything here turns JSON into JSON. A checkpoint is stock: nothing in it refers to code, and no key of the published
config that only the published code knows is kept.
"""

import json
from collections.abc import Mapping
from typing import Any

from jina_v4_merge.errors import ConfigError
from jina_v4_merge.image_settings import PREPROCESSOR_NAME, PROCESSOR_NAME, image_settings, settings_file
from jina_v4_merge.prompts import CHAT_TEMPLATE, text_prefixes
from jina_v4_merge.quantize import quantization_config
from jina_v4_merge.sources import CONFIG_NAME

MODEL = "jina-embeddings-v4"
MANIFEST_NAME = "manifest.json"
PROJECTOR_NAME = "multi_vector_projector.safetensors"
PROMPTS_NAME = "config_sentence_transformers.json"
STANDIN_KEY = "standin"
# What an exported folder is part of: one base, and an adapter a task. The base's folder, task and part have one name.
BASE = "base"
ADAPTER = "adapter"
# An exported folder that holds a task's language model for llama.cpp, and what its weights can be written as.
GGUF = "gguf"
GGUF_DTYPES = ("f32", "f16", "bf16", "q8_0")

# Keys of the published config.json that stock code has no use for.
_PUBLISHED_ONLY = (
    "_attn_implementation",
    "_name_or_path",
    "auto_map",
    "matryoshka_dims",
    "multi_vector_projector_dim",
    "single_vector_pool_strategy",
    STANDIN_KEY,
    "task_names",
    "truncate_dim",
    "verbosity",
)
ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
_PROCESSOR = "Qwen2_5_VLProcessor"


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """Return JSON as all our files have it: readable, UTF-8, one newline at the end."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def json_line(content: Any) -> str:
    """Return JSON on one line, for what has no place for more."""
    return json.dumps(content, ensure_ascii=False)


def task_names(config: Mapping[str, Any]) -> list[str]:
    """Return the tasks that a base has adapters for.

    Raises:
        ConfigError: its config.json does not say.
    """
    names = config.get("task_names")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigError("config.json: task_names must list the tasks; the base must be a jina-embeddings-v4")
    return names


def dimensions(config: Mapping[str, Any]) -> list[int]:
    """Return the lengths to which a base's dense vectors may be cut.

    Raises:
        ConfigError: its config.json does not say.
    """
    dims = config.get("matryoshka_dims")
    if not isinstance(dims, list) or not dims or not all(isinstance(dim, int) for dim in dims):
        raise ConfigError(
            "config.json: matryoshka_dims must list the dimensions; the base must be a jina-embeddings-v4"
        )
    return dims


def gguf_name(task: str, dtype: str) -> str:
    """Return the name of a task's GGUF file, with the dtype in capitals as is usual for these files."""
    return f"{MODEL}-{task}-{dtype.upper()}.gguf"


def stock_config(config: Mapping[str, Any], dtype: str, quantized: str | None = None) -> dict[str, Any]:
    """Return a base's config.json as stock code reads it, for weights of the given dtype.

    Args:
        config: The base's.
        dtype: Of the weights.
        quantized: What the language model's matrices are instead: one of `quantize.KINDS`.
    """
    stock = {key: value for key, value in config.items() if key not in _PUBLISHED_ONLY}
    stock |= {
        "architectures": [ARCHITECTURE],
        "model_type": "qwen2_5_vl",
        "matryoshka_dimensions": dimensions(config),
        "torch_dtype": dtype,
    }
    stock = _with_dtype(stock, dtype)
    return stock if quantized is None else stock | {"quantization_config": quantization_config(quantized)}


def plain_files(
    base: Mapping[str, bytes], config: Mapping[str, Any], task: str, dtype: str, quantized: str | None = None
) -> dict[str, bytes]:
    """Return all files of a task's checkpoint but weights, index and manifest.

    Args:
        base: The base's small files, by name; those of JSON hold an object each.
        config: The base's config.json.
        task: Of the checkpoint.
        dtype: Of the weights.
        quantized: As of `stock_config`.
    """
    files = {CONFIG_NAME: json_bytes(stock_config(config, dtype, quantized))}
    processors = {name: json.loads(base[name]) for name in (PROCESSOR_NAME, PREPROCESSOR_NAME) if name in base}
    name = settings_file(processors)
    files[PREPROCESSOR_NAME] = json_bytes(_stock_processor(image_settings(name, processors[name])))
    for name, content in base.items():
        if name == "tokenizer_config.json":
            files[name] = json_bytes(_stock_processor(json.loads(content)))
        elif name not in processors:
            files[name] = content
    files["chat_template.jinja"] = CHAT_TEMPLATE.encode()
    files[PROMPTS_NAME] = json_bytes({"prompts": text_prefixes(task), "default_prompt_name": "query"})
    return files


def index(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """Return a model.safetensors.index.json."""
    return json_bytes({"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))})


def _with_dtype(section: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return a config section with every dtype in it, at whatever depth, set to the given one."""
    return {
        key: dtype
        if key in ("dtype", "torch_dtype")
        else _with_dtype(value, dtype)
        if isinstance(value, Mapping)
        else value
        for key, value in section.items()
    }


def _stock_processor(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a processor's or tokenizer's settings without code or template of the published model."""
    stock = {key: value for key, value in settings.items() if key not in ("auto_map", "chat_template")}
    if "processor_class" in stock:
        stock["processor_class"] = _PROCESSOR
    return stock
