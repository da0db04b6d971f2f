"""The routes, and the plugin through which vLLM's server gets them (entry point `vllm.endpoint_plugins`)."""

import asyncio
import json
import logging
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.datastructures import State
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute

from jina_v4_serve import cpu
from jina_v4_serve.api import answer, metrics
from jina_v4_serve.api.adapters import TEXT, adapters_failure
from jina_v4_serve.api.budget import TokenBudget
from jina_v4_serve.api.canary import canary_failure
from jina_v4_serve.api.errors import ApiError, shorten
from jina_v4_serve.api.guard import ROUTES
from jina_v4_serve.api.images import ImageLoader
from jina_v4_serve.api.prompts import Prompt, PromptMaker
from jina_v4_serve.api.record import CLOSED_REQUEST, KINDS, Kind, current
from jina_v4_serve.api.request import Asked, Item, Limits, settle
from jina_v4_serve.api.schema import EmbeddingsRequest, parse
from jina_v4_serve.api.settings import ApiSettings, read_settings
from jina_v4_serve.api.tasks import MODEL
from jina_v4_serve.api.vectors import Floats, Vectors
from jina_v4_serve.api.work import Engine, NonFiniteError
from jina_v4_serve.checkpoint import IMAGE_PROMPT_TOKENS, PIXELS_PER_TOKEN, read_max_pixels
from jina_v4_serve.memory import give_back_regularly

logger = logging.getLogger("jina_v4_serve")

OURS = {"/v1/embeddings", "/ready", "/docs"}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "Vectors, as JSON or as `application/x-safetensors`, whichever Accept names."},
    400: {"description": "No JSON, or a text over the limit."},
    401: {"description": "No valid API key."},
    404: {"description": "No such model."},
    422: {"description": "A field holds what is not offered; `error.param` names it."},
    429: {"description": "The server is at work on as much as it takes; see Retry-After."},
}
BUDGET_STEPS = 32  # scheduling steps' worth of tokens in flight

READY_AGE_S = 10.0  # vectors computed so lately prove that the engine works
PROBE_TIMEOUT_S = 4.0
STALLED_S = 300.0  # an engine with work has so long to finish some: 32,768 tokens take minutes on a CPU
CONCURRENT_IMAGES = 8  # of one request, fetched and decoded at a time
BYTES_PER_TOKEN = 4  # of text, for the budget only, before anything is tokenised
TRACE_HEADERS = ("traceparent", "tracestate")


class Service:
    """All that a request needs of this server; one an API process."""

    def __init__(
        self, engine: Engine, limits: Limits, settings: ApiSettings, prompts: PromptMaker, budget_tokens: int
    ) -> None:
        self.engine = engine
        self.limits = limits
        self.settings = settings
        self.prompts = prompts
        self.images = ImageLoader(settings.images)
        self.budget = TokenBudget(budget_tokens)
        self.canary_failure: str | None = None
        self.worked_at = -STALLED_S
        self.probe_lock = asyncio.Lock()

    async def embed(self, asked: Asked, request_id: str) -> list[Vectors]:
        """Give the vectors of a request, a prompt an item (of a late-chunked one, one prompt in all)."""
        if self.canary_failure is not None:
            raise ApiError(503, f"this server is not fit to serve: {self.canary_failure}", code="CANARY_FAILED")
        with self.budget.spend(sum(self._estimate(item, asked) for item in asked.items)):
            with current().stage("preprocessing"):
                prompts = await self._prompts(asked)
            with current().stage("engine"):
                vectors = await self.engine.embed(
                    prompts,
                    request_id,
                    task=asked.task,
                    dense="dense" in asked.outputs,
                    multivector="multivector" in asked.outputs,
                    dimensions=asked.dimensions,
                    max_pixels=asked.max_pixels,
                )
        self._worked()
        return vectors

    async def embed_fixed_text(self, task: str | None) -> Floats:
        """Give the dense vector of the text by which adapters are compared; of no task, without an adapter."""
        (vectors,) = await self.engine.embed(
            self.prompts.texts([TEXT], "Query: ", None),
            f"adapter-{task}",
            task=task or self.limits.tasks[0],
            dense=True,
            multivector=False,
            dimensions=None,
            max_pixels=None,
            adapted=task is not None,
        )
        row: Floats = vectors.dense[0]  # (hidden,)
        return row

    async def ready(self) -> bool:
        """Tell whether vectors were computed lately; compute one if there was no occasion.

        Behind long work a probe would wait its turn and look like a failure, so a busy engine is given time.
        """
        if self.engine.dead or self.canary_failure is not None:
            return False
        async with self.probe_lock:
            patience_s = STALLED_S if self.budget.in_flight else READY_AGE_S
            if time.monotonic() - self.worked_at < patience_s:
                return True
            try:
                async with asyncio.timeout(PROBE_TIMEOUT_S):
                    prompts = self.prompts.texts(["ready?"], "Query: ", None)
                    await self.engine.embed(
                        prompts,
                        "ready",
                        task=self.limits.tasks[0],
                        dense=True,
                        multivector=False,
                        dimensions=None,
                        max_pixels=None,
                    )
            except Exception:  # whatever it is, the server is not ready
                logger.warning("the readiness probe failed", exc_info=True)
                return False
            self._worked()
            return True

    def _worked(self) -> None:
        self.worked_at = time.monotonic()
        metrics.LAST_VECTORS.set_to_current_time()

    def _estimate(self, item: Item, asked: Asked) -> int:
        if item.text is None:
            return (asked.max_pixels or self.limits.max_pixels) // PIXELS_PER_TOKEN + IMAGE_PROMPT_TOKENS
        longest = asked.max_length or self.limits.max_length
        return min(len(item.text.encode(errors="replace")) // BYTES_PER_TOKEN + 2, longest)

    async def _prompts(self, asked: Asked) -> list[Prompt]:
        names = ["input" if asked.single else f"input[{i}]" for i in range(len(asked.items))]
        texts = {i: item.text for i, item in enumerate(asked.items) if item.text is not None}
        if asked.late_chunking:
            return [await asyncio.to_thread(self.prompts.chunks, list(texts.values()), asked.prefix)]
        at_once = asyncio.Semaphore(CONCURRENT_IMAGES)

        async def load(source: str, name: str) -> Prompt:
            async with at_once:
                return self.prompts.image(await self.images.load(source, f"{name}.image"))

        async with asyncio.TaskGroup() as group:
            made = {
                i: group.create_task(load(item.image, names[i]))
                for i, item in enumerate(asked.items)
                if item.image is not None
            }
            made_texts = await asyncio.to_thread(
                self.prompts.texts, list(texts.values()), asked.prefix, asked.max_length, [names[i] for i in texts]
            )
        whole = dict(zip(texts, made_texts, strict=True)) | {i: task.result() for i, task in made.items()}
        return [whole[i] for i in range(len(asked.items))]


class JinaEndpoints:
    """The plugin: replaces vLLM's routes by those of this deployment."""

    name = "jina_v4"
    required_tasks = ("embed",)

    def attach_router(self, app: FastAPI) -> None:
        """Put our routes in, take away those that this deployment does not use."""
        # At its start vLLM renders a text-only chat. The checkpoint's template refuses it, and vLLM logs a traceback.
        logging.getLogger("vllm.renderers.base").addFilter(lambda entry: "warmup failed" not in entry.getMessage())
        wanted = (ROUTES.keys() - OURS) | {"/static"}  # a folder; the guard lets two files of it through
        kept: list[BaseRoute] = [
            route for route in app.router.routes if getattr(route, "path", "").rstrip("/") in wanted
        ]
        app.router.routes[:] = kept
        app.title = "jina-embeddings-v4"
        body = {"content": {"application/json": {"schema": EmbeddingsRequest.model_json_schema()}}, "required": True}
        app.post("/v1/embeddings", openapi_extra={"requestBody": body}, responses=RESPONSES)(embeddings)
        app.get("/ready")(ready)
        app.api_route("/docs", methods=["GET", "HEAD"], include_in_schema=False)(docs)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Make the service once the engine is there."""
        cpu.leave_cores_to_the_engine()
        settings = read_settings()
        model = engine_client.model_config
        pixels = model.multimodal_config.mm_processor_kwargs or {}
        limits = Limits(
            tasks=settings.tasks,
            model_names=frozenset(args.served_model_name or ()),
            max_length=model.max_model_len,
            max_pixels=pixels.get("max_pixels") or read_max_pixels(Path(model.model)),
            dimensions=tuple(model.matryoshka_dimensions),
            max_items=settings.max_items,
        )
        prompts = PromptMaker(engine_client.renderer.get_tokenizer().backend_tokenizer, limits.max_length)
        steps = engine_client.vllm_config.scheduler_config.max_num_batched_tokens
        adapters = hide_paths(state.openai_serving_models)
        if len(limits.tasks) > 1 and adapters.keys() != set(limits.tasks):
            raise RuntimeError(f"vLLM has loaded adapters of {sorted(adapters)}, and {limits.tasks} are served")
        budget_tokens = settings.max_tokens_in_flight or max(BUDGET_STEPS * steps, 2 * limits.max_length)
        share = max(1, budget_tokens // (args.api_server_count or 1))
        service = Service(Engine(engine_client, adapters), limits, settings, prompts, share)
        dtype = str(model.dtype).removeprefix("torch.")
        for task in limits.tasks:
            checkpoint = Path(adapters[task].lora_path if adapters else model.model)
            of_task = replace(limits, tasks=(task,))
            service.canary_failure = await canary_failure(checkpoint, dtype, of_task, service.embed)
            if service.canary_failure is not None:
                break
        if adapters and service.canary_failure is None:
            service.canary_failure = await adapters_failure(limits.tasks, service.embed_fixed_text)
        metrics.prepare(limits.tasks, settings.revisions)
        give_back_regularly()
        state.jina_v4 = service


def hide_paths(models: Any) -> dict[str, Any]:
    """Have `/v1/models` show names where vLLM has it show paths.

    Args:
        models: vLLM's `OpenAIServingModels`.

    Returns:
        The adapters that it has loaded, a `LoRARequest` a task, with their paths.
    """
    for served in models.base_model_paths:
        served.model_path = served.name
    adapters = {name.removeprefix(f"{MODEL}-"): request for name, request in models.lora_requests.items()}
    models.lora_requests = {
        name: type(request)(name, request.lora_int_id, name) for name, request in models.lora_requests.items()
    }
    return adapters


async def embeddings(request: Request) -> Response:
    """Embed texts and images."""
    service: Service = request.app.state.jina_v4
    request_id: str = request.state.request_id
    record = current()
    record.trace_headers = {name: request.headers[name] for name in TRACE_HEADERS if name in request.headers}
    try:
        service.budget.check()
        with record.stage("body"):
            body = await read_body(request, service.settings)
        work = asyncio.create_task(_answer(service, request, body, request_id))
        gone = asyncio.create_task(_disconnected(request))
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not work.done():
            work.cancel()  # nobody reads the answer: its work is dropped from the engine
            await asyncio.wait({work})
            return Response(status_code=CLOSED_REQUEST)
        return work.result()
    except ClientDisconnect:
        return Response(status_code=CLOSED_REQUEST)
    except Exception as error:  # the one place where anything becomes an answer
        known = _as_api_error(error, service, request_id)
        record.code, record.param = known.code, known.param
        return Response(known.body(request_id), known.status, known.headers(), "application/json")


async def ready(request: Request) -> Response:
    """Tell whether the server embeds."""
    service: Service = request.app.state.jina_v4
    content: dict[str, Any] = {"ready": await service.ready()}
    if service.canary_failure is not None:
        content["reason"] = service.canary_failure
    return Response(json.dumps(content), 200 if content["ready"] else 503, None, "application/json")


async def docs() -> Response:
    """Show the schema; no part of the page comes from another host."""
    return get_swagger_ui_html(
        openapi_url="/openapi.json",
        title="jina-embeddings-v4",
        swagger_js_url="/static/swagger-ui-bundle.js",
        swagger_css_url="/static/swagger-ui.css",
        swagger_favicon_url="data:,",
    )


async def read_body(request: Request, settings: ApiSettings) -> bytes:
    """Read a request's JSON body, within the limits of size and time.

    Raises:
        ApiError: 408, 413 or 415.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"the body is {shorten(kind)}; send application/json"
        raise ApiError(415, message, code="UNSUPPORTED_MEDIA_TYPE", param="content-type")
    too_large = ApiError(413, f"the body is over the limit of {settings.max_body_bytes} bytes", code="BODY_TOO_LARGE")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > settings.max_body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            async for part in request.stream():
                body += part
                current().request_bytes = len(body)
                if len(body) > settings.max_body_bytes:
                    raise too_large
    except TimeoutError as error:
        message = f"the body did not arrive within {settings.body_timeout_s:g} s"
        raise ApiError(408, message, code="BODY_TOO_SLOW") from error
    return bytes(body)


async def _answer(service: Service, request: Request, body: bytes, request_id: str) -> Response:
    record = current()
    with record.stage("preprocessing"):
        asked = settle(await asyncio.to_thread(parse, body), service.limits)
    kinds: list[Kind] = ["image" if item.text is None else "text" for item in asked.items]
    record.task = asked.task
    record.n_items = {kind: kinds.count(kind) for kind in KINDS}
    accept = request.headers.get("accept", "")
    vectors = await service.embed(asked, request_id)
    for kind, found in zip(kinds, vectors, strict=False):  # of a late-chunked request there is but one
        record.n_tokens[kind] += found.n_tokens
    with record.stage("serialising"):
        if answer.SAFETENSORS in accept:
            dtype = "float16" if "float16" in accept else "float32"
            content = await asyncio.to_thread(answer.as_safetensors, asked, vectors, dtype)
            return Response(content, media_type=answer.SAFETENSORS)
        return Response(await asyncio.to_thread(answer.as_json, asked, vectors), media_type="application/json")


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _as_api_error(error: BaseException, service: Service, request_id: str) -> ApiError:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, ApiError):
        return error
    if service.engine.dead:
        return ApiError(503, "the engine has stopped and is being restarted", code="ENGINE_DOWN", retry_after_s=30)
    logger.error("request %s failed", request_id, exc_info=error)
    if isinstance(error, NonFiniteError):
        metrics.NON_FINITE.inc()
        message = "the model gave a vector that is not finite; it was not sent"
        return ApiError(500, message, code="NON_FINITE_VECTOR")
    return ApiError(500, f"something went wrong here; the log has it as request {request_id}", code="INTERNAL")
