"""Which server is it: one of ours, which pools in the engine, or a stock vLLM, and what it serves.

A server of ours names its task and its pooling in the headers of every response. A gateway in front of several of ours
names all their tasks where it lists their models, and passes on the one task of the server that embedded. Any other
server is taken for a stock vLLM that gives the hidden states of all tokens; ``_stock`` makes the same vectors of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jina_v4_client._model import IMAGE_HEAD, IMAGE_TAIL, MODEL, TASKS, Task, named_task
from jina_v4_client._pooling import ImageFrame
from jina_v4_client._wire import Reply, Request, WireFormat, is_list_of_dicts, read_json
from jina_v4_client.errors import BadReplyError, WrongServerError

TASK_HEADER = "x-jina-v4-task"
POOLING_HEADER = "x-jina-v4-pooling"
REVISION_HEADER = "x-jina-v4-revision"


@dataclass(frozen=True)
class Server:
    """What GET /v1/models told about a server, or about one of those behind a gateway.

    Attributes:
        model: the name to send.
        max_model_len: the longest sequence in tokens.
        task: the task whose adapters are in the weights.
        pools: whether vectors come pooled (a server of ours) or as hidden states (a stock vLLM).
        revision: of the weights and settings that decide about the vectors; None if the server does not tell.
        frame: of a stock server's image prompt, once it is known.
    """

    url: str
    model: str
    max_model_len: int
    task: Task
    pools: bool
    revision: str | None = None
    frame: ImageFrame | None = None


@dataclass
class Known:
    """What is known of the servers at one address, for all calls of a client.

    Attributes:
        model: that the caller asks for; None for the server's first, behind a gateway for the task's own.
        server_task: the task of a stock server whose model name does not end with one.
        wire_format: that the caller asks for.
        revisions: that the caller goes on with, by task; vectors of others are refused.
        servers: by task; None before the first call, and after anything went wrong: servers are restarted and replaced.
        spoken: the best format that these servers were seen to speak.
    """

    url: str
    model: str | None
    server_task: Task | None
    wire_format: WireFormat
    revisions: dict[Task, str] = field(default_factory=dict)
    servers: dict[Task, Server] | None = None
    spoken: WireFormat = field(init=False)

    def __post_init__(self) -> None:
        """Begin with what the caller asks for."""
        self.spoken = self.wire_format

    def learn(self, reply: Reply) -> dict[Task, Server]:
        """Take in the reply to :func:`models_request`."""
        self.servers = read_models(reply, self.url, self.model, self.server_task)
        return self.servers

    def forget(self) -> None:
        """Ask anew at the next call."""
        self.servers = None
        self.spoken = self.wire_format


def models_request() -> Request:
    """Ask who is there."""
    return Request("/v1/models")


def read_models(reply: Reply, url: str, model: str | None, server_task: Task | None) -> dict[Task, Server]:
    """Learn what kind of server answered, and what it serves: one task, or behind a gateway several.

    Args:
        reply: to :func:`models_request`.
        url: the server's address, for messages.
        model: the model that the caller asks for; None for the first, behind a gateway for the task's own.
        server_task: the task of a stock server whose model name does not end with one.

    Raises:
        BadReplyError: no reply of a vLLM or of ours.
        WrongServerError: the model or its task cannot be told.
    """
    cards = read_json(reply, url).get("data")
    if not is_list_of_dicts(cards) or not cards:
        raise BadReplyError(f"{url}/v1/models lists no models: this is no vLLM server")
    names = [str(card.get("id")) for card in cards]
    if model is not None and model not in names:
        raise WrongServerError(f"{url} does not serve the model {model!r}; it serves {', '.join(names)}")
    told = _told_tasks(reply, url)
    card = cards[0 if model is None else names.index(model)]
    if not told:
        name, max_model_len = _read_card(card, cards, url)
        task = _task_of_stock(card, url, server_task)
        return {task: Server(url, name, max_model_len, task, pools=False)}
    revisions = _told_revisions(reply, told)
    chosen = dict.fromkeys(told, card)
    if len(told) > 1 and model is None:
        chosen = {task: cards[names.index(f"{MODEL}-{task}")] for task in told if f"{MODEL}-{task}" in names}
    if not chosen:
        raise BadReplyError(f"{url} names the tasks {', '.join(told)} and lists no model {MODEL}-TASK for any of them")
    return {
        task: Server(url, *_read_card(card, cards, url), task, pools=True, revision=revisions.get(task))
        for task, card in chosen.items()
    }


def server_for(servers: Mapping[Task, Server], task: Task) -> Server:
    """Choose the server of a task; refuse if its adapters are for others only."""
    if task in servers:
        return servers[task]
    served = " and ".join(map(repr, servers))
    first = next(iter(servers.values()))
    raise WrongServerError(
        f"{first.url} serves the task {served}, and {task!r} was asked for; nothing was embedded: "
        f"give the address of a server started with `make serve-{task}`, or ask for task={first.task!r}"
    )


def check_unchanged(server: Server, reply: Reply) -> None:
    """Refuse the reply of another server than the one that was found at first: they come and go behind an address."""
    told = _told_tasks(reply, server.url)
    if told != ((server.task,) if server.pools else ()):
        was = f"a server of ours for {server.task!r}" if server.pools else "a stock vLLM"
        now = f"a server of ours for {', '.join(told)!r}" if told else "a stock vLLM"
        raise WrongServerError(
            f"{server.url} was asked as {was} and answered as {now}: nothing is returned; call again to start anew"
        )
    revision = _told_revisions(reply, told).get(server.task)
    if revision != server.revision:
        raise WrongServerError(
            f"{server.url} served revision {server.revision} and answered with {revision}: its model was replaced, and"
            " vectors of the two do not go together; nothing is returned"
        )


def check_revision(server: Server, revision: str | None) -> None:
    """Refuse a server of another revision than the caller goes on with; None goes on with any."""
    if revision not in (None, server.revision):
        raise WrongServerError(
            f"{server.url} serves revision {server.revision} for {server.task!r}, and {revision} is to be gone on with:"
            " vectors of the two do not go together; nothing was embedded"
        )


def _read_card(card: Mapping[str, Any], cards: Sequence[Mapping[str, Any]], url: str) -> tuple[str, int]:
    """Give a model's name and its longest sequence in tokens."""
    # The card of a LoRA module has no length of its own; the base model's, the first, holds for it.
    name, max_model_len = card.get("id"), card.get("max_model_len") or cards[0].get("max_model_len")
    if not isinstance(name, str) or not isinstance(max_model_len, int):
        raise BadReplyError(f"{url}/v1/models does not tell the model's name and max_model_len: this is no vLLM server")
    return name, max_model_len


def _told_tasks(reply: Reply, url: str) -> tuple[Task, ...]:
    """Give the tasks that a server of ours or a gateway names in its headers, in its order; none of a stock server."""
    line, pooling = reply.headers.get(TASK_HEADER), reply.headers.get(POOLING_HEADER)
    if line is None and pooling is None:
        return ()
    names = [name.strip() for name in (line or "").split(",")]
    known = {str(task): task for task in TASKS}
    told = tuple(known[name] for name in names if name in known)
    if len(set(told)) == len(names) and pooling == "engine":
        return told
    raise BadReplyError(
        f"{url} answers with {TASK_HEADER}: {line} and {POOLING_HEADER}: {pooling}, which this client does not know; "
        "install the client of the server's version"
    )


def _told_revisions(reply: Reply, told: Sequence[Task]) -> dict[Task, str]:
    """Give the revisions that a server of ours or a gateway names beside its tasks; none of an older one."""
    line = reply.headers.get(REVISION_HEADER)
    revisions = [] if line is None else [name.strip() for name in line.split(",")]
    return dict(zip(told, revisions, strict=True)) if len(revisions) == len(told) else {}


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


def frame_requests(server: Server) -> tuple[Request, Request]:
    """Ask for the tokens of the image prompt before and after the pads."""
    head, tail = (
        Request("/tokenize", {"model": server.model, "prompt": prompt, "add_special_tokens": False})
        for prompt in (IMAGE_HEAD, IMAGE_TAIL)
    )
    return head, tail


def read_frame(server: Server, head: Reply, tail: Reply) -> ImageFrame:
    """Count the tokens around the vision span, which vision_start and vision_end are part of."""
    return ImageFrame(head=_read_count(server, head) - 1, tail=_read_count(server, tail) - 1)


def _read_count(server: Server, reply: Reply) -> int:
    count = read_json(reply, server.url).get("count")
    if not isinstance(count, int) or count < 1:
        raise BadReplyError(f"{server.url}/tokenize does not count tokens: this is no vLLM server")
    return count
