"""Faster forms of layers that vLLM 0.32 computes slowly on x86: RMSNorm, rotary embeddings, the image attention.

vLLM has fused kernels for the first two but does not use them, and computes the image encoder's attention window by
window. Our layers are registered in vLLM's own way (`CustomOp.register_oot`), only in processes that serve our model.
A compiled model does not use them: there vLLM fuses its own layers. benchmarks/LOG.md has what they are worth.

Without AVX512_BF16 vLLM's fused kernels truncate results to bfloat16 instead of rounding them. The error is twice as
large on average, always towards zero, and the residual stream adds it up. There vLLM's own layers are kept.
"""

from collections.abc import Iterator
from itertools import groupby

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from vllm import _custom_ops as kernels
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding.common import ApplyRotaryEmb
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding


class FusedRMSNorm(RMSNorm):
    """RMSNorm in one pass over its input. With a residual it works in place, as on a GPU."""

    def forward_cpu(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Normalise; shapes (..., hidden)."""
        weight = self.weight.data
        fits = x.is_contiguous() and x.dtype == weight.dtype and self.variance_size_override is None
        if not fits or (residual is not None and not residual.is_contiguous()):
            return self.forward_native(x, residual)
        if residual is None:
            out = torch.empty_like(x)
            torch.ops._C.rms_norm(out, x, weight, self.variance_epsilon)
            return out
        torch.ops._C.fused_add_rms_norm(x, residual, weight, self.variance_epsilon)
        return x, residual


class FusedMRotaryEmbedding(MRotaryEmbedding):
    """The rotary embedding in place, by vLLM's kernel for plain positions, which gets a row of angles per token."""

    _step: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None  # positions, rows, angles of the last step

    def forward_cpu(
        self,
        positions: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor | None = None,
        offsets: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rotate queries and keys, shapes (n_tokens, n_heads * head_size), by positions (3, n_tokens)."""
        supported = positions.ndim == 2 and self.mrope_section is not None and not self.mrope_interleaved
        if not supported or key is None or offsets is not None:
            return self.forward_native(positions, query, key, offsets)
        cache = self._match_cos_sin_cache_dtype(query)  # (max_position, rotary_dim): cosines, then sines
        # One module serves all layers, and the positions of a step are the same in each.
        if self._step is None or self._step[2].dtype != query.dtype or not torch.equal(self._step[0], positions):
            self._step = (positions.clone(), *self._angles(positions, cache))
        _, rows, angles = self._step
        kernels.rotary_embedding(rows, query, key, self.head_size, angles, self.is_neox_style)
        return query, key

    def _angles(self, positions: torch.Tensor, cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a table of angles, shape (n_rows, rotary_dim), and before it each token's row in it, (n_tokens,)."""
        if torch.equal(positions, positions[:1].expand_as(positions)):  # texts only
            return positions[0].clone(), cache
        values = cache[positions].view(*positions.shape, 2, -1)  # (3, n_tokens, 2, rotary_dim / 2): cosines, sines
        parts = torch.split(values, self.mrope_section or [], dim=-1)  # the angles of each part of a position
        angles = torch.cat([part[i] for i, part in enumerate(parts)], dim=-1)  # (n_tokens, 2, rotary_dim / 2)
        return torch.arange(len(angles)), angles.flatten(1)


class FusedApplyRotaryEmb(ApplyRotaryEmb):
    """The rotary embedding of the image encoder, in place: its queries and keys are one new tensor."""

    def forward_cpu(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotate queries and keys, shape (2, n_patches, n_heads, head_size), by angles (n_patches, head_size / 2)."""
        if x.ndim != 4 or len(x) != 2 or not x.is_contiguous() or self.enable_fp32_compute:
            return self.forward_native(x, cos, sin)
        query, key = x.flatten(2)
        angles = torch.cat((cos, sin), dim=-1).to(x.dtype)
        kernels.rotary_embedding(torch.arange(len(angles)), query, key, x.shape[-1], angles, self.is_neox_style)
        return x


class BatchedEncoderAttention(MMEncoderAttention):
    """The image encoder's attention, with adjacent windows of equal length in one batch."""

    def forward_cpu(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: torch.Tensor | None = None,
        sequence_lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend within each sequence; shapes (1, n_patches, n_heads, head_size).

        `cu_seqlens` has where each window or image begins, and the end of the last.
        """
        if cu_seqlens is None or query.ndim != 4 or len(query) != 1 or self.num_heads != self.num_kv_heads:
            return super().forward_cpu(query, key, value, cu_seqlens, max_seqlen, sequence_lengths)
        outputs = []
        for length, n_neighbours, start in _neighbours((cu_seqlens[1:] - cu_seqlens[:-1]).tolist()):
            shape = (n_neighbours, length, *query.shape[2:])
            q, k, v = (
                x[0, start : start + n_neighbours * length].reshape(shape).transpose(1, 2) for x in (query, key, value)
            )  # (n_neighbours, n_heads, length, head_size)
            output = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
            outputs.append(output.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)[None]


def _neighbours(lengths: list[int]) -> Iterator[tuple[int, int, int]]:
    """Group adjacent sequences of equal length; yield their length, their number, and where the first begins."""
    start = 0
    for length, group in groupby(lengths):
        n_neighbours = len(list(group))
        if length:
            yield length, n_neighbours, start
        start += length * n_neighbours


def use(dtype: torch.dtype) -> None:
    """Use our layers in the model of this dtype that is built next, unless they are less exact than vLLM's own."""
    layers = LAYERS if fused_kernels_round(dtype) else {name: LAYERS[name] for name in LAYERS if name not in FUSED}
    for name, layer in layers.items():
        if name not in op_registry_oot:
            CustomOp.register_oot(layer, name=name)


def fused_kernels_round(dtype: torch.dtype) -> bool:
    """Tell whether vLLM has the fused kernels for this processor, and whether they round to nearest in a dtype."""
    if not all(hasattr(torch.ops._C, name) for name in ("rms_norm", "fused_add_rms_norm", "rotary_embedding")):
        return False
    step = torch.finfo(dtype).eps  # from 1 to the next number
    ones, total = torch.ones(16, dtype=dtype), torch.full((1, 16), 0.75 * step, dtype=dtype)
    torch.ops._C.fused_add_rms_norm(ones.clone()[None], total, ones, 1e-6)  # puts the sum into the second
    return bool((total == 1 + step).all())


LAYERS = {
    "RMSNorm": FusedRMSNorm,
    "MRotaryEmbedding": FusedMRotaryEmbedding,
    "ApplyRotaryEmb": FusedApplyRotaryEmb,
    "MMEncoderAttention": BatchedEncoderAttention,
}
FUSED = ("RMSNorm", "MRotaryEmbedding", "ApplyRotaryEmb")  # the layers that use vLLM's fused kernels
