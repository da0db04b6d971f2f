"""A side that is no server, in a process of its own, so that its CPU time and memory are its own.

The protocol, over standard input and output: a line of JSON asks, a line of JSON answers. `load` brings the items,
`work` embeds them and tells how long it took, `vectors` gives what came out of it, as safetensors after the line.
"""

import argparse
import base64
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

Vectors = dict[str, list[NDArray[np.float32]]]  # "dense": each (hidden,); "multivector": each (n_tokens, 128)


class Embedder(Protocol):
    """What a side has to do."""

    about: dict[str, Any]

    def embed(self, kind: str, items: list[Any], output: str) -> Vectors:
        """Embed texts without prefix, or the bytes of image files."""
        ...


def make_embedder(side: str, options: argparse.Namespace) -> Embedder:
    """Load what a side needs.

    Args:
        side: its name.
        options: of the command line.
    """
    if side == "in_process":
        from _in_process import InProcess

        return InProcess(json.loads(options.arguments))
    if side == "sentence-transformers":
        from _transformers import SentenceTransformers

        return SentenceTransformers(options.checkpoint, options.dtype)
    if side == "llama.cpp":
        from _llama_cpp import LlamaCpp

        return LlamaCpp(options.checkpoint, options.dtype)
    from _transformers import Transformers

    return Transformers(options.checkpoint, options.dtype, batch_size=int(side.rpartition("-")[2]))


def pack(vectors: Vectors) -> bytes:
    """Write vectors as safetensors: rows one below the other, and how many each item has."""
    from safetensors.numpy import save

    tensors = {}
    for name, arrays in vectors.items():
        rows = [np.atleast_2d(array).astype(np.float32) for array in arrays]
        tensors[name] = np.ascontiguousarray(np.concatenate(rows))
        tensors[f"{name}.n_rows"] = np.array([len(array) for array in rows], np.int64)
    return save(tensors)


def unpack(content: bytes) -> Vectors:
    """Read what `pack` wrote."""
    from safetensors.numpy import load

    tensors = load(content)
    vectors: Vectors = {}
    for name in ("dense", "multivector"):
        if name in tensors:
            parts = np.split(tensors[name], np.cumsum(tensors[f"{name}.n_rows"])[:-1])
            vectors[name] = [part[0] for part in parts] if name == "dense" else list(parts)
    return vectors


def answer(embedder: Embedder, requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer until there are no more requests."""
    kind, items, vectors = "text", [], {}

    def say(content: bytes = b"", **fields: object) -> None:
        answers.write(json.dumps({**fields, "n_bytes": len(content)}).encode() + b"\n" + content)
        answers.flush()

    say(about=embedder.about)
    for line in requests:
        request = json.loads(line)
        if request["call"] == "load":
            kind, items = request["kind"], request["items"]
            if kind == "image":
                items = [base64.b64decode(item) for item in items]
            say()
        elif request["call"] == "work":
            begin = time.perf_counter()
            vectors = embedder.embed(kind, items, request["output"])
            say(wall_s=time.perf_counter() - begin)
        else:
            say(pack(vectors))


def main() -> None:
    """Load, then answer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("side")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--dtype", required=True, help="auto: the checkpoint's; in_process has its own in --arguments")
    parser.add_argument("--arguments", default="[]", help="JSON: of vLLM's serve, for in_process")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    answer(make_embedder(options.side, options), sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
