"""llama.cpp by its Python bindings: the checkpoint as GGUF, texts packed into batches, mean pooling in its engine.

`Llama.embed` takes one text after the other to its tokenizer. So that all sides have one tokenizer, token ids go to the
functions beneath it, in the way it calls them. Images would need the vision tower as a second file; they are left out.
"""

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from _child import Vectors
from _data import PREFIX
from jina_v4_merge.export.gguf_file import GgufFile
from jina_v4_merge.export.gguf_tokenizer import gguf_tokenizer
from jina_v4_merge.files import read_json
from jina_v4_merge.reading.configs import small_files
from jina_v4_merge.reading.layout import is_language_model
from jina_v4_merge.reading.weights import base_tensors
from numpy.typing import NDArray
from tokenizers import Tokenizer

BATCH_TOKENS = 512  # computed in one go, unless a text is longer; llama.cpp's own default, more was slower here
MOST_SEQUENCES = 32
DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


class LlamaCpp:
    """The folded checkpoint in llama.cpp; texts only, dense only."""

    def __init__(self, checkpoint: Path, dtype: str = "auto") -> None:
        """Write the GGUF file and load it, onto the GPU where the bindings were built for one."""
        llama_cpp.llama_backend_init()
        self.tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        with tempfile.TemporaryDirectory() as folder:  # once loaded it stays mapped
            path = Path(folder) / "model.gguf"
            dtype = write_gguf(checkpoint, path, dtype)
            self.model = llama_cpp.llama_model_load_from_file(
                str(path).encode(), llama_cpp.llama_model_default_params()
            )
        if not self.model:
            raise RuntimeError("llama.cpp does not load the file")
        self.hidden = llama_cpp.llama_model_n_embd(self.model)
        self.n_threads = len(os.sched_getaffinity(0))
        self._make_context(BATCH_TOKENS)
        self.about = {"dtype": dtype, "n_threads": self.n_threads, "batch_tokens": BATCH_TOKENS}

    def embed(self, kind: str, items: list[Any], output: str) -> Vectors:
        """Embed texts in the order given, as many at a time as fit into a batch."""
        if (kind, output) != ("text", "dense"):
            raise ValueError(f"{output} of {kind} is not offered")
        prompts = [
            encoded.ids
            for encoded in self.tokenizer.encode_batch([PREFIX + item for item in items], add_special_tokens=False)
        ]
        longest = max(len(prompt) for prompt in prompts)
        if longest > self.n_batch:
            self._make_context(longest)
        return {"dense": [vector for batch in packed(prompts) for vector in self._decode(batch)]}

    def _make_context(self, n_batch: int) -> None:
        """Make room for batches of so many tokens: a sequence that is pooled has to be in one."""
        # llama.cpp ends the process (ggml_can_mul_mat) where this is no multiple of the sequences.
        self.n_batch = math.ceil(n_batch / MOST_SEQUENCES) * MOST_SEQUENCES
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = self.n_batch
        params.n_seq_max = MOST_SEQUENCES
        params.n_threads = params.n_threads_batch = self.n_threads
        params.embeddings = True
        params.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_MEAN
        params.kv_unified = True  # else each sequence would get an equal part of the room
        if getattr(self, "context", None):
            llama_cpp.llama_free(self.context)
            llama_cpp.llama_batch_free(self.batch)
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp has no room for {self.n_batch} tokens")
        self.batch = llama_cpp.llama_batch_init(self.n_batch, 0, 1)

    def _decode(self, prompts: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Compute prompts together, each a sequence of its own."""
        batch, n_tokens = self.batch, 0
        for sequence, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                batch.token[n_tokens] = token
                batch.pos[n_tokens] = position
                batch.n_seq_id[n_tokens] = 1
                batch.seq_id[n_tokens][0] = sequence
                batch.logits[n_tokens] = 1
                n_tokens += 1
        batch.n_tokens = n_tokens
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        if status := llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        return [self._pooled(sequence) for sequence in range(len(prompts))]

    def _pooled(self, sequence: int) -> NDArray[np.float32]:
        pointer = llama_cpp.llama_get_embeddings_seq(self.context, sequence)
        vector = np.ctypeslib.as_array(pointer, (self.hidden,)).copy()  # the mean over all tokens
        return vector / np.linalg.norm(vector)  # (hidden,)


def write_gguf(checkpoint: Path, path: Path, dtype: str = "auto") -> str:
    """Write a merged checkpoint's language model as a GGUF file.

    Args:
        checkpoint: of any task.
        path: of the file, which must not be there.
        dtype: "auto" is the checkpoint's own.

    Returns:
        The dtype.
    """
    config = read_json(checkpoint / "config.json")
    dtype = read_json(checkpoint / "manifest.json")["dtype"] if dtype == "auto" else dtype
    tensors = {name: tensor for name, tensor in base_tensors(checkpoint).items() if is_language_model(name)}
    tokenizer = gguf_tokenizer(checkpoint / "tokenizer.json", small_files(checkpoint), config)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    file = GgufFile(config, tokenizer, shapes, DTYPES[dtype], {})
    file.write(path, lambda name, rounded: (block.to(rounded) for _, block in tensors[name].row_blocks()))
    return dtype


def packed(prompts: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    """Put prompts into batches, in their order."""
    batches: list[list[Sequence[int]]] = []
    n_tokens = 0
    for prompt in prompts:
        n_tokens += len(prompt)
        if not batches or len(batches[-1]) == MOST_SEQUENCES or n_tokens > BATCH_TOKENS:
            batches.append([])
            n_tokens = len(prompt)
        batches[-1].append(prompt)
    return batches
