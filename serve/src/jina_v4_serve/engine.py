"""The model plugin: vLLM's own Qwen2.5-VL with a pooler that gives final vectors. The one module on vLLM's internals.

Continuous batching, PagedAttention and the model itself are vLLM's. What is added: the pooler, which is right under
chunked prefill, and a limit on what a request may ask of the image processor.

It refuses prefix caching: cached tokens have no hidden states in this pass, and their share of the mean would be
missing without any error.
"""

from collections.abc import Mapping, Set
from typing import Any
from weakref import WeakKeyDictionary

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.pooler import DispatchPooler, Pooler, PoolingParamsUpdate
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.tasks import PoolingTask
from vllm.v1.outputs import PoolerOutput
from vllm.v1.pool.metadata import PoolingMetadata, PoolingStates

from jina_v4_serve.pooling import RunningSum, SpecialTokens, dense_vectors, pooled_span


class DensePooler(Pooler):
    """Mean over the text or the vision span, Matryoshka cut, unit length; nothing kept between steps but sums."""

    def __init__(self, special: SpecialTokens) -> None:
        super().__init__()
        self.special = special
        # vLLM keeps one PoolingStates a request until the request ends: the sums live and die with it.
        self.sums: WeakKeyDictionary[PoolingStates, RunningSum] = WeakKeyDictionary()

    def get_supported_tasks(self) -> Set[PoolingTask]:
        """Return vLLM's names of what this pooler gives."""
        return {"embed"}

    def get_pooling_updates(self, task: PoolingTask) -> PoolingParamsUpdate:  # noqa: ARG002 - vLLM's signature
        """Ask vLLM for the token ids of each prompt, which tell an image from a text."""
        return PoolingParamsUpdate(requires_token_ids=True)

    def forward(self, hidden_states: torch.Tensor, pooling_metadata: PoolingMetadata) -> PoolerOutput:
        """Take in one scheduling step; give the vectors of the requests that end with it.

        Args:
            hidden_states: shape (n_scheduled, hidden), the step's requests one after the other.
            pooling_metadata: vLLM's account of which rows belong to whom.

        Returns:
            For each request of the step its vector, float32, shape (dimensions,), or None while it goes on.
        """
        cursor = pooling_metadata.get_pooling_cursor()
        n_scheduled = cursor.num_scheduled_tokens_cpu.tolist()
        n_seen = cursor.seq_lens_cpu.tolist()
        n_total = cursor.prompt_lens_cpu.tolist()
        prompts = pooling_metadata.get_prompt_token_ids_cpu()

        finished: list[int] = []
        for i, rows in enumerate(torch.split(hidden_states, n_scheduled)):
            state = pooling_metadata.pooling_states[i]
            start = n_seen[i] - n_scheduled[i]
            if start == 0:  # also after a preemption, when vLLM computes a prompt anew
                self.sums[state] = RunningSum(pooled_span(prompts[i], self.special))
            running = self.sums[state]
            if running.position != start:
                raise RuntimeError(f"hidden states of tokens {running.position} to {start} were not computed")
            running.add(rows)
            if n_seen[i] == n_total[i]:
                finished.append(i)

        vectors: list[torch.Tensor | None] = [None] * len(n_total)
        if finished:
            means = [self.sums.pop(pooling_metadata.pooling_states[i]).mean() for i in finished]
            dimensions = [pooling_metadata.pooling_params[i].dimensions for i in finished]
            for i, vector in zip(finished, dense_vectors(means, dimensions), strict=True):
                vectors[i] = vector
        return vectors


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
            ValueError: when prefix caching is on.
        """
        if vllm_config.cache_config.enable_prefix_caching:
            raise ValueError("prefix caching would leave cached tokens out of the mean; start without it")
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        special = SpecialTokens(
            image=config.image_token_id,
            vision_start=config.vision_start_token_id,
            vision_end=config.vision_end_token_id,
        )
        self.pooler = DispatchPooler({"embed": DensePooler(special)})
