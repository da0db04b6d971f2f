"""The public name of :mod:`jina_v4_client.scoring.quantization`."""

from jina_v4_client.scoring.quantization import (
    BinaryVectors,
    Int8Vectors,
    hamming,
    quantize_binary,
    quantize_int8,
    search,
)

__all__ = ["BinaryVectors", "Int8Vectors", "hamming", "quantize_binary", "quantize_int8", "search"]
