"""What a checkpoint holds apart from weights: config, tokenizer, processor settings, prompts; and its files' names.

A checkpoint is stock: nothing in it refers to code, and no key of the published
config that only the published code knows is kept.
"""

import json
from collections.abc import Mapping
from typing import Any

from jina_v4_merge.files import json_bytes
from jina_v4_merge.prompts import CHAT_TEMPLATE, text_prefixes
from jina_v4_merge.quantize import quantization_config
from jina_v4_merge.reading.configs import (
    CONFIG_NAME,
    PREPROCESSOR_NAME,
    PROCESSOR_NAME,
    TOKENIZER_CONFIG_NAME,
    dimensions,
    image_settings,
)
from jina_v4_merge.reading.model import Model

MODEL = "jina-embeddings-v4"
MANIFEST_NAME = "manifest.json"
PROJECTOR_NAME = "multi_vector_projector.safetensors"
PROMPTS_NAME = "config_sentence_transformers.json"
STANDIN_KEY = "standin"
# The parts of an export: one base, and an adapter a task. The base's folder, task and part have one name.
BASE = "base"
ADAPTER = "adapter"
# The part that holds a task's language model for llama.cpp, and what its weights can be written as.
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


def gguf_name(task: str, dtype: str) -> str:
    """Return the name of a task's GGUF file, with the dtype in capitals as is usual for these files."""
    return f"{MODEL}-{task}-{dtype.upper()}.gguf"


def stock_config(config: Mapping[str, Any], dtype: str, quantized: str | None = None) -> dict[str, Any]:
    """Return a base's config.json as stock code reads it, for weights of a dtype.

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


def plain_files(model: Model, task: str | None, dtype: str, quantized: str | None = None) -> dict[str, bytes]:
    """Return all files of a checkpoint but weights, index and manifest.

    Args:
        model: What the checkpoint is made from.
        task: Of the checkpoint; None for the base without an adapter, which has no prompts.
        dtype: Of the weights.
        quantized: As of `stock_config`.
    """
    files = {CONFIG_NAME: json_bytes(stock_config(model.config, dtype, quantized))}
    base = model.small_files
    processors = {name: json.loads(base[name]) for name in (PROCESSOR_NAME, PREPROCESSOR_NAME) if name in base}
    _, settings = image_settings(processors)
    files[PREPROCESSOR_NAME] = json_bytes(_stock_processor(settings or {}))
    for name, content in base.items():
        if name == TOKENIZER_CONFIG_NAME:
            files[name] = json_bytes(_stock_processor(json.loads(content)))
        elif name not in processors:
            files[name] = content
    files["chat_template.jinja"] = CHAT_TEMPLATE.encode()
    if task is not None:
        files[PROMPTS_NAME] = json_bytes({"prompts": text_prefixes(task), "default_prompt_name": "query"})
    return files


def _with_dtype(section: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return a config section with every dtype in it, at whatever depth, replaced."""
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
