"""Adapters on a CPU: two matrix products per adapter for all tokens, instead of a copy of the adapter for every token.

vLLM's own code for a CPU (`torch_ops`) gathers each token's A and B into a float32 tensor of (n_tokens, rank, n_in). At
the published sizes that is 2.9 GB for one layer's up projection and a step of 2,048 tokens, written and read again, in
252 layers. It also applies the last adapter to tokens without an adapter, if other tokens of the step have one. There
are few adapters here, so each multiplies all tokens. On a GPU vLLM's own kernels are used.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform


class GroupedProducts(PunicaWrapperCPU):
    """vLLM's adapters on a CPU, with two matrix products per adapter for all tokens of a linear layer.

    Between the products, the rows of other adapters' tokens are set to zero. That is more arithmetic than needed, but
    little compared with the layer's own, and no row is moved.

    Attributes:
        used: the adapters of this step: the index of each among the loaded ones, and its tokens as float32 of shape
            (n_tokens, 1), 1 for the tokens of this adapter, else 0.
    """

    used: Sequence[tuple[int, torch.Tensor]] = ()

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Note which adapter each token of a step has."""
        super().update_metadata(*args, **kwargs)
        slots = self.token_lora_indices[:, None]  # (n_tokens, 1), -1 for no adapter
        self.used = [(slot, (slots == slot).float()) for slot in sorted(set(slots.flatten().tolist()) - {-1})]

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,  # noqa: ARG002 - vLLM's signature
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Add the contribution of its adapter to each token's output.

        Args:
            y: shape (..., sum of `output_slices`), changed in place.
            x: shape (..., n_in).
            lora_a_stacked: for each slice shape (n_adapters, 1, rank, n_in).
            lora_b_stacked: for each slice shape (n_adapters, 1, n_out, rank); it includes the scaling of the adapter.
            scale: multiplies the product.
            output_slices: n_out of each slice.
            buffer: not needed.
            kwargs: not needed.
        """
        inputs = x.view(-1, x.shape[-1]).float()  # between A and B all is float32, as in vLLM's other kernels
        parts = torch.split(y.view(-1, y.shape[-1]), list(output_slices), dim=1)
        for slot, own in self.used:
            for part, a, b in zip(parts, lora_a_stacked, lora_b_stacked, strict=True):
                between = scale * own * F.linear(inputs, a[slot, 0].float())  # (n_tokens, rank)
                part.addmm_(between.to(part.dtype), b[slot, 0].T.to(part.dtype))


def use_grouped_products() -> None:
    """Make vLLM use `GroupedProducts` in this process."""
    name = f"{__name__}.{GroupedProducts.__name__}"
    current_platform.get_punica_wrapper = lambda: name  # type: ignore[method-assign]
