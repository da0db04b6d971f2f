"""Which server is it: one of ours, which pools in the engine, or a stock vLLM, and what it serves.

A server of ours names its task and its pooling in the headers of every response. A gateway in front of several of ours
names all their tasks where it lists their models, and passes on the one task of the server that embedded. Any other
server is taken for a stock vLLM that returns the hidden states of all tokens; `_stock` makes the same vectors of them.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jina_v4_client._model import MODEL, TASKS, Task, named_task
from jina_v4_client._wire import WIRE_FORMATS, Reply, Request, WireFormat, is_list_of_dicts, read_json
from jina_v4_client.errors import BadReplyError, WrongServerError

TASK_HEADER = "x-jina-v4-task"
POOLING_HEADER = "x-jina-v4-pooling"
REVISION_HEADER = "x-jina-v4-revision"
_TASKS: dict[str, Task] = {task: task for task in TASKS}
Send = Callable[[Callable[[], Request]], Awaitable[Reply]]  # sends the request that a function writes


@dataclass(frozen=True)
class ImageFrame:
    """How many tokens of the image prompt come before vision_start and after vision_end."""

    head: int
    tail: int


@dataclass(frozen=True)
class Server:
    """What GET /v1/models says about a server, or about one of those behind a gateway."""

    url: str
    model: str  # the name to send
    max_model_len: int  # tokens
    task: Task
    pools: bool  # vectors come pooled (a server of ours), not as hidden states (a stock vLLM)
    revision: str | None = None  # of what decides about the vectors, if the server names one
    frame: ImageFrame | None = None  # of a stock server's image prompt, once it is known


@dataclass
class Known:
    """What is known of the servers at one address, for all calls of a client."""

    url: str
    model: str | None  # that the caller asks for; None for the server's first, behind a gateway for the task's own
    server_task: Task | None  # of a stock server whose model name does not end with one
    wire_format: WireFormat  # that the caller asks for
    revisions: dict[Task, str] = field(default_factory=dict)  # that the client is held to
    servers: dict[Task, Server] | None = None  # None before the first call, and after anything went wrong
    spoken: WireFormat = field(init=False)  # the best format that these servers were seen to speak

    def __post_init__(self) -> None:
        """Begin with what the caller asks for."""
        self.spoken = self.wire_format

    async def find(self, task: Task, send: Send, *, anew: bool = False) -> Server:
        """Return the server of a task, of the right revision; ask which servers there are unless they are known."""
        servers = None if anew else self.servers
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

    def speak(self, wire_format: WireFormat) -> None:
        """Ask for no better format any more; replies to requests from before may come late."""
        self.spoken = max(self.spoken, wire_format, key=WIRE_FORMATS.index)

    def forget(self) -> None:
        """Ask anew at the next call."""
        self.servers, self.spoken = None, self.wire_format

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
        revisions = _read_revisions(reply, tasks)
        chosen = dict.fromkeys(tasks or [_task_of_stock(card, url, self.server_task)], card)
        if len(tasks) > 1 and model is None:
            chosen = {task: cards[names.index(f"{MODEL}-{task}")] for task in tasks if f"{MODEL}-{task}" in names}
        if not chosen:
            raise BadReplyError(
                f"{url} names the tasks {', '.join(tasks)} and lists no model {MODEL}-TASK for any of them"
            )
        return {
            task: Server(url, *_read_card(card, cards, url), task, pools=bool(tasks), revision=revisions.get(task))
            for task, card in chosen.items()
        }


def check_unchanged(server: Server, reply: Reply) -> None:
    """Refuse the reply of another server than the one that was found at first: they come and go behind an address."""
    tasks = _read_tasks(reply, server.url)
    if tasks != ((server.task,) if server.pools else ()):
        was = f"a server of ours for {server.task!r}" if server.pools else "a stock vLLM"
        now = f"a server of ours for {', '.join(tasks)!r}" if tasks else "a stock vLLM"
        raise WrongServerError(
            f"{server.url} was asked as {was} and answered as {now}: nothing is returned; call again to start anew"
        )
    revision = _read_revisions(reply, tasks).get(server.task)
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
        raise BadReplyError(f"{url}/v1/models does not tell the model's name and max_model_len: this is no vLLM server")
    return name, max_model_len


def _read_tasks(reply: Reply, url: str) -> tuple[Task, ...]:
    """Return the tasks that a server of ours or a gateway names in its headers, in its order; none of a stock one."""
    line, pooling = reply.headers.get(TASK_HEADER), reply.headers.get(POOLING_HEADER)
    if line is None and pooling is None:
        return ()
    names = [name.strip() for name in (line or "").split(",")]
    tasks = tuple(_TASKS[name] for name in names if name in _TASKS)
    if len(set(tasks)) == len(names) and pooling == "engine":
        return tasks
    raise BadReplyError(
        f"{url} answers with {TASK_HEADER}: {line} and {POOLING_HEADER}: {pooling}, which this client does not know; "
        "install the client of the server's version"
    )


def _read_revisions(reply: Reply, tasks: Sequence[Task]) -> dict[Task, str]:
    """Return the revisions that a server of ours or a gateway names beside its tasks; none of an older one."""
    line = reply.headers.get(REVISION_HEADER)
    revisions = [] if line is None else [name.strip() for name in line.split(",")]
    return dict(zip(tasks, revisions, strict=True)) if len(revisions) == len(tasks) else {}


def _task_of_stock(card: Mapping[str, Any], url: str, server_task: Task | None) -> Task:
    names = [name for name in (card.get("id"), card.get("root")) if isinstance(name, str)]
    said = {task for task in (server_task, *map(named_task, names)) if task is not None}
    if len(said) == 1:
        return said.pop()
    if said:
        raise WrongServerError(
            f"{url} cannot be told to serve one task: model {card.get('id')!r} from {card.get('root')!r}"
            + (f" with server_task={server_task!r}" if server_task else "")
            + f" names {' and '.join(sorted(said))}"
        )
    raise WrongServerError(
        f"{url} serves {card.get('id')!r}, whose name does not end with a task; if you know for which task it was "
        f"merged, say so with EmbeddingsClient(..., server_task=...), one of {list(TASKS)}"
    )
