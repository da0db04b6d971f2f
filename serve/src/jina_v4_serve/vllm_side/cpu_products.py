"""Matrix products on a CPU with few different numbers of rows.

oneDNN compiles a product for each number of rows and each shape of weights, and nearly every step of a server has
another number of tokens. On a processor with AMX compiling takes 2 to 9 times as long as the product itself, for up to
1,024 rows (benchmarks/LOG.md). So the rows are padded with zeros, at most 15 or a sixteenth: steps of 1 to 2,048 tokens
need 64 products of each shape.
"""

import torch
from vllm import _custom_ops as kernels

_plain, _scaled = kernels.onednn_mm, kernels.onednn_scaled_mm
Handler = kernels.CPUDNNLGEMMHandler  # holds packed weights, (k, n)


def n_computed(n_rows: int) -> int:
    """Return the number of rows after padding."""
    step = max(16, 1 << max(0, (n_rows - 1).bit_length() - 5))
    return -(-n_rows // step) * step


def plain(dnnl_handler: Handler, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply x, shape (..., k), by the weights; return shape (..., n)."""
    rows = x.reshape(-1, dnnl_handler.k)
    if _fits(rows):
        return _plain(dnnl_handler, x, bias)
    product = _plain(dnnl_handler, _padded(rows), bias)  # (n_computed, n)
    return product[: len(rows)].view(*x.shape[:-1], dnnl_handler.n)


def scaled(
    dnnl_handler: Handler,
    x: torch.Tensor,
    output: torch.Tensor,
    input_scale: torch.Tensor | None,
    input_zp: torch.Tensor | None,
    input_zp_adj: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Multiply int8, shape (n_rows, k), with a scale per row, by the weights into `output`, shape (n_rows, n)."""
    if _fits(x):
        return _scaled(dnnl_handler, x, output, input_scale, input_zp, input_zp_adj, bias)
    scale, zero_point = (
        _padded(one) if one is not None and one.shape == (len(x), 1) else one for one in (input_scale, input_zp)
    )
    product = output.new_empty(n_computed(len(x)), dnnl_handler.n)
    _scaled(dnnl_handler, _padded(x), product, scale, zero_point, input_zp_adj, bias)
    return output.copy_(product[: len(x)])


def _fits(rows: torch.Tensor) -> bool:
    return torch.compiler.is_compiling() or n_computed(len(rows)) == len(rows)


def _padded(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat((rows, rows.new_zeros(n_computed(len(rows)) - len(rows), rows.shape[1])))


def use() -> None:
    """Make vLLM's linear layers use these products in this process."""
    kernels.onednn_mm, kernels.onednn_scaled_mm = plain, scaled
