"""The model plugin: vLLM's own Qwen2.5-VL with a pooler that gives final vectors.

This module, `cpu_kernels` and `cpu_lora` alone are on vLLM's internals.

Continuous batching, PagedAttention and the model itself are vLLM's. What is added: the pooler, which is right under
chunked prefill, and a limit on what a request may ask of the image processor.

It refuses prefix caching: cached tokens have no hidden states in this pass, and their share of the mean would be
missing without any error.
"""

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file
from vllm import PoolingParams
from vllm.config import VllmConfig
from vllm.model_executor.layers.pooler import Pooler, PoolingParamsUpdate
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.platforms import current_platform
from vllm.tasks import PoolingTask
from vllm.v1.outputs import PoolerOutput
from vllm.v1.pool.metadata import PoolingMetadata, PoolingStates

from jina_v4_serve import cpu_kernels
from jina_v4_serve.cpu_lora import use_grouped_products
from jina_v4_serve.memory import give_back_regularly
from jina_v4_serve.plugin import PROJECTORS
from jina_v4_serve.pooling import (
    Accumulator,
    Projector,
    Span,
    SpecialTokens,
    Wanted,
    advance,
    pooled_span,
    results,
)

PROJECTOR = "multi_vector_projector.safetensors"


class JinaPooler(Pooler):
    """Dense vectors and multi-vectors of a prompt from one pass; kept between steps are sums and projected rows."""

    def __init__(self, special: SpecialTokens, projectors: Mapping[str | None, Projector | None]) -> None:
        """Take the projectors.

        Args:
            special: the tokens that mark an image.
            projectors: one a task where the adapters of several are loaded; else the one of None.
        """
        super().__init__()
        self.special = special
        self.projectors = projectors
        # vLLM keeps one PoolingStates a request until the request ends: what is kept lives and dies with it.
        self.kept: WeakKeyDictionary[PoolingStates, Accumulator] = WeakKeyDictionary()

    def get_supported_tasks(self) -> Set[PoolingTask]:
        """Return vLLM's names of what this pooler gives."""
        return {"embed", "token_embed"}

    def get_pooling_updates(self, task: PoolingTask) -> PoolingParamsUpdate:  # noqa: ARG002 - vLLM's signature
        """Ask vLLM for the token ids of each prompt, which tell an image from a text."""
        return PoolingParamsUpdate(requires_token_ids=True)

    def forward(self, hidden_states: torch.Tensor, pooling_metadata: PoolingMetadata) -> PoolerOutput:
        """Take in one scheduling step; give the vectors of the requests that end with it.

        Args:
            hidden_states: shape (n_scheduled, hidden), the step's requests one after the other.
            pooling_metadata: vLLM's account of which rows belong to whom.

        Returns:
            For each request of the step None while it goes on, else what it asked for as one float32 tensor of one
            dimension: its dense vectors, then its multi-vector row by row (see `wanted`).
        """
        cursor = pooling_metadata.get_pooling_cursor()
        n_scheduled = cursor.num_scheduled_tokens_cpu.tolist()
        n_seen = cursor.seq_lens_cpu.tolist()
        n_total = cursor.prompt_lens_cpu.tolist()
        prompts = pooling_metadata.get_prompt_token_ids_cpu()

        states = pooling_metadata.pooling_states
        for i, state in enumerate(states):
            start = n_seen[i] - n_scheduled[i]
            if start == 0:  # also after a preemption, when vLLM computes a prompt anew
                asked = wanted(pooling_metadata.pooling_params[i])
                self.kept[state] = self._begin(asked, pooled_span(prompts[i], self.special), hidden_states)
            elif self.kept[state].position != start:
                raise RuntimeError(f"hidden states of tokens {self.kept[state].position} to {start} were not computed")
        advance([self.kept[state] for state in states], torch.split(hidden_states, n_scheduled))

        ended = [i for i in range(len(states)) if n_seen[i] == n_total[i]]
        outputs: list[torch.Tensor | None] = [None] * len(states)
        for i, output in zip(ended, results([self.kept.pop(states[i]) for i in ended]), strict=True):
            outputs[i] = output
        return outputs

    def _begin(self, asked: Wanted, published: Span, hidden_states: torch.Tensor) -> Accumulator:
        if asked.task in self.projectors:
            return Accumulator(asked, published, self.projectors[asked.task])
        # vLLM's warm-up names no task. What a request without one gives must never look like a vector: NaN is not sent.
        nan = torch.full_like(hidden_states[0], torch.nan, dtype=torch.float32)  # (hidden,)
        some = next(iter(self.projectors.values()))
        lost = Accumulator(asked, published, some and Projector(some.weight + nan, some.bias))
        lost.sums = [nan] * len(lost.spans)
        return lost


def wanted(params: PoolingParams) -> Wanted:
    """Read from vLLM's parameters what a request asks for.

    `embed` is the dense vector. `token_embed` is what `extra_kwargs` says (`pooling_params` writes it), and the
    multi-vector alone where it says nothing.
    """
    given = params.extra_kwargs or {}
    if params.task == "embed":
        return Wanted(dimensions=params.dimensions, task=given.get("task"))
    extra = {"spans": [], "multivector": True, **given}
    spans = extra["spans"]
    return Wanted(
        spans=None if spans is None else tuple(Span(*span) for span in spans),
        multivector=extra["multivector"],
        dimensions=params.dimensions,
        task=given.get("task"),
    )


def pooling_params(asked: Wanted) -> PoolingParams:
    """Write what a request asks for as vLLM's parameters; the reverse of `wanted`."""
    named = {} if asked.task is None else {"task": asked.task}
    if asked.spans is None and not asked.multivector:
        return PoolingParams(task="embed", dimensions=asked.dimensions, extra_kwargs=named or None)
    spans = None if asked.spans is None else [[span.start, span.stop] for span in asked.spans]
    extra = {"spans": spans, "multivector": asked.multivector, **named}
    return PoolingParams(task="token_embed", dimensions=asked.dimensions, extra_kwargs=extra)


def read_projector(folder: Path, device: torch.device) -> Projector | None:
    """Read the folded projector of a merged checkpoint; None where there is none."""
    path = folder / PROJECTOR
    if not path.is_file():
        return None
    tensors = load_file(path, device=str(device))
    weight, bias = (tensors[f"multi_vector_projector.{name}"].float() for name in ("weight", "bias"))
    return Projector(weight, bias)


class JinaProcessingInfo(Qwen2_5_VLProcessingInfo):
    """Qwen2.5-VL's image settings, with a ceiling on what one request may change."""

    def get_hf_processor(self, **kwargs: object) -> Any:
        """Return the image processor for a request's settings.

        Raises:
            ValueError: for a setting other than the two pixel limits, or one above the server's own. A larger image
                than the engine was sized for would wait for ever.
        """
        if kwargs:
            self._check_request(kwargs)
        return super().get_hf_processor(**kwargs)

    def _check_request(self, kwargs: Mapping[str, object]) -> None:
        if set(kwargs) != {"min_pixels", "max_pixels"}:
            raise ValueError(
                f"mm_processor_kwargs may hold min_pixels and max_pixels, always both; it holds {sorted(kwargs)}"
            )
        low, high = kwargs["min_pixels"], kwargs["max_pixels"]
        configured = self._merge_and_resolve_mm_processor_kwargs({}).get("images_kwargs", {})
        processor = super().get_hf_processor().image_processor
        ceiling = self._get_vision_size(configured, default_size=processor.size)["longest_edge"]
        if type(low) is not int or type(high) is not int or not 0 < low <= high <= ceiling:
            raise ValueError(
                f"min_pixels={low!r}, max_pixels={high!r} is not offered: whole numbers with"
                f" 0 < min_pixels <= max_pixels <= {ceiling}, which is this server's limit"
            )


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2_5_VLMultiModalProcessor, info=JinaProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class JinaEmbeddingsV4ForEmbedding(Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL as a pooling model."""

    is_pooling_model = True
    # What vLLM derives "chunked prefill works" from; the pooler below is what pools.
    default_seq_pooling_type = "LAST"
    default_tok_pooling_type = "ALL"
    attn_type = "decoder"
    score_type = "bi-encoder"

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Build vLLM's model and put the pooler on it.

        Raises:
            ValueError: when prefix caching is on, or the projector of an adapter's task is not there.
        """
        if vllm_config.cache_config.enable_prefix_caching:
            raise ValueError("prefix caching would leave cached tokens out of the mean; start without it")
        if current_platform.is_cpu():
            cpu_kernels.use()
            give_back_regularly()
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        special = SpecialTokens(
            image=config.image_token_id,
            vision_start=config.vision_start_token_id,
            vision_end=config.vision_end_token_id,
        )
        device = next(self.parameters()).device
        folders: Mapping[str, str] = getattr(config, PROJECTORS, {})  # of several tasks; the launcher put them there
        projectors: dict[str | None, Projector | None] = {
            task: read_projector(Path(folder), device) for task, folder in folders.items()
        }
        if None in projectors.values():
            raise ValueError(f"there is no {PROJECTOR} in one of {', '.join(folders.values())}")
        if not projectors:
            projectors = {None: read_projector(Path(vllm_config.model_config.model), device)}
        self.pooler = JinaPooler(special, projectors)
        if vllm_config.lora_config is not None:
            use_grouped_products()
