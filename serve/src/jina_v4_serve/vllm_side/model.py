"""The model plugin: vLLM's own Qwen2.5-VL with a pooler that returns final vectors.

Continuous batching, PagedAttention and the model itself are vLLM's. We add the pooler, which supports chunked prefill.

Prefix caching is refused: cached tokens have no hidden states in this pass, so they would silently be missing from the
mean.
"""

from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file
from vllm import PoolingParams
from vllm.config import VllmConfig
from vllm.model_executor.layers.pooler import Pooler, PoolingParamsUpdate
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.platforms import current_platform
from vllm.tasks import PoolingTask
from vllm.v1.outputs import PoolerOutput
from vllm.v1.pool.metadata import PoolingMetadata, PoolingStates

from jina_v4_serve import heartbeat
from jina_v4_serve.checkpoint import PROJECTOR
from jina_v4_serve.phases import reached
from jina_v4_serve.pooling import Accumulator, PoolingRequest, Projector, Span, SpecialTokens, advance, pooled_span
from jina_v4_serve.trimming import trim_regularly
from jina_v4_serve.vllm_side.plugin import PROJECTORS
from jina_v4_serve.vllm_side.versions import replacement


class UpdateBySpans(PoolingParamsUpdate):
    """Asks vLLM for the token ids of a prompt if its request has no spans.

    The API sends spans with every request. Without them (`vllm.LLM`) the ids show whether a prompt is an image or a
    text. They are costly: model runner V2 fills a matrix of requests x longest prompt in each step, which takes 71 ms
    for 512 texts beside one of 32,768 tokens.
    """

    def apply(self, params: PoolingParams) -> None:
        """Set on a request's parameters whether ids are needed."""
        params.requires_token_ids = read_params(params).spans is None


class JinaPooler(Pooler):
    """Makes dense vectors and multi-vectors in one pass. Between steps it keeps sums and projected rows of a prompt."""

    def __init__(self, special: SpecialTokens, projectors: Mapping[str | None, Projector | None]) -> None:
        """Store the projectors.

        Args:
            special: the tokens that mark an image.
            projectors: by task if the adapters of several tasks are loaded; else one, under None.
        """
        super().__init__()
        self.special = special
        self.projectors = projectors
        # vLLM keeps one PoolingStates per request until the request ends; the accumulator is freed with it.
        self.kept: WeakKeyDictionary[PoolingStates, Accumulator] = WeakKeyDictionary()
        self.heartbeat = heartbeat.find()

    def get_supported_tasks(self) -> Set[PoolingTask]:
        """Return vLLM's names of the outputs of this pooler."""
        return {"embed", "token_embed"}

    def get_pooling_updates(self, task: PoolingTask) -> PoolingParamsUpdate:  # noqa: ARG002 - vLLM's signature
        """Return the change that vLLM must make to a request's parameters."""
        return UpdateBySpans()

    def forward(self, hidden_states: torch.Tensor, pooling_metadata: PoolingMetadata) -> PoolerOutput:
        """Add one scheduling step; return the vectors of the requests that it completes.

        Args:
            hidden_states: shape (n_scheduled, hidden), the step's requests one after the other.
            pooling_metadata: which rows belong to which request.

        Returns:
            For each complete request one flat float32 tensor: its dense vectors, then its multi-vector row by row. For
            the other requests of the step None.
        """
        cursor = pooling_metadata.get_pooling_cursor()
        n_scheduled: list[int] = cursor.num_scheduled_tokens_cpu.tolist()
        n_seen = cursor.seq_lens_cpu.tolist()
        n_total = cursor.prompt_lens_cpu.tolist()
        states = pooling_metadata.pooling_states
        accumulators = []
        for i, state in enumerate(states):
            start = n_seen[i] - n_scheduled[i]
            if start == 0:  # also after a preemption, when vLLM computes a prompt again
                accumulators.append(self._begin(i, n_total[i], pooling_metadata, hidden_states))
            else:
                accumulators.append(self.kept[state])
                if accumulators[i].position != start:
                    raise RuntimeError(
                        f"hidden states of tokens {accumulators[i].position} to {start} were not computed"
                    )
        outputs = advance(accumulators, hidden_states, n_scheduled)
        for state, accumulator, output in zip(states, accumulators, outputs, strict=True):
            if output is None:
                self.kept[state] = accumulator
        if self.heartbeat is not None:
            self.heartbeat.beat()
        return outputs

    def _begin(self, i: int, n_tokens: int, metadata: PoolingMetadata, hidden_states: torch.Tensor) -> Accumulator:
        request = read_params(metadata.pooling_params[i])
        if request.spans is None:
            span = pooled_span(metadata.get_prompt_token_ids_cpu()[i], self.special)
            request = replace(request, spans=(span,))
        if request.task in self.projectors:
            return Accumulator(request, n_tokens, self.projectors[request.task])
        # vLLM's warm-up has no task. A request without a task must not get a valid vector: NaN is never sent.
        nan = torch.full_like(hidden_states[0], torch.nan, dtype=torch.float32)  # (hidden,)
        some = next(iter(self.projectors.values()))
        invalid = Accumulator(request, n_tokens, some and Projector(some.weight + nan, some.bias))
        invalid.sums = nan.expand(len(invalid.spans), -1)  # (n_spans, hidden)
        return invalid


def read_params(params: PoolingParams) -> PoolingRequest:
    """Read the outputs of a request from vLLM's parameters.

    vLLM's task `embed` is the dense vector, `token_embed` the multi-vector. `extra_kwargs`, as `pooling_params` writes
    it, has the rest.
    """
    extra = params.extra_kwargs or {}
    is_embed = params.task == "embed"
    spans = extra.get("spans", None if is_embed else ())
    return PoolingRequest(
        None if spans is None else tuple(Span(*span) for span in spans),
        extra.get("multivector", not is_embed),
        extra.get("dimensions", params.dimensions),
        extra.get("task"),
    )


def pooling_params(request: PoolingRequest) -> PoolingParams:
    """Write the outputs of a request as vLLM's parameters; the reverse of `read_params`.

    vLLM's own `dimensions` allows only the sizes that the checkpoint lists.
    """
    spans = None if request.spans is None else [[span.start, span.stop] for span in request.spans]
    extra: dict[str, object] = {"spans": spans}
    if request.dimensions is not None:
        extra["dimensions"] = request.dimensions
    if request.task is not None:
        extra["task"] = request.task
    return PoolingParams(task="token_embed" if request.multivector else "embed", extra_kwargs=extra)


def read_projector(folder: Path, device: torch.device) -> Projector:
    """Read the folded projector of a merged checkpoint or an adapter."""
    tensors = load_file(folder / PROJECTOR)
    # For torch "cuda" is the GPU of this worker; for safetensors it is the first GPU.
    weight, bias = (tensors[f"multi_vector_projector.{name}"].to(device, torch.float32) for name in ("weight", "bias"))
    return Projector(weight, bias)


class JinaEmbeddingsV4ForEmbedding(Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL as a pooling model."""

    is_pooling_model = True
    # These tell vLLM that chunked prefill works; they do not pool, our pooler does.
    default_seq_pooling_type = "LAST"
    default_tok_pooling_type = "ALL"
    attn_type = "decoder"
    score_type = "bi-encoder"

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Build vLLM's model and add the pooler.

        Raises:
            ValueError: when prefix caching is on.
        """
        reached("engine started")
        if vllm_config.cache_config.enable_prefix_caching:
            raise ValueError("prefix caching would leave cached tokens out of the mean; start without it")
        if current_platform.is_cpu():
            if kernels := replacement("cpu_kernels"):
                kernels.use(torch.get_default_dtype())  # vLLM sets the model's while it is built
            if products := replacement("cpu_products"):
                products.use()
            trim_regularly()
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        special = SpecialTokens(
            image=config.image_token_id,
            vision_start=config.vision_start_token_id,
            vision_end=config.vision_end_token_id,
        )
        # Not the device of a parameter: parameters that are quantized while they are loaded have none yet.
        device = torch.device(vllm_config.device_config.device_type)
        # For several tasks the launcher has put the folders of the projectors into the config.
        folders: Mapping[str | None, str] = getattr(config, PROJECTORS, {}) or {None: vllm_config.model_config.model}
        projectors = {task: read_projector(Path(folder), device) for task, folder in folders.items()}
        self.pooler = JinaPooler(special, projectors)
        if vllm_config.lora_config is not None and current_platform.is_cpu() and (lora := replacement("cpu_lora")):
            lora.use_grouped_products()

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[torch.Tensor, int]:
        """Return the positions of a prompt, shape (3, n_tokens), and 0: what decoding adds to them.

        The three positions of a text's token are one. vLLM's way to find that out costs a tenth of a short text's time
        in the engine.
        """
        if mm_features:
            positions, delta = super().get_mrope_input_positions(input_tokens, mm_features)
            return positions, delta
        return torch.arange(len(input_tokens)).expand(3, -1), 0

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """Load the weights, and report the end of this phase."""
        loaded = super().load_weights(weights)
        reached("weights loaded")
        return loaded
