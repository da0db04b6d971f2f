"""The routes of a server. They do not depend on a form: `forms` reads the body and writes the reply."""

import asyncio
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.requests import ClientDisconnect

from jina_v4_serve.api import metrics, threads
from jina_v4_serve.api.door import COHERE, COHERE_RERANK, EMBEDDINGS, RERANK, SCORE, as_api_error
from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.api.forms import cohere, embeddings, examples, rankings, reply
from jina_v4_serve.api.forms.schema import Body, EmbeddingsBody, parse
from jina_v4_serve.api.guard import error_response
from jina_v4_serve.api.record import CLOSED_REQUEST, KINDS, Kind, current
from jina_v4_serve.api.request import EmbedRequest, Limits, RankRequest
from jina_v4_serve.api.service import Service
from jina_v4_serve.api.vectors import NonFiniteError, Vectors
from jina_v4_serve.facts import MODEL
from jina_v4_serve.heartbeat import HUNG
from jina_v4_serve.phases import started_header

logger = logging.getLogger("jina_v4_serve")

TRACE_HEADERS = ("traceparent", "tracestate")
RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"description": "The body is not JSON, or a text is over the limit."},
    401: {"description": "No valid API key."},
    404: {"description": "No such model."},
    422: {"description": "A field has a wrong value; `error.param` names it."},
    429: {"description": "The server is overloaded; see Retry-After."},
}


@dataclass(frozen=True)
class Form:
    """How a route reads bodies and writes replies.

    Attributes:
        answer: the description of its replies in the schema.
        fields: the fields of a body.
        examples: bodies by name.
        settle: makes the inner request from the fields.
        write: makes the content of a JSON reply from the inner request, its vectors and the request id.
        dtype: returns the dtype of a safetensors reply, from the inner request and the Accept header; None for JSON.
    """

    answer: str
    fields: type[Body]
    examples: Mapping[str, Mapping[str, Any]]
    settle: Callable[[Any, Limits], EmbedRequest | RankRequest]
    write: Callable[[Any, Sequence[Vectors], str], dict[str, Any]]
    dtype: Callable[[Any, str], str | None] = lambda _request, _accept: None


_VECTORS = "Vectors, as JSON; or as `application/x-safetensors` where Accept names it."
_RANKED = "The documents in the order of their scores, best first."
_SCORED = "A score for each pair, in order."
_RERANK = Form(_RANKED, rankings.RerankBody, examples.RERANK, rankings.settle_rerank, rankings.write_rerank)
FORMS = {
    EMBEDDINGS: Form(
        _VECTORS, EmbeddingsBody, examples.EMBEDDINGS, embeddings.settle, reply.write, reply.safetensors_dtype
    ),
    COHERE: Form("Vectors.", cohere.CohereBody, examples.COHERE, cohere.settle, cohere.write),
    RERANK: _RERANK,
    COHERE_RERANK: replace(_RERANK, examples=examples.COHERE_RERANK, write=rankings.write_cohere),
    SCORE: Form(_SCORED, rankings.ScoreBody, examples.SCORE, rankings.settle_score, rankings.write_score),
}


def attach_routes(app: FastAPI) -> None:
    """Add our routes to an application. Its `state.jina_v4` must be the service before the first request."""
    app.title = MODEL
    for path, form in FORMS.items():
        shown = {name: {"value": example} for name, example in form.examples.items()}
        content = {"application/json": {"schema": form.fields.model_json_schema(), "examples": shown}}
        body = {"content": content, "required": True}
        responses = {200: {"description": form.answer}, **RESPONSES}
        app.post(path, openapi_extra={"requestBody": body}, responses=responses)(embed)
    app.get("/health")(health)
    app.get("/ready")(ready)
    app.get("/docs", include_in_schema=False)(docs)


async def embed(request: Request) -> Response:
    """Embed texts and images; on the routes of rankings, score them."""
    service: Service = request.app.state.jina_v4
    request_id: str = request.state.request_id
    record = current()
    record.trace_headers = {name: request.headers[name] for name in TRACE_HEADERS if name in request.headers}
    try:
        service.budget.check()
        with record.stage("body"):
            body = await service.door.read_body(request.headers, request.stream())
        work = asyncio.create_task(_answer(service, request, body, request_id))
        gone = asyncio.create_task(_disconnected(request))
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not work.done():
            work.cancel()  # the client has disconnected: the engine drops the work
            await asyncio.gather(work, return_exceptions=True)  # reads its error, which asyncio would log
            return Response(status_code=CLOSED_REQUEST)
        return work.result()
    except ClientDisconnect:
        return Response(status_code=CLOSED_REQUEST)
    except Exception as error:  # the only place where errors become replies
        known = _as_api_error(error, service, request_id)
        record.code, record.param = known.code, known.param
        return error_response(known, request_id, request.scope["path"])


async def health(request: Request) -> Response:
    """Tell whether the server is alive; the supervisor restarts it if not."""
    service: Service = request.app.state.jina_v4
    content = {"status": "alive"}
    if service.engine.dead:
        content = {"status": "dead", "reason": "the engine has stopped"}
    elif service.liveness.failure is not None:
        content = {"status": HUNG, "reason": service.liveness.failure}
    return Response(json.dumps(content), 503 if "reason" in content else 200, started_header(), "application/json")


async def ready(request: Request) -> Response:
    """Tell whether the server can embed."""
    service: Service = request.app.state.jina_v4
    content: dict[str, Any] = {"ready": await service.ready()}
    if reason := service.liveness.failure or service.canary_failure:
        content["reason"] = reason
    return Response(json.dumps(content), 200 if content["ready"] else 503, None, "application/json")


async def docs() -> Response:
    """Show the schema. All files of the page are from this server."""
    return get_swagger_ui_html(
        openapi_url="/openapi.json",
        title=MODEL,
        swagger_js_url="/static/swagger-ui-bundle.js",
        swagger_css_url="/static/swagger-ui.css",
        swagger_favicon_url="data:,",
    )


async def _answer(service: Service, request: Request, body: bytes, request_id: str) -> Response:
    record = current()
    form = FORMS[request.scope["path"]]
    with record.stage("preprocessing"):
        inner = await threads.run(len(body), lambda: form.settle(parse(body, form.fields), service.limits))
    kinds: list[Kind] = ["image" if item.text is None else "text" for part in inner.parts for item in part.items]
    record.task = inner.task
    record.n_items = {kind: kinds.count(kind) for kind in KINDS}
    accept = ", ".join(request.headers.getlist("accept"))
    dtype = form.dtype(inner, accept)
    vectors = await service.embed(inner, request_id)
    metrics.PREFIXED.labels(inner.task).inc(sum(len(part.prefixed) for part in inner.parts))
    headers = reply.headers(record.clipped, *inner.parts)
    with record.stage("serialising"):
        n_bytes = sum(each.dense.nbytes + each.multivector.nbytes for each in vectors)
        content, media_type = await threads.run(n_bytes, _write, form, inner, vectors, request_id, dtype)
    return Response(content, headers=headers, media_type=media_type)


def _write(
    form: Form, request: Any, vectors: Sequence[Vectors], request_id: str, dtype: str | None
) -> tuple[bytes, str]:
    """Return the body of a reply and its media type."""
    if dtype is not None:
        return reply.as_safetensors(request, vectors, dtype), reply.SAFETENSORS
    content = form.write(request, vectors, request_id)
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), "application/json"


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _as_api_error(error: BaseException, service: Service, request_id: str) -> ApiError:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if service.engine.dead and not isinstance(error, ApiError):
        return ApiError(503, "the engine has stopped and is being restarted", code="ENGINE_DOWN", retry_after_s=30)
    if isinstance(error, NonFiniteError):
        metrics.NON_FINITE.inc()
        logger.error("request %s failed", request_id, exc_info=error)
        message = "the model computed a vector that is not finite; it was not sent"
        return ApiError(500, message, code="NON_FINITE_VECTOR")
    return as_api_error(error, request_id)
