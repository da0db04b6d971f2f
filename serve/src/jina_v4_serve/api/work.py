"""Through the engine: prompts in, arrays out. Work of a request that ends early is dropped from the engine."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.api.prompts import Prompt
from jina_v4_serve.api.record import current
from jina_v4_serve.api.vectors import PROJECTOR_DIM, Floats, Vectors
from jina_v4_serve.engine import pooling_params
from jina_v4_serve.pooling import Wanted

MIN_PIXELS = 3136


class NonFiniteError(Exception):
    """The engine gave NaN or infinity."""


class Engine:
    """vLLM's engine, as much of it as is needed here."""

    def __init__(self, client: Any, adapters: Mapping[str, Any] | None = None) -> None:
        """Take what there is of vLLM.

        Args:
            client: its `EngineClient`.
            adapters: its `LoRARequest` of each task, where the adapters are not in the weights.
        """
        self.client = client
        self.adapters = adapters or {}

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
        adapted: bool = True,
    ) -> list[Vectors]:
        """Embed prompts, all at once; vLLM makes the batches.

        Args:
            prompts: of one request.
            request_id: for vLLM's log.
            task: whose adapter and projector to use.
            dense: whether dense vectors are wanted.
            multivector: whether multi-vectors are wanted.
            dimensions: of dense vectors; None for all.
            max_pixels: images are scaled down to so many; None is the checkpoint's own limit.
            adapted: False leaves out an adapter that is not in the weights; only to see that it does something.

        Raises:
            NonFiniteError: a vector is not finite; none is given.
            ApiError: 422 when vLLM cannot take an image, 503 when the engine is not there.
        """
        adapter = self.adapters[task] if self.adapters and adapted else None
        named = task if self.adapters else None
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(
                    self._embed_one(
                        prompt,
                        f"{request_id}-{i}",
                        Wanted(prompt.spans if dense else (), multivector, dimensions, named),
                        max_pixels,
                        adapter,
                    )
                )
                for i, prompt in enumerate(prompts)
            ]
        return [task.result() for task in tasks]

    async def _embed_one(
        self, prompt: Prompt, request_id: str, asked: Wanted, max_pixels: int | None, adapter: Any
    ) -> Vectors:
        rendered: dict[str, Any] = {"prompt_token_ids": prompt.token_ids}
        if prompt.image is not None:
            rendered["multi_modal_data"] = {"image": prompt.image}
            if max_pixels is not None:
                rendered["mm_processor_kwargs"] = {"min_pixels": MIN_PIXELS, "max_pixels": max_pixels}
        record = current()
        with record.stage("preprocessing"):  # vLLM scales the picture and cuts it into patches
            (engine_input,) = await self.client.renderer.render_cmpl_async([rendered])
        params = pooling_params(asked)
        params.verify(self.client.model_config)
        final = None
        async for output in self.client.encode(
            engine_input, params, request_id, lora_request=adapter, trace_headers=record.trace_headers
        ):
            final = output
        if final is None or getattr(final, "error", None) is not None:
            raise ApiError(503, "the engine dropped the request; send it again", code="ENGINE_FAILED", retry_after_s=1)
        values: Floats = final.outputs.data.float().numpy()
        if not np.isfinite(values).all():
            raise NonFiniteError(request_id)
        n_tokens = len(final.prompt_token_ids)
        n_rows = n_tokens * PROJECTOR_DIM if asked.multivector else 0
        n_spans = 1 if asked.spans is None else len(asked.spans)
        dense, rows = values[: len(values) - n_rows], values[len(values) - n_rows :]
        return Vectors(
            dense.reshape(n_spans, -1) if n_spans else dense.reshape(0, 0),
            rows.reshape(-1, PROJECTOR_DIM),  # (n_tokens, 128)
            n_tokens,
        )
