"""Writing a language model as a GGUF file, some rows at a time: the `gguf` package writes what is before the values.

llama.cpp adds norms and biases in float32 only; the matrices have the dtype of `--dtype`. The vision tower is not in
the file: llama.cpp has it in a second one, made from a merged checkpoint by its own converter.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from gguf.quants import quant_shape_to_byte_shape, quantize

from jina_v4_merge.errors import ConfigError, LayoutError, WeightError, named
from jina_v4_merge.export.gguf_tokenizer import GgufTokenizer
from jina_v4_merge.files import FileDigest, HashedFile
from jina_v4_merge.reading.layout import Shape
from jina_v4_merge.reading.weights import out_of_range
from jina_v4_merge.work import Lane

_ARCH = gguf.MODEL_ARCH.QWEN2VL  # llama.cpp's name for the language model of Qwen2-VL and Qwen2.5-VL
# Settings of config.json that the file cannot hold, and the values that llama.cpp assumes.
_ASSUMED = {"rope_type": (None, "default", "mrope"), "hidden_act": (None, "silu"), "sliding_window": (False,)}
_ROPE_SECTIONS = 4  # llama.cpp keeps four, the model has three


@dataclass(frozen=True)
class _Encoding:
    """How values are written.

    Attributes:
        kind: GGUF's number for it.
        rounded: The dtype that values are rounded to first.
        largest: Of the values that can be written.
    """

    kind: GGMLQuantizationType
    rounded: torch.dtype
    largest: float

    def fits(self, rows: torch.Tensor) -> bool:
        """Say whether rounded values are finite and can be written."""
        # The extremes are NaN where any value is.
        return all(abs(extreme.item()) <= self.largest for extreme in torch.aminmax(rows))

    def n_bytes(self, shape: Shape) -> int:
        """Return the size of a tensor."""
        return math.prod(quant_shape_to_byte_shape(shape, self.kind))

    def content(self, rows: torch.Tensor) -> memoryview:
        """Return the bytes of rows that are rounded."""
        if self.kind is GGMLQuantizationType.Q8_0:
            rows = torch.from_numpy(quantize(rows.numpy(), self.kind))  # (n_rows, n_bytes)
        return rows.contiguous().view(torch.uint8).reshape(-1).numpy().data


def _plain(kind: GGMLQuantizationType, dtype: torch.dtype) -> _Encoding:
    return _Encoding(kind, dtype, torch.finfo(dtype).max)


_F32 = _plain(GGMLQuantizationType.F32, torch.float32)
_ENCODINGS = {
    "f32": _F32,
    "f16": _plain(GGMLQuantizationType.F16, torch.float16),
    "bf16": _plain(GGMLQuantizationType.BF16, torch.bfloat16),
    # A block's scale is a float16, and its largest value 127 times that.
    "q8_0": _Encoding(GGMLQuantizationType.Q8_0, torch.float32, 127 * torch.finfo(torch.float16).max),
}
_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}


class GgufFile:
    """A language model's file, planned from shapes and then written.

    Attributes:
        n_value_bytes: The size of all values; what is before them has some MB.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        tokenizer: GgufTokenizer,
        shapes: Mapping[str, Shape],
        dtype: str,
        about: Mapping[str, Any],
    ) -> None:
        """Plan the file.

        Args:
            config: The base's config.json.
            tokenizer: The base's.
            shapes: Of the tensors, by published name, in the order in which they will come.
            dtype: Of the matrices: one of `checkpoint.GGUF_DTYPES`.
            about: Further keys with their values: text, or a list of numbers.

        Raises:
            LayoutError: a tensor has no place in such a file.
            ConfigError: rows are not made of whole blocks, or the config lacks what llama.cpp needs.
        """
        self._text = config.get("text_config", config)
        # transformers 5's name, and the published one
        self._rope = {**self._text, **(self._text.get("rope_parameters") or self._text.get("rope_scaling") or {})}
        needed = ("max_position_embeddings", "rms_norm_eps", "rope_theta", "mrope_section")
        if absent := [key for key in needed if self._rope.get(key) is None]:
            raise ConfigError(f"config.json: {named(absent)} missing in text_config, which a GGUF file has to say")
        settings = {
            "rope_type": self._rope.get("rope_type", self._rope.get("type")),
            "hidden_act": self._text.get("hidden_act"),
            "sliding_window": bool(self._text.get("use_sliding_window")),
        }
        for key, value in settings.items():
            if value not in _ASSUMED[key]:
                raise ConfigError(f"config.json: {key} is {value!r}, which a GGUF file of this kind cannot say")
        self._tokenizer = tokenizer
        self._dtype = dtype
        self._about = about
        names = gguf.get_tensor_name_map(_ARCH, self._text["num_hidden_layers"])
        places = {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in shapes}
        if unknown := [name for name, place in places.items() if place is None]:
            raise LayoutError(f"no place in a GGUF file of {gguf.MODEL_ARCH_NAMES[_ARCH]}: {named(unknown)}")
        self._places = {name: str(place) for name, place in places.items()}
        self._shapes = dict(shapes)
        self._encodings = {name: _ENCODINGS[dtype] if len(shape) > 1 else _F32 for name, shape in shapes.items()}
        try:
            sizes = {name: self._encodings[name].n_bytes(shape) for name, shape in shapes.items()}
        except ValueError as error:
            raise ConfigError(f"{dtype} is not possible: {error}; choose --dtype f16, bf16 or f32") from error
        self._sizes = sizes
        self.n_value_bytes = sum(gguf.GGUFWriter.ggml_pad(size, gguf.GGUF_DEFAULT_ALIGNMENT) for size in sizes.values())

    def write(
        self,
        path: Path,
        blocks: Callable[[str, torch.dtype], Iterable[torch.Tensor]],
        damage: Callable[[str], WeightError | None] = lambda _: None,
    ) -> FileDigest:
        """Write the file through to the disk.

        Args:
            path: Must not be there.
            blocks: Yields the rows of a tensor, by its published name, some at a time, rounded to a dtype.
            damage: Returns the error if what a tensor is made from is damaged; called when a value cannot be written.

        Returns:
            Its digest.

        Raises:
            WeightError: a value does not fit the dtype, or what `damage` returns.
        """
        self._write_head(path)
        with closing(HashedFile(path)) as file:
            _pad(file)
            with Lane() as lane:
                for name, encoding in self._encodings.items():
                    for rows in blocks(name, encoding.rounded):
                        if not encoding.fits(rows):
                            raise damage(name) or out_of_range(name, self._dtype, "bf16, f32")
                        lane.do(partial(_append, file, encoding, rows))
                    lane.do(partial(_pad, file))
            return file.finish()

    def _write_head(self, path: Path) -> None:
        writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[_ARCH])
        self._describe(writer)
        self._describe_tokenizer(writer)
        for key, value in self._about.items():
            add = writer.add_string if isinstance(value, str) else writer.add_array
            add(key, value)
        for name, place in self._places.items():
            kind, shape = self._encodings[name].kind, self._shapes[name]
            writer.add_tensor_info(place, shape, np.dtype(np.float32), self._sizes[name], raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()

    def _describe(self, writer: gguf.GGUFWriter) -> None:
        text, sections = self._text, self._rope["mrope_section"]
        head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_file_type(_FILE_TYPES[self._dtype])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_context_length(text["max_position_embeddings"])
        writer.add_embedding_length(text["hidden_size"])
        writer.add_block_count(text["num_hidden_layers"])
        writer.add_feed_forward_length(text["intermediate_size"])
        writer.add_head_count(text["num_attention_heads"])
        writer.add_head_count_kv(text["num_key_value_heads"])
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
        writer.add_rope_freq_base(self._rope["rope_theta"])
        writer.add_rope_dimension_sections([*sections, *[0] * (_ROPE_SECTIONS - len(sections))])
        writer.add_vocab_size(text["vocab_size"])
        writer.add_pooling_type(gguf.PoolingType.MEAN)

    def _describe_tokenizer(self, writer: gguf.GGUFWriter) -> None:
        tokenizer = self._tokenizer
        writer.add_tokenizer_model("gpt2")  # llama.cpp's name for byte-level BPE
        writer.add_tokenizer_pre(tokenizer.words)
        writer.add_token_list(tokenizer.tokens)
        writer.add_token_types(tokenizer.types)
        writer.add_token_merges(tokenizer.merges)
        for name, add in (
            ("bos", writer.add_bos_token_id),
            ("eos", writer.add_eos_token_id),
            ("pad", writer.add_pad_token_id),
        ):
            if name in tokenizer.ids:
                add(tokenizer.ids[name])
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(False)


def _append(file: HashedFile, encoding: _Encoding, rows: torch.Tensor) -> None:
    file.write(encoding.content(rows))


def _pad(file: HashedFile) -> None:
    """Go on to where the next tensor may begin."""
    file.write(bytes(-file.size % gguf.GGUF_DEFAULT_ALIGNMENT))
