"""A merged checkpoint's language model as a GGUF file, tensor by tensor, in the checkpoint's own dtype.

llama.cpp's converter knows a tokenizer by a hash of what it does, and the stand-in's is not among those. So this file
has none (whoever reads it brings token ids), and no vision tower: that would be a file of its own.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

ARCH = gguf.MODEL_ARCH.QWEN2VL  # llama.cpp's name for the language model of Qwen2-VL and Qwen2.5-VL
VISION = "visual."
ROPE_SECTIONS = 4  # llama.cpp keeps four, the model has three
TYPES = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
}


def write_gguf(checkpoint: Path, path: Path) -> str:
    """Write the file.

    Args:
        checkpoint: merged, of any task.
        path: of the file, which must not be there.

    Returns:
        The dtype of its matrices.

    Raises:
        ValueError: a tensor has no place in a GGUF file.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    text = config.get("text_config", config)
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    files = {name: checkpoint / file for name, file in index.items() if not name.startswith(VISION)}
    names = gguf.get_tensor_name_map(ARCH, text["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCH])
    _describe(writer, text)
    dtypes = set()
    for name, file in files.items():
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise ValueError(f"{name} of {file.name} has no place in a GGUF file of {gguf.MODEL_ARCH_NAMES[ARCH]}")
        tensor = _tensor(file, name)
        array, kind = _as_written(tensor)
        writer.add_tensor_info(place, array.shape, array.dtype, array.nbytes, raw_dtype=kind)
        if tensor.ndim > 1:
            dtypes.add(str(tensor.dtype).removeprefix("torch."))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, file in files.items():  # in the order of the infos
        writer.write_tensor_data(_as_written(_tensor(file, name))[0])
    writer.close()
    return " and ".join(sorted(dtypes))


def _describe(writer: gguf.GGUFWriter, text: dict[str, Any]) -> None:
    sections = text["rope_scaling"]["mrope_section"]
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_rope_freq_base(text["rope_theta"])
    writer.add_rope_dimension_sections([*sections, *[0] * (ROPE_SECTIONS - len(sections))])
    writer.add_vocab_size(text["vocab_size"])
    writer.add_tokenizer_model("none")


def _tensor(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(name)


def _as_written(tensor: torch.Tensor) -> tuple[NDArray[Any], gguf.GGMLQuantizationType]:
    if tensor.ndim == 1:  # llama.cpp adds norms and biases in float32 only
        tensor = tensor.float()
    array: NDArray[Any] = tensor.view(torch.int16).numpy() if tensor.dtype is torch.bfloat16 else tensor.numpy()
    return np.ascontiguousarray(array), TYPES[tensor.dtype]
