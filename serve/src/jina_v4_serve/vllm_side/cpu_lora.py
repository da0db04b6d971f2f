"""Adapters on a CPU: two products an adapter for all tokens, in place of a copy of the adapter for every token.

vLLM's own way on a CPU (`torch_ops`) gathers each token's A and B into a tensor of (n_tokens, rank, n_in) in float32:
at the published sizes 2.9 GB for one layer's up projection and a step of 2,048 tokens, written and read again, 252
layers in all. It also gives tokens without an adapter the last one's, where others of the step have one. Adapters are
few here, so each goes over all tokens. On a GPU vLLM has kernels of its own, and nothing is changed.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform


class GroupedProducts(PunicaWrapperCPU):
    """vLLM's adapters on a CPU, with two products an adapter for all tokens of a linear layer.

    What an adapter's A makes of a token that is not its own is zero before B sums up: more arithmetic than is needed,
    still little beside the layer's own, and no row is moved.

    Attributes:
        used: of this step: the place of an adapter among those that are loaded, and its tokens: float32, shape
            (n_tokens, 1), 1 where the token is its own, else 0.
    """

    used: Sequence[tuple[int, torch.Tensor]] = ()

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Take in which token of a step is whose."""
        super().update_metadata(*args, **kwargs)
        slots = self.token_lora_indices[:, None]  # (n_tokens, 1), -1 for none
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
        """Add to each token's outputs what its adapter adds.

        Args:
            y: shape (..., sum of `output_slices`), changed in place.
            x: shape (..., n_in).
            lora_a_stacked: for each slice shape (n_adapters, 1, rank, n_in).
            lora_b_stacked: for each slice shape (n_adapters, 1, n_out, rank); the scaling of the adapter is in it.
            scale: on the product.
            output_slices: n_out of each slice.
            buffer: not needed.
            kwargs: not needed.
        """
        inputs = x.view(-1, x.shape[-1]).float()  # what lies between A and B is float32, as in vLLM's other kernels
        parts = torch.split(y.view(-1, y.shape[-1]), list(output_slices), dim=1)
        for slot, own in self.used:
            for part, a, b in zip(parts, lora_a_stacked, lora_b_stacked, strict=True):
                between = scale * own * F.linear(inputs, a[slot, 0].float())  # (n_tokens, rank)
                part.addmm_(between.to(part.dtype), b[slot, 0].T.to(part.dtype))


def use_grouped_products() -> None:
    """Have vLLM use them in this process."""
    name = f"{__name__}.{GroupedProducts.__name__}"
    current_platform.get_punica_wrapper = lambda: name  # type: ignore[method-assign]
