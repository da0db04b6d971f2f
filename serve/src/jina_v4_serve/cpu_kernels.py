"""vLLM's fused CPU kernels, where it leaves them unused: RMSNorm, and the rotary embedding of three-part positions.

vLLM 0.32 has both kernels for x86 and computes both layers with unfused torch operations there. They are put in by its
own way for layers from outside (`CustomOp.register_oot`), and only in a process that serves our model. Compiled, vLLM
takes the unfused form and fuses it by itself. benchmarks/LOG.md has what they are worth.
"""

import torch
from vllm import _custom_ops as kernels
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding


class FusedRMSNorm(RMSNorm):
    """RMSNorm in one pass over its input; the sum with a residual takes the place of both, as it does on a GPU."""

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
    """The rotary embedding in place, by the kernel for positions of one part: it gets a row of angles a token."""

    def forward_cpu(
        self,
        positions: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor | None = None,
        offsets: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Turn queries and keys, shapes (n_tokens, n_heads * head_size), by positions (3, n_tokens)."""
        sections = self.mrope_section  # how many angles follow each part of a position
        if positions.ndim != 2 or sections is None or self.mrope_interleaved or key is None or offsets is not None:
            return self.forward_native(positions, query, key, offsets)
        cache = self._match_cos_sin_cache_dtype(query)  # (max_position, rotary_dim): cosines, then sines
        bounds = [0]
        for width in sections:
            bounds.append(bounds[-1] + width)
        angles = torch.cat(
            [
                cache[part, half + start : half + stop]
                for half in (0, self.rotary_dim // 2)
                for part, start, stop in zip(positions, bounds, bounds[1:], strict=False)
            ],
            dim=-1,
        )  # (n_tokens, rotary_dim)
        rows = torch.arange(len(angles))
        kernels.rotary_embedding(rows, query, key, self.head_size, angles, self.is_neox_style)
        return query, key


def use() -> None:
    """Have the layers of the model that is built next be these; nothing where vLLM was built without the kernels."""
    if not all(hasattr(torch.ops._C, name) for name in ("rms_norm", "fused_add_rms_norm", "rotary_embedding")):
        return
    for name, layer in {"RMSNorm": FusedRMSNorm, "MRotaryEmbedding": FusedMRotaryEmbedding}.items():
        if name not in op_registry_oot:
            CustomOp.register_oot(layer, name=name)
