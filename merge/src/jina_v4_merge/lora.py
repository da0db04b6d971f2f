"""The maths of folding a LoRA adapter into a weight; no files here.

A linear layer with an adapter computes `x W' + scaling * (x A') B'`; the same layer without one computes it with
`W + scaling * (B @ A)` as its weight. The sum is taken in float64 and rounded to the output dtype. PyTorch rounds it to
float32 on the way: of 100,000 values, one of bfloat16 and six of float16 are the other neighbour of the sum.
"""

import torch


def fold(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, dtype: torch.dtype) -> torch.Tensor:
    """Return `weight + scaling * (b @ a)`, computed in float64, then rounded.

    Args:
        weight: (n_out, n_in), any float dtype; may be some rows of a weight, with `b` cut to the same rows.
        a: (rank, n_in), any float dtype.
        b: (n_out, rank), any float dtype.
        scaling: The factor on `b @ a`.
        dtype: Of the result.

    Returns:
        (n_out, n_in), `dtype`. Not finite where an input is not, or where the sum does not fit `dtype`.
    """
    return torch.addmm(weight.double(), b.double(), a.double(), alpha=scaling).to(dtype)
