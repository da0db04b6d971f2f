"""Through the engine: prompts in, arrays out. Work of a request that ends early is dropped from the engine."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.api.prompts import Prompt
from jina_v4_serve.api.record import current
from jina_v4_serve.api.request import FIRST
from jina_v4_serve.api.vectors import Floats, NonFiniteError, Vectors
from jina_v4_serve.facts import PROJECTOR_DIM
from jina_v4_serve.pooling import PoolingRequest, Span
from jina_v4_serve.vllm_side.model import pooling_params


class VllmEngine:
    """vLLM's engine, as the API sees it."""

    def __init__(self, client: Any, adapters: Mapping[str, Any], min_pixels: int) -> None:
        """Keep vLLM's objects.

        Args:
            client: its `EngineClient`.
            adapters: its `LoRARequest` of each task; none where the adapters are in the weights.
            min_pixels: smaller images are scaled up to so many.
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
        self,
        prompts: Sequence[Prompt],
        request_id: str,
        *,
        task: str,
        dense: bool,
        multivector: bool,
        dimensions: int | None,
        max_pixels: int | None,
        priority: int = FIRST,
        adapted: bool = True,
    ) -> list[Vectors]:
        """Embed prompts, all at once; vLLM makes the batches.

        Args:
            prompts: of one request.
            request_id: for vLLM's log.
            task: whose adapter and projector to use.
            dense: whether dense vectors are returned.
            multivector: whether multi-vectors are returned.
            dimensions: of dense vectors; None for all.
            max_pixels: images are scaled down to so many; None is the checkpoint's own limit.
            priority: what waits is computed in this order.
            adapted: False leaves out an adapter that is not in the weights; only to see that it does something.

        Raises:
            NonFiniteError: a vector is not finite; none is given.
            ApiError: 400 for an image that is longer than the longest prompt, 422 for one that cannot be loaded, 503
                when the engine dropped the request.
        """
        adapter = self.adapters[task] if self.adapters and adapted else None
        # None is the published span, which each prompt's own makes exact.
        pooling = PoolingRequest(None if dense else (), multivector, dimensions, task if self.adapters else None)
        with current().stage("preprocessing"):
            rendered = self._render_texts(prompts)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(
                    self._embed_one(prompt, rendered[i], f"{request_id}-{i}", pooling, max_pixels, adapter, priority)
                )
                for i, prompt in enumerate(prompts)
            ]
        return [task.result() for task in tasks]

    def _render_texts(self, prompts: Sequence[Prompt]) -> list[Mapping[str, Any] | None]:
        """Return what vLLM makes of each text, and None for each image: there is nothing to wait for with texts."""
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
        max_pixels: int | None,
        adapter: Any,
        priority: int,
    ) -> Vectors:
        if engine_input is None:
            engine_input = await self._render_image(prompt, max_pixels)
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
                priority=priority,
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
            raise RuntimeError(f"the engine returned {len(values)} numbers, {n_spans * width + n_rows} were to come")
        dense, rows = values[: n_spans * width], values[n_spans * width :]
        return Vectors(
            dense.reshape(n_spans, width),
            rows.reshape(-1, PROJECTOR_DIM),  # (n_tokens, 128)
            n_tokens,
        )

    def _check_length(self, n_tokens: int) -> None:
        """Refuse a prompt that vLLM would fail on; a text is checked before, an image has its tokens only now."""
        limit = self.client.model_config.max_model_len
        if n_tokens > limit:
            message = f"an image has {n_tokens} tokens; the limit is {limit}. Send a smaller one, or max_pixels"
            raise ApiError(400, message, code="INPUT_TOKEN_LIMIT_EXCEEDED")


def _pooled_spans(prompt: Prompt, engine_input: Mapping[str, Any]) -> tuple[Span, ...]:
    """Return the spans of a prompt whose means are its dense vectors; `pooling.pooled_span` finds them by token ids.

    Args:
        prompt: of one item.
        engine_input: what vLLM made of it, with as many tokens for the image as it has.
    """
    if prompt.spans is not None:
        return prompt.spans
    if prompt.image is None:
        return (Span(0, len(engine_input["prompt_token_ids"])),)
    (place,) = engine_input["mm_placeholders"]["image"]
    return (Span(place.offset - 1, place.offset + place.length + 1),)  # with <|vision_start|> and <|vision_end|>
