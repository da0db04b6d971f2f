"""What was asked, all conflicts settled: the request as the rest of the server sees it.

Source of the rules: the published model's prefixes (`text-matching` always takes `Query: `, `query` is the default) and
the hosted service's description (`return_multivector` not with `dimensions`, `late_chunking` for texts only).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from jina_v4_serve.api.errors import ApiError, invalid, shorten
from jina_v4_serve.api.schema import EmbeddingsRequest, Encoding, Output
from jina_v4_serve.api.tasks import MODEL, TASK_VALUES, choose_task

TASKS = tuple(TASK_VALUES)
PREFIXES = {"query": "Query: ", "passage": "Passage: "}
NO_PREFIX = "none"  # as sentence-transformers has it without a prompt name
_IMAGE_URI = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)
_INPUT_TYPES = {
    "query": "query",
    "passage": "passage",
    "document": "passage",
    "search_query": "query",
    "search_document": "passage",
}


@dataclass(frozen=True)
class Item:
    """One thing to embed: a text, or where an image comes from."""

    text: str | None = None
    image: str | None = None


@dataclass(frozen=True)
class Limits:
    """What this server allows.

    Attributes:
        tasks: the tasks it serves; of several, each request names its own.
        model_names: names beside the model's own that it answers to.
        max_length: the longest sequence in tokens.
        max_pixels: the largest image area.
        dimensions: the sizes that a dense vector may be cut to.
        max_items: items of one request.
    """

    tasks: tuple[str, ...]
    model_names: frozenset[str]
    max_length: int
    max_pixels: int
    dimensions: tuple[int, ...]
    max_items: int


@dataclass(frozen=True)
class Asked:
    """One request.

    Attributes:
        task: whose adapter and projector make its vectors.
        items: in order.
        prefix: what precedes every text.
        outputs: dense, multivector or both.
        encodings: how vectors are written in JSON.
        dimensions: of dense vectors; None for all.
        max_length: texts are cut to so many tokens; None refuses longer ones than the server's limit.
        max_pixels: images are scaled down to so many pixels; None is the server's limit.
        late_chunking: the texts are parts of one.
        keyed: several encodings were asked for, so each is named in the answer.
        single: `input` was one item and not a list.
    """

    task: str
    model: str
    items: Sequence[Item]
    prefix: str
    outputs: frozenset[Output]
    encodings: Sequence[Encoding]
    dimensions: int | None
    max_length: int | None
    max_pixels: int | None
    late_chunking: bool
    keyed: bool
    single: bool


def settle(request: EmbeddingsRequest, limits: Limits) -> Asked:
    """Settle what a request means on this server.

    Raises:
        ApiError: naming the field, what it holds and what is allowed.
    """
    (task,) = limits.tasks if len(limits.tasks) == 1 else (choose_task(request.task, request.model, limits.tasks),)
    from_model = _prompt_of_model(request.model, task, limits)
    from_task = _prompt_of_task(request.task, task)
    from_type = None if request.input_type is None else _INPUT_TYPES[request.input_type]
    prompts = {
        name: value
        for name, value in (
            ("prompt_name", request.prompt_name),
            ("input_type", from_type),
            ("task", from_task),
            ("model", from_model),
        )
        if value is not None
    }
    if len(set(prompts.values())) > 1:
        told = ", ".join(f"{name} says {value}" for name, value in prompts.items())
        raise invalid(next(iter(prompts)), f"the request contradicts itself: {told}")
    prefix = _prefix(next(iter(prompts.values()), "query"), task)
    items = _items(request.input, limits.max_items)
    if not prefix:
        alone = items[:1] if request.late_chunking else items  # later parts have the joiner before them
        _check_not_empty(alone, single=not isinstance(request.input, list))
    outputs = _outputs(request)
    encodings = _encodings(request)
    _check_dimensions(request, limits, outputs)
    if request.late_chunking:
        if any(item.image is not None for item in items):
            raise invalid("late_chunking", "late_chunking is for texts; there is an image among the items")
        if outputs != {"dense"}:
            raise invalid("late_chunking", "late_chunking gives dense vectors only")
    if request.max_pixels is not None and request.max_pixels > limits.max_pixels:
        raise invalid(
            "max_pixels",
            f"max_pixels={request.max_pixels} is over this server's limit; choose 3136 to {limits.max_pixels}",
            request.max_pixels,
        )
    max_length = request.max_length
    if max_length is not None and max_length > limits.max_length:
        raise invalid(
            "max_length", f"max_length={max_length} is over the limit; choose 1 to {limits.max_length}", max_length
        )
    if max_length is None and request.truncate:
        max_length = limits.max_length
    return Asked(
        task=task,
        model=request.model or f"{MODEL}-{task}",
        items=items,
        prefix=prefix,
        outputs=outputs,
        encodings=encodings,
        dimensions=request.dimensions,
        max_length=max_length,
        max_pixels=request.max_pixels,
        late_chunking=bool(request.late_chunking),
        keyed=len(encodings) > 1,
        single=not isinstance(request.input, list),
    )


def _prefix(prompt: str, task: str) -> str:
    if prompt == NO_PREFIX:
        return ""
    return PREFIXES["query" if task == "text-matching" else prompt]


def _check_not_empty(items: Sequence[Item], *, single: bool) -> None:
    for i, item in enumerate(items):
        if item.text == "":
            where = "input" if single else f"input[{i}]"
            raise invalid(where, f"{where} is empty, and with prompt_name={NO_PREFIX} nothing stands before it", "")


def _prompt_of_model(name: str | None, served: str, limits: Limits) -> str | None:
    if name is None or name in limits.model_names:
        return None
    rest, prompt = name, None
    for ending in PREFIXES:
        if rest.endswith(f"-{ending}"):
            rest, prompt = rest.removesuffix(f"-{ending}"), ending
    rest = rest.rpartition("/")[2]  # as the hub writes it: jinaai/jina-embeddings-v4
    model = f"{MODEL}-{served}"
    if rest in (MODEL, model) or rest in limits.model_names:
        return prompt
    for task in TASKS:
        if rest == f"{MODEL}-{task}":
            raise _elsewhere("model", name, task, served)
    raise ApiError(
        404,
        f"there is no model {shorten(name)} here; this server has {MODEL}, {model}, {model}-query, {model}-passage",
        code="MODEL_NOT_FOUND",
        param="model",
    )


def _prompt_of_task(name: str | None, served: str) -> str | None:
    if name is None:
        return None
    task, _, prompt = name.partition(".")
    allowed = [served]
    if served != "text-matching":
        allowed += [f"{served}.{prompt_name}" for prompt_name in PREFIXES]
    if name in allowed:
        return prompt or None
    if task in TASKS and task != served and (not prompt or (prompt in PREFIXES and task != "text-matching")):
        raise _elsewhere("task", name, task, served)
    raise invalid("task", f"task={shorten(name)} is not offered; this server has {', '.join(allowed)}", name)


def _elsewhere(param: str, value: str, task: str, served: str) -> ApiError:
    return invalid(
        param,
        f"{param}={value} is for the {task} server and this is the {served} server: send it to the address that"
        f" `make serve-{task}` serves (port 800{1 + TASKS.index(task)} unless set otherwise), or to the gateway",
        value,
    )


def _items(value: object, max_items: int) -> list[Item]:
    if isinstance(value, str | dict):
        return [_item(value, "input")]
    if not isinstance(value, list):
        raise invalid("input", "input is a text, an item or a list of them", value)
    if not value:
        raise invalid("input", "input is empty; give at least one item")
    if len(value) > max_items:
        raise invalid("input", f"input has {len(value)} items; at most {max_items} go into one request")
    return [_item(item, f"input[{i}]") for i, item in enumerate(value)]


def _item(value: object, where: str) -> Item:
    if isinstance(value, str):
        # haystack sends its images so; as a text one would give a plausible wrong vector. {"text": ...} stays a text.
        return Item(image=value) if _IMAGE_URI.match(value) else Item(text=value)
    if _is_token_id(value) or (isinstance(value, list) and value and all(map(_is_token_id, value))):
        raise invalid(
            where, f"{where} holds token ids: they are another tokenizer's and would embed as nonsense; send text"
        )
    if not isinstance(value, dict):
        raise invalid(where, f'{where} is a text, {{"text": ...}} or {{"image": ...}}', value)
    kinds = [kind for kind in ("text", "image", "pdf") if value.get(kind) is not None]
    if kinds == ["pdf"]:
        raise invalid(where, f"{where}: PDF is not taken; send its pages as images")
    if len(kinds) != 1:
        held = " and ".join(kinds) or "neither text nor image"
        raise invalid(where, f"{where} holds {held}; give exactly one of text and image")
    content = value[kinds[0]]
    if not isinstance(content, str):
        raise invalid(f"{where}.{kinds[0]}", f"{where}.{kinds[0]} must be a string", content)
    return Item(text=content) if kinds == ["text"] else Item(image=content)


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _outputs(request: EmbeddingsRequest) -> frozenset[Output]:
    if request.outputs is not None:
        outputs = frozenset(request.outputs)
        if not outputs:
            raise invalid("outputs", "outputs is empty; give dense, multivector or both")
        if request.return_multivector is not None and request.return_multivector != ("multivector" in outputs):
            raise invalid("return_multivector", "return_multivector contradicts outputs; send one of them")
        return outputs
    if request.return_multivector:
        return frozenset({"multivector"})
    return frozenset({"dense"})


def _encodings(request: EmbeddingsRequest) -> list[Encoding]:
    given = [value for value in (request.embedding_type, request.encoding_format) if value is not None]
    if len(given) == 2 and given[0] != given[1]:
        raise invalid("encoding_format", "encoding_format contradicts embedding_type; they are two names of one field")
    if given and not given[0]:
        raise invalid("embedding_type", "embedding_type is empty; choose float, base64, binary or ubinary")
    return list(dict.fromkeys(given[0])) if given else ["float"]


def _check_dimensions(request: EmbeddingsRequest, limits: Limits, outputs: frozenset[Output]) -> None:
    if request.dimensions is None:
        return
    if request.dimensions not in limits.dimensions:
        offered = ", ".join(map(str, limits.dimensions))
        message = f"dimensions={request.dimensions} is not offered; choose {offered}"
        raise invalid("dimensions", message, request.dimensions)
    if outputs == {"multivector"}:
        raise invalid("dimensions", "dimensions is for dense vectors; the rows of a multi-vector always have 128")
