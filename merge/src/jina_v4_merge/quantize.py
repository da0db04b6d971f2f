"""The maths of half the weights: a matrix as int8 or fp8 with a scale a row; no files here.

`weight[i, j] = values[i, j] * scales[i]`. A row's scale is its largest magnitude divided by the largest value of the
type, so that nothing is cut off. It is rounded to float32 first, and the row is divided by what is stored. The quotient
is taken in float64 and rounded once, a half to the even neighbour.
"""

import math
from typing import Any

import torch

# What a matrix can be written as.
KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
SCALE_DTYPE = torch.float32

_SCALE = "_scale"
_LARGEST = {"int8": 127.0, "fp8": 448.0}
_TYPE = {"int8": "int", "fp8": "float"}
# In float32, the bits that are 0 in the middle of any two neighbours in float8_e4m3fn, whose fraction has 3 of 23 bits.
_BELOW_MIDDLES = (1 << 19) - 1


def scale_name(name: str) -> str:
    """Return the name of the scales that belong to a quantized weight."""
    return name + _SCALE


def weight_name(name: str) -> str:
    """Return the name of the weight that scales belong to; any other name as it is."""
    return name.removesuffix(_SCALE)


def quantize(rows: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows as values of a small type, and a scale for each row.

    Args:
        rows: (n_rows, n_in), float64.
        kind: One of `KINDS`.

    Returns:
        Values (n_rows, n_in) of the type, and scales (n_rows, 1), float32. A scale is not finite where a value of its
        row is not, or where the row does not fit float32.
    """
    # The least normal number stands for 0, which a row of zeros would be divided by.
    largest = rows.abs().amax(1, keepdim=True) / _LARGEST[kind]  # (n_rows, 1)
    scales = largest.to(SCALE_DTYPE).clamp_min(torch.finfo(SCALE_DTYPE).tiny)
    quotients = rows / scales.double()  # (n_rows, n_in)
    return (quotients.round_().to(torch.int8) if kind == "int8" else round_to_fp8(quotients)), scales


def round_to_fp8(numbers: torch.Tensor) -> torch.Tensor:
    """Return float64 numbers of magnitude 448 at most as float8_e4m3fn, rounded once, a half to the even neighbour.

    PyTorch rounds to float32 first. A number beside the middle of two neighbours may become that middle, and then the
    wrong neighbour: one of 500,000 random numbers did. So what became a middle is moved to the side that it came from.
    """
    single = numbers.float()
    suspect = ((single.view(torch.int32) & _BELOW_MIDDLES) == 0).nonzero(as_tuple=True)
    rounded = single[suspect]
    off = numbers[suspect] - rounded.double()
    single[suspect] = torch.nextafter(rounded, torch.where(off == 0, rounded, (off * math.inf).float()))
    return single.to(torch.float8_e4m3fn)


def dequantize(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return what values and scales stand for, (n_rows, n_in) in float32.

    Args:
        values: (n_rows, n_in) of a type of `KINDS`.
        scales: (n_rows, 1), float32.
    """
    return values.float() * scales


def quantization_config(kind: str) -> dict[str, Any]:
    """Return what a config.json says of the weights, in the format of compressed-tensors, which vLLM reads.

    The language model's linear layers are quantized, and at run time their inputs, with a scale for each token. The
    vision tower is left out by its name, which differs by loader.
    """
    common = {"num_bits": 8, "type": _TYPE[kind], "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{_TYPE[kind]}-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": common | {"strategy": "channel", "dynamic": False},
                "input_activations": common | {"strategy": "token", "dynamic": True},
            }
        },
        "ignore": ["lm_head", r"re:.*visual\..*"],
    }
