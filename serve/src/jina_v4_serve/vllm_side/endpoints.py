"""The plugin that replaces the routes of vLLM's server by ours (entry point `vllm.endpoint_plugins`)."""

import logging
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI
from starlette.datastructures import State
from starlette.routing import BaseRoute

from jina_v4_serve.api import metric_files, metrics
from jina_v4_serve.api.canary import canary_failure
from jina_v4_serve.api.door import EMBEDDING_ROUTES, ROUTES, Door
from jina_v4_serve.api.images import ImageLoader
from jina_v4_serve.api.pdf import PdfReader
from jina_v4_serve.api.prompts import Prompt, PromptMaker
from jina_v4_serve.api.request import EmbedRequest, Limits
from jina_v4_serve.api.routes import attach_routes
from jina_v4_serve.api.service import Service
from jina_v4_serve.api.start_check import adapters_failure
from jina_v4_serve.checkpoint import read_pixels, read_prompts, read_quantized
from jina_v4_serve.facts import MODEL, model_name
from jina_v4_serve.launch.revision import check_same, quantized_parts
from jina_v4_serve.phases import reached
from jina_v4_serve.settings import Settings, read_served, read_settings
from jina_v4_serve.trimming import trim_regularly
from jina_v4_serve.vllm_side.capacity import Capacity
from jina_v4_serve.vllm_side.engine import VllmEngine

OURS = {*EMBEDDING_ROUTES, "/health", "/ready", "/docs"}


class JinaEndpoints:
    """Replaces the routes of vLLM's server, and makes the service behind them."""

    name = "jina_v4"
    required_tasks = ("embed",)

    def attach_router(self, app: FastAPI) -> None:
        """Add our routes, and remove those that this deployment does not use."""
        # vLLM renders a chat of texts at its start. The checkpoint's template refuses it, and vLLM logs a traceback.
        logging.getLogger("vllm.renderers.base").addFilter(lambda entry: "warmup failed" not in entry.getMessage())
        paths = (ROUTES.keys() - OURS) | {"/static"}  # a folder, of which the guard allows two files
        kept: list[BaseRoute] = [
            route for route in app.router.routes if getattr(route, "path", "").rstrip("/") in paths
        ]
        app.router.routes[:] = kept
        attach_routes(app)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Make the service when the engine has started."""
        reached("memory reserved, warmed up")
        leave_cores_to_the_engine()
        settings, served = read_settings(), read_served()
        model, cache = engine_client.model_config, engine_client.vllm_config.cache_config
        adapters = hide_paths(state.openai_serving_models)
        if len(served.tasks) > 1 and adapters.keys() != set(served.tasks):
            raise RuntimeError(f"vLLM has loaded the adapters {sorted(adapters)}; the tasks are {served.tasks}")
        folders = {task: Path(adapters[task].lora_path if adapters else model.model) for task in served.tasks}
        prompts = {task: read_prompts(folder) for task, folder in folders.items()}
        min_pixels, max_pixels = read_pixels(Path(model.model))
        pixels = model.multimodal_config.mm_processor_kwargs or {}
        limits = Limits(
            tasks=served.tasks,
            prompts=prompts,
            model_names=frozenset(args.served_model_name or ()),
            max_length=model.max_model_len,
            min_pixels=min_pixels,
            max_pixels=pixels.get("max_pixels") or max_pixels,
            max_dimensions=max(model.matryoshka_dimensions),
            max_items=settings.max_items,
        )
        tokenizer = engine_client.renderer.get_tokenizer().backend_tokenizer
        engine = VllmEngine(engine_client, adapters, min_pixels)
        capacity = capacity_of(engine_client.vllm_config, limits.max_length, args.api_server_count or 1)
        service = Service(
            engine,
            limits,
            Door(settings),
            ImageLoader(settings),
            PdfReader(settings),
            PromptMaker(tokenizer, limits.max_length, prompts[served.tasks[0]].image),
            await self._budget(engine, settings, capacity, served.tasks[0]),
        )
        dtype = str(model.dtype).removeprefix("torch.")
        types = {"dtype": dtype, "quantization": model.quantization, "kv_cache_dtype": cache.cache_dtype}
        types["mm_encoder_attn_dtype"] = getattr(model.multimodal_config, "mm_encoder_attn_dtype", None)
        parts = quantized_parts(types, read_quantized(Path(model.model)))
        await self._check_vectors(service, folders, dtype, parts)
        check_same(Path(model.model), served)
        metrics.prepare(served.tasks, served.revisions)
        metric_files.reserve()
        await service.liveness.start(service.embed_probe, capacity.step_tokens, settings.hung_after_s)
        trim_regularly()
        state.jina_v4 = service

    async def _budget(self, engine: VllmEngine, settings: Settings, capacity: Capacity, task: str) -> int:
        """Return how many tokens this process may have in flight."""
        if settings.max_tokens_in_flight:
            return max(1, settings.max_tokens_in_flight // capacity.n_processes)
        if capacity.is_fixed:
            return capacity.budget()

        async def embed(n_texts: int, n_tokens: int) -> None:
            request = EmbedRequest(task, MODEL, items=(), prompt_name="none", prefix="")
            await engine.embed([Prompt([1] * n_tokens)] * n_texts, "rate", request)

        return capacity.budget(await capacity.measure(embed))

    async def _check_vectors(
        self, service: Service, folders: Mapping[str, Path], dtype: str, quantized: Sequence[str]
    ) -> None:
        """Compare vectors with the canaries of the checkpoints. If they differ, the service refuses all requests."""
        for task, folder in folders.items():
            limits = replace(service.limits, tasks=(task,))
            service.canary_failure = await canary_failure(folder, dtype, limits, service.embed, quantized)
            if service.canary_failure is not None:
                return
        if len(folders) > 1:
            service.canary_failure = await adapters_failure(tuple(folders), service.embed_fixed_text)


def capacity_of(vllm_config: Any, longest: int, n_processes: int) -> Capacity:
    """Return what decides how many tokens a server accepts; its longest text has `longest` tokens."""
    parallel = vllm_config.parallel_config
    # Behind the operator's own load balancer, a server feeds only the engines of its machine.
    is_balanced = parallel.data_parallel_external_lb or parallel.data_parallel_hybrid_lb
    n_engines = parallel.data_parallel_size_local if is_balanced else parallel.data_parallel_size
    return Capacity(vllm_config.scheduler_config.max_num_batched_tokens, longest, max(n_engines, 1), n_processes)


def hide_paths(models: Any) -> dict[str, Any]:
    """Replace the paths that `/v1/models` would show by names; `models` is vLLM's `OpenAIServingModels`.

    Returns:
        The loaded adapters with their paths: a `LoRARequest` by task.
    """
    for served in models.base_model_paths:
        served.model_path = served.name
    adapters = {name.removeprefix(model_name("")): request for name, request in models.lora_requests.items()}
    models.lora_requests = {
        name: type(request)(name, request.lora_int_id, name) for name, request in models.lora_requests.items()
    }
    return adapters


def leave_cores_to_the_engine() -> None:
    """Limit this API process to one thread for computing. Call it when the engine runs.

    vLLM prepares pictures on OMP_NUM_THREADS threads, a number that is meant for the engine. After each operation these
    threads spin for a while, on the cores that the engine needs.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
