"""Requests and replies, and which kind of server answers: ours, which pools in the engine, or a stock vLLM.

Our server names its task and its pooling in the headers of every response. Our gateway names the tasks of all servers
behind it where it lists their models; its other replies name the task of the server that embedded. Any other server is
treated as a stock vLLM that returns the hidden states of all tokens; `_stock` makes the same vectors of them.
"""

import email.utils
import json
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeGuard, get_args
from urllib.parse import urljoin

from jina_v4_client._model import MODEL, TASKS, Task, named_task
from jina_v4_client.errors import (
    BadReplyError,
    ServerAuthenticationError,
    ServerError,
    ServerFailedError,
    ServerRefusedError,
    WrongServerError,
)

WireDtype = Literal["float32", "float16"]
WIRE_DTYPES: Final[tuple[WireDtype, ...]] = get_args(WireDtype)
WireFormat = Literal["safetensors", "base64", "float"]
WIRE_FORMATS: Final[tuple[WireFormat, ...]] = get_args(WireFormat)  # best first
TASK_HEADER = "x-jina-v4-task"
POOLING_HEADER = "x-jina-v4-pooling"
REVISION_HEADER = "x-jina-v4-revision"
# What a stock server must be started with, for messages.
STOCK_FLAGS = """--runner pooling --convert embed --pooler-config '{"task":"token_embed","use_activation":false}' \
--no-enable-prefix-caching"""


@dataclass(frozen=True)
class Request:
    """One HTTP request: a GET without a body, else a POST of JSON."""

    path: str
    body: Mapping[str, Any] | None = None
    accept: str = "application/json"


@dataclass(frozen=True)
class Reply:
    """What came back with status 200; its headers are found in any case."""

    headers: Mapping[str, str]
    content: bytes


Send = Callable[[Callable[[], Request]], Awaitable[Reply]]  # sends the request that a function writes


@dataclass
class Server:
    """What GET /v1/models says about a server, or about one of those behind a gateway."""

    url: str
    model: str  # the name to send
    max_model_len: int  # tokens
    task: Task
    pools: bool  # it returns pooled vectors (our server), not hidden states (a stock vLLM)
    revision: str | None  # of what decides about the vectors, if the server names one
    wire_format: WireFormat  # the best that it was seen to speak

    def speak(self, wire_format: WireFormat) -> None:
        """Ask for no better format any more; replies to requests from before may come late."""
        self.wire_format = max(self.wire_format, wire_format, key=WIRE_FORMATS.index)


@dataclass
class Known:
    """What is known of the servers at one address, for all calls of a client."""

    url: str
    model: str | None  # that the caller asks for; None for the server's first, behind a gateway for the task's own
    server_task: Task | None  # of a stock server whose model name does not end with one
    wire_format: WireFormat  # that the caller asks for
    revisions: dict[Task, str] = field(default_factory=dict)  # that the client is held to
    servers: dict[Task, Server] | None = None  # None before the first call, and after anything went wrong

    async def find(self, task: Task, send: Send) -> Server:
        """Return the server of a task, of the right revision. Ask for the servers unless they are known."""
        servers = self.servers
        if servers is None:
            servers = self.servers = self._read_models(await send(lambda: Request("/v1/models")))
        if task not in servers:
            raise WrongServerError(
                f"{self.url} serves the task {' and '.join(map(repr, servers))}, and {task!r} was asked for; nothing "
                f"was embedded: give the address of a server started with `make serve-{task}`, or ask for "
                f"task={next(iter(servers))!r}"
            )
        server = servers[task]
        if (revision := self.revisions.get(task)) not in (None, server.revision):
            raise WrongServerError(
                f"{self.url} serves revision {server.revision} for {task!r}, and this client is held to {revision}: "
                "vectors of the two do not go together; nothing was embedded"
            )
        return server

    def forget(self) -> None:
        """Ask for the servers again at the next call."""
        self.servers = None

    def _read_models(self, reply: Reply) -> dict[Task, Server]:
        url, model = self.url, self.model
        cards = read_json(reply, url).get("data")
        if not is_list_of_dicts(cards) or not cards:
            raise BadReplyError(f"{url}/v1/models lists no models: this is no vLLM server")
        names = [str(card.get("id")) for card in cards]
        if model is not None and model not in names:
            raise WrongServerError(f"{url} does not serve the model {model!r}; it serves {', '.join(names)}")
        card = cards[0 if model is None else names.index(model)]
        tasks = _read_tasks(reply, url)
        chosen = dict.fromkeys(tasks or [_task_of_stock(card, url, self.server_task)], card)
        if len(tasks) > 1 and model is None:
            chosen = {task: cards[names.index(f"{MODEL}-{task}")] for task in tasks if f"{MODEL}-{task}" in names}
        if not chosen:
            raise BadReplyError(
                f"{url} names the tasks {', '.join(tasks)} and lists no model {MODEL}-TASK for any of them"
            )
        return {
            task: Server(url, *_read_card(card, cards, url), task, bool(tasks), tasks.get(task), self.wire_format)
            for task, card in chosen.items()
        }


def check_unchanged(server: Server, reply: Reply) -> None:
    """Refuse the reply of another server than the one that was found at first: they come and go behind an address."""
    tasks = _read_tasks(reply, server.url)
    if [*tasks] != ([server.task] if server.pools else []):
        was = f"jina-v4-serve for {server.task!r}" if server.pools else "a stock vLLM"
        now = f"jina-v4-serve for {', '.join(tasks)!r}" if tasks else "a stock vLLM or a proxy"
        raise WrongServerError(
            f"{server.url} was asked as {was} and answered as {now}: nothing is returned; call again"
        )
    revision = tasks.get(server.task)
    if revision != server.revision:
        raise WrongServerError(
            f"{server.url} served revision {server.revision} and answered with {revision}: its model was replaced, and"
            " vectors of the two do not go together; nothing is returned"
        )


def _read_card(card: Mapping[str, Any], cards: Sequence[Mapping[str, Any]], url: str) -> tuple[str, int]:
    """Return a model's name and its longest sequence in tokens."""
    # The card of a LoRA module has no length of its own; the base model's, the first, holds for it.
    name, max_model_len = card.get("id"), card.get("max_model_len") or cards[0].get("max_model_len")
    if not isinstance(name, str) or not isinstance(max_model_len, int):
        raise BadReplyError(f"{url}/v1/models lacks the model's name or max_model_len: this is no vLLM server")
    return name, max_model_len


def _read_tasks(reply: Reply, url: str) -> dict[Task, str | None]:
    """Return the tasks that our server or gateway names in its headers, in its order, with their revisions.

    A stock server names no task, and an older one of ours no revision.
    """
    line, pooling, revisions = (reply.headers.get(name) for name in (TASK_HEADER, POOLING_HEADER, REVISION_HEADER))
    if line is None and pooling is None:
        return {}
    names = [name.strip() for name in (line or "").split(",")]
    tasks = [task for name in names for task in TASKS if task == name]
    if len(set(tasks)) != len(names) or pooling != "engine":
        raise BadReplyError(
            f"{url} answers with {TASK_HEADER}: {line} and {POOLING_HEADER}: {pooling}, which this client does not "
            "know; install the client of the server's version"
        )
    named = [name.strip() for name in (revisions or "").split(",")]
    if revisions is None or len(named) != len(tasks):
        return dict.fromkeys(tasks)
    return dict(zip(tasks, named, strict=True))


def _task_of_stock(card: Mapping[str, Any], url: str, server_task: Task | None) -> Task:
    names = [name for name in (card.get("id"), card.get("root")) if isinstance(name, str)]
    said = {task for task in (server_task, *map(named_task, names)) if task is not None}
    if len(said) == 1:
        return said.pop()
    if said:
        raise WrongServerError(
            f"{url} does not serve one task: model {card.get('id')!r} from {card.get('root')!r}"
            + (f" with server_task={server_task!r}" if server_task else "")
            + f" names {' and '.join(sorted(said))}"
        )
    raise WrongServerError(
        f"{url} serves {card.get('id')!r}, whose name does not end with a task; if you know for which task it was "
        f"merged, say so with EmbeddingsClient(..., server_task=...), one of {list(TASKS)}"
    )


def read_json(reply: Reply, url: str) -> dict[str, Any]:
    """Return the JSON object of a reply; anything else is not from such a server."""
    try:
        document = json.loads(reply.content)
    except (ValueError, RecursionError) as error:
        kind = reply.headers.get("content-type", "no content type")
        raise BadReplyError(
            f"{url} does not answer with JSON ({kind}): is base_url the address of the server?"
        ) from error
    if not isinstance(document, dict):
        raise BadReplyError(f"{url} answers with JSON that is no object: is base_url the address of the server?")
    return document


def is_list_of_dicts(value: object) -> TypeGuard[list[dict[str, Any]]]:
    """Tell whether this is a JSON list of objects."""
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def refusal(url: str, path: str, status: int, headers: Mapping[str, str], content: bytes) -> ServerError:
    """Make the error for a status that is not 200, with the server's own reason in one line."""
    reason, param = _reason(content)
    facts: dict[str, Any] = {"status_code": status, "retry_after_s": read_retry_after_s(headers, time.time())}
    if status in (401, 403):
        said = f"did not accept the API key ({status}): give the server's key as api_key= or in JINA_V4_API_KEY"
        if not headers.get("content-type", "").startswith("application/json"):  # a proxy's page, not a server's error
            said = f"refused with status {status}: {reason}"
        return ServerAuthenticationError(f"{url} {said}", **facts)
    if 300 <= status < 400:
        place = urljoin(url + path, headers.get("location", "")).removesuffix(path)
        return ServerRefusedError(
            f"{url} is not there any more ({status}); it points to {place}: give that as base_url", **facts
        )
    if status >= 500:
        return ServerFailedError(f"{url}{path} failed with status {status}: {reason}", **facts)
    if status == 404 and path == "/v1/models":
        reason = f"is base_url the address of the server? It says: {reason}"
    elif path == "/pooling" and (status == 404 or "pooler-config" in reason):
        reason = f"a stock vLLM must be started with {STOCK_FLAGS}. It says: {reason}"
    return ServerRefusedError(f"{url}{path} refused with status {status}: {reason}", param=param, **facts)


def _reason(content: bytes) -> tuple[str, str | None]:
    """Find the message in an error of vLLM, our server, FastAPI or a proxy, and the field it names."""
    text = content.decode("utf-8", "replace")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        document = None
    param = None
    if isinstance(document, dict):
        inner = document.get("error") or document.get("detail") or document
        message = inner.get("message") if isinstance(inner, dict) else inner
        param = inner.get("param") if isinstance(inner, dict) else None
        text = message if isinstance(message, str) else json.dumps(message or document)
    elif "<html" in text.lower():
        text = "an HTML page; is a proxy in the way?"
    line = " ".join(text.split()) or "no reason given"
    return line if len(line) <= 600 else f"{line[:600]}...", param if isinstance(param, str) else None


def read_retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """Read how long a server asks to be left alone; now, in seconds since 1970, is for a header that holds a date."""
    for name, per_second in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            seconds = float(headers.get(name, "")) / per_second
        except ValueError:
            continue
        if math.isfinite(seconds) and seconds >= 0:
            return seconds
    try:
        until = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        return max(0.0, until.timestamp() - now)
    except (ValueError, TypeError, OverflowError, OSError):
        return None
