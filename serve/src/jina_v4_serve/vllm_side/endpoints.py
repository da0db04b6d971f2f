"""The plugin by which vLLM's server gets our routes in place of its own (entry point `vllm.endpoint_plugins`)."""

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
from jina_v4_serve.api.door import EMBEDDING_ROUTES, Door
from jina_v4_serve.api.guard import ROUTES
from jina_v4_serve.api.images import ImageLoader
from jina_v4_serve.api.pdf import PdfReader
from jina_v4_serve.api.prompts import Prompt, PromptMaker
from jina_v4_serve.api.request import EmbedRequest, Limits
from jina_v4_serve.api.routes import attach_routes
from jina_v4_serve.api.service import Service
from jina_v4_serve.api.start_check import adapters_failure
from jina_v4_serve.checkpoint import read_pixels, read_prompts, read_quantized
from jina_v4_serve.facts import MODEL, model_name
from jina_v4_serve.launch.revision import quantized_parts
from jina_v4_serve.phases import reached
from jina_v4_serve.settings import Settings, read_served, read_settings
from jina_v4_serve.trimming import give_back_regularly
from jina_v4_serve.vllm_side.capacity import Capacity
from jina_v4_serve.vllm_side.engine import VllmEngine

OURS = {*EMBEDDING_ROUTES, "/health", "/ready", "/docs"}


class JinaEndpoints:
    """The plugin: replaces vLLM's routes by those of this deployment."""

    name = "jina_v4"
    required_tasks = ("embed",)

    def attach_router(self, app: FastAPI) -> None:
        """Put our routes in, take away those that this deployment does not use."""
        # At its start vLLM renders a text-only chat. The checkpoint's template refuses it, and vLLM logs a traceback.
        logging.getLogger("vllm.renderers.base").addFilter(lambda entry: "warmup failed" not in entry.getMessage())
        paths = (ROUTES.keys() - OURS) | {"/static"}  # a folder; the guard lets two files of it through
        kept: list[BaseRoute] = [
            route for route in app.router.routes if getattr(route, "path", "").rstrip("/") in paths
        ]
        app.router.routes[:] = kept
        attach_routes(app)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Make the service once the engine is there."""
        reached("memory reserved, warmed up")
        leave_cores_to_the_engine()
        settings, served = read_settings(), read_served()
        model, cache = engine_client.model_config, engine_client.vllm_config.cache_config
        adapters = hide_paths(state.openai_serving_models)
        if len(served.tasks) > 1 and adapters.keys() != set(served.tasks):
            raise RuntimeError(f"vLLM has loaded adapters of {sorted(adapters)}, but {served.tasks} are to be served")
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
        coarse = {"dtype": dtype, "quantization": model.quantization, "kv_cache_dtype": cache.cache_dtype}
        parts = quantized_parts(coarse, read_quantized(Path(model.model)))
        await self._check_vectors(service, folders, dtype, parts)
        metrics.prepare(served.tasks, served.revisions)
        metric_files.reserve()
        await service.liveness.start(service.embed_probe, capacity.step_tokens, settings.hung_after_s)
        give_back_regularly()
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
        """Have a service that computes other vectors than its checkpoints should refuse all requests."""
        for task, folder in folders.items():
            of_task = replace(service.limits, tasks=(task,))
            service.canary_failure = await canary_failure(folder, dtype, of_task, service.embed, quantized)
            if service.canary_failure is not None:
                return
        if len(folders) > 1:
            service.canary_failure = await adapters_failure(tuple(folders), service.embed_fixed_text)


def capacity_of(vllm_config: Any, longest: int, n_processes: int) -> Capacity:
    """Return what decides how much a server takes in, whose longest text has so many tokens."""
    parallel = vllm_config.parallel_config
    # Behind a balancer of the operator's, a server feeds the engines of its own machine alone.
    by_others = parallel.data_parallel_external_lb or parallel.data_parallel_hybrid_lb
    n_engines = parallel.data_parallel_size_local if by_others else parallel.data_parallel_size
    return Capacity(vllm_config.scheduler_config.max_num_batched_tokens, longest, max(n_engines, 1), n_processes)


def hide_paths(models: Any) -> dict[str, Any]:
    """Have `/v1/models` show names where vLLM's `OpenAIServingModels` has it show paths.

    Returns:
        The adapters that it has loaded, a `LoRARequest` a task, with their paths.
    """
    for served in models.base_model_paths:
        served.model_path = served.name
    adapters = {name.removeprefix(model_name("")): request for name, request in models.lora_requests.items()}
    models.lora_requests = {
        name: type(request)(name, request.lora_int_id, name) for name, request in models.lora_requests.items()
    }
    return adapters


def leave_cores_to_the_engine() -> None:
    """Have this process, which takes requests, compute on one thread at a time.

    vLLM prepares pictures on as many threads as OMP_NUM_THREADS says, and that is the engine's number: the threads
    spin for a while after each operation on the cores that the engine computes on. To be called once the engine runs.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
