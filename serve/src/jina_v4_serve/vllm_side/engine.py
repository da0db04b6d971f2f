"""vLLM's engine as the API sees it: prompts in, arrays out. When a request is cancelled, its work is dropped."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.api.prompts import Prompt
from jina_v4_serve.api.record import current
from jina_v4_serve.api.request import EmbedRequest
from jina_v4_serve.api.vectors import Floats, NonFiniteError, Vectors
from jina_v4_serve.facts import PROJECTOR_DIM
from jina_v4_serve.pooling import PoolingRequest, Span
from jina_v4_serve.vllm_side.model import pooling_params


class VllmEngine:
    """Embeds the prompts of requests with vLLM's engine."""

    def __init__(self, client: Any, adapters: Mapping[str, Any], min_pixels: int) -> None:
        """Store vLLM's objects.

        Args:
            client: vLLM's `EngineClient`.
            adapters: vLLM's `LoRARequest` by task; empty if the adapters are folded into the weights.
            min_pixels: smaller images are scaled up to this area.
        """
        self.client = client
        self.adapters = adapters
        self.min_pixels = min_pixels
        self.n_waiting = 0  # prompts that the engine has not finished

    @property
    def dead(self) -> bool:
        """Whether the engine's process has ended or failed."""
        return bool(self.client.errored)

    async def embed(
        self, prompts: Sequence[Prompt], request_id: str, request: EmbedRequest, *, adapted: bool = True
    ) -> list[Vectors]:
        """Embed prompts, all at once; vLLM makes the batches.

        Args:
            prompts: the prompts of the request.
            request_id: for vLLM's log.
            request: its task, outputs, dimensions, max_pixels and priority are used.
            adapted: False leaves the adapter out, if it is not folded into the weights. Only the check at the start
                does so, to see that the adapter has an effect.

        Raises:
            NonFiniteError: a vector is not finite; no vector of the request is returned.
            ApiError: 400 for an image with more tokens than the longest prompt, 422 for one that cannot be loaded, 503
                when the engine dropped the request.
        """
        adapter = self.adapters[request.task] if self.adapters and adapted else None
        pooling = PoolingRequest(
            spans=None if "dense" in request.outputs else (),  # None: `_embed_one` finds each prompt's spans
            multivector="multivector" in request.outputs,
            dimensions=request.dimensions,
            task=request.task if self.adapters else None,
        )
        with current().stage("preprocessing"):
            rendered = self._render_texts(prompts)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._embed_one(prompt, rendered[i], f"{request_id}-{i}", pooling, request, adapter))
                for i, prompt in enumerate(prompts)
            ]
        return [task.result() for task in tasks]

    def _render_texts(self, prompts: Sequence[Prompt]) -> list[Mapping[str, Any] | None]:
        """Return vLLM's input for each text, and None for each image, which takes time and is rendered later."""
        texts = [{"prompt_token_ids": prompt.token_ids} for prompt in prompts if prompt.image is None]
        rendered = iter(self.client.renderer.render_cmpl(texts) if texts else ())
        return [next(rendered) if prompt.image is None else None for prompt in prompts]

    async def _render_image(self, prompt: Prompt, max_pixels: int | None) -> Mapping[str, Any]:
        """Have vLLM scale a picture and cut it into patches."""
        open_image: Any = prompt.image
        rendered: Mapping[str, Any]
        async with open_image() as picture:
            item: dict[str, Any] = {"prompt_token_ids": prompt.token_ids, "multi_modal_data": {"image": picture}}
            if max_pixels is not None:
                item["mm_processor_kwargs"] = {"min_pixels": self.min_pixels, "max_pixels": max_pixels}
            with current().stage("preprocessing"):
                (rendered,) = await self.client.renderer.render_cmpl_async([item])
        return rendered

    async def _embed_one(
        self,
        prompt: Prompt,
        engine_input: Mapping[str, Any] | None,
        request_id: str,
        pooling: PoolingRequest,
        request: EmbedRequest,
        adapter: Any,
    ) -> Vectors:
        if engine_input is None:
            engine_input = await self._render_image(prompt, request.max_pixels)
            self._check_length(len(engine_input["prompt_token_ids"]))
        if pooling.spans is None:
            pooling = replace(pooling, spans=_pooled_spans(prompt, engine_input))
        n_tokens = len(engine_input["prompt_token_ids"])
        final = None
        self.n_waiting += 1
        try:
            async for output in self.client.encode(
                engine_input,
                pooling_params(pooling),
                request_id,
                lora_request=adapter,
                trace_headers=current().trace_headers,
                priority=request.priority,
            ):
                final = output
        finally:
            self.n_waiting -= 1
        if final is None or getattr(final, "error", None) is not None:
            raise ApiError(503, "the engine dropped the request; send it again", code="ENGINE_FAILED", retry_after_s=1)
        values: Floats = final.outputs.data.float().numpy()
        if not np.isfinite(values).all():
            raise NonFiniteError(request_id)
        n_rows = n_tokens * PROJECTOR_DIM if pooling.multivector else 0
        n_spans = len(pooling.spans or ())
        width = pooling.dimensions or self.client.model_config.get_hidden_size()
        if len(values) != n_spans * width + n_rows:
            raise RuntimeError(f"the engine returned {len(values)} numbers; expected {n_spans * width + n_rows}")
        dense, rows = values[: n_spans * width], values[n_spans * width :]
        return Vectors(
            dense.reshape(n_spans, width),
            rows.reshape(-1, PROJECTOR_DIM),  # (n_tokens, 128)
            n_tokens,
        )

    def _check_length(self, n_tokens: int) -> None:
        """Refuse an image prompt that is too long for vLLM. Texts were checked when they were tokenised."""
        limit = self.client.model_config.max_model_len
        if n_tokens > limit:
            message = f"an image has {n_tokens} tokens; the limit is {limit}. Send a smaller one, or max_pixels"
            raise ApiError(400, message, code="INPUT_TOKEN_LIMIT_EXCEEDED")


def _pooled_spans(prompt: Prompt, engine_input: Mapping[str, Any]) -> tuple[Span, ...]:
    """Return the spans whose means are a prompt's dense vectors, as `pooling.pooled_span` finds them by token ids.

    Args:
        prompt: as the API made it.
        engine_input: vLLM's input for it, in which the image's one token is repeated.
    """
    if prompt.spans is not None:
        return prompt.spans
    if prompt.image is None:
        return (Span(0, len(engine_input["prompt_token_ids"])),)
    (place,) = engine_input["mm_placeholders"]["image"]
    return (Span(place.offset - 1, place.offset + place.length + 1),)  # with <|vision_start|> and <|vision_end|>
