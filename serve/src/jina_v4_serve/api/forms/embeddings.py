"""`POST /v1/embeddings`: the form of OpenAI and of Jina, whose fields do not contradict each other, with ours beside.

Source of the rules: the published model's prompts (`query` is the default) and the hosted service's description
(`return_multivector` not with `dimensions`, `late_chunking` for texts only, the names that a field has).
"""

from collections.abc import Sequence
from typing import get_args

from jina_v4_serve.api.errors import invalid
from jina_v4_serve.api.forms.foreign import check_foreign
from jina_v4_serve.api.forms.items import check_not_empty, read_items
from jina_v4_serve.api.forms.messages import read_messages
from jina_v4_serve.api.forms.names import agreed, agreed_prompt, check_dimensions, check_max_pixels, text_prompt
from jina_v4_serve.api.forms.schema import EmbeddingsBody, parse
from jina_v4_serve.api.request import FIRST, EmbedRequest, Encoding, Item, Limits, Output
from jina_v4_serve.api.tasks import choose_task, prompt_of_model, prompt_of_task
from jina_v4_serve.facts import PROJECTOR_DIM, model_name

_LONGEST = -1  # of truncate_prompt_tokens: as long as the server takes
_INPUT_TYPES = {
    "query": "query",
    "passage": "passage",
    "document": "passage",
    "search_query": "query",
    "search_document": "passage",
}


def read(body: bytes, limits: Limits) -> EmbedRequest:
    """Read a request body.

    Raises:
        ApiError: naming the field, what it holds and what is allowed.
    """
    return settle(parse(body, EmbeddingsBody), limits)


def settle(request: EmbeddingsBody, limits: Limits) -> EmbedRequest:
    """Settle what a request means on this server.

    Raises:
        ApiError: naming the field, what it holds and what is allowed.
    """
    ignored = check_foreign(request.model_extra or {})
    field, value = agreed({"task": request.task, "task_type": request.task_type})
    (task,) = limits.tasks if len(limits.tasks) == 1 else (choose_task(value, request.model, limits.tasks, field),)
    from_model = prompt_of_model(request.model, task, limits.model_names)
    from_task = prompt_of_task(value, task, field)
    from_type = None if request.input_type is None else _INPUT_TYPES[request.input_type]
    found = agreed_prompt(
        {
            "prompt_name": request.prompt_name,
            "input_type": from_type,
            field: from_task,
            "model": from_model,
        }
    )
    prompt_name, prefix = text_prompt(found or "query", limits.prompts[task])
    items, left_out = _items(request, limits)
    if not prefix:
        check_not_empty(items[:1] if request.late_chunking else items)  # later parts have the joiner before them
    outputs = _outputs(request)
    encodings = _encodings(request)
    dimensions = _dimensions(request, limits, outputs, encodings)
    if request.late_chunking:
        if any(item.text is None for item in items):
            raise invalid("late_chunking", "late_chunking is for texts; there is an image or PDF among the items")
        if outputs != {"dense"}:
            raise invalid("late_chunking", "late_chunking gives dense vectors only")
        if request.max_length is not None or request.truncate_prompt_tokens is not None:
            raise invalid("late_chunking", "late_chunking cuts no text; leave out max_length, or late_chunking")
    check_max_pixels(request.max_pixels, limits)
    return EmbedRequest(
        task=task,
        model=request.model or model_name(task),
        items=items,
        prompt_name=prompt_name,
        prefix=prefix,
        outputs=outputs,
        encodings=encodings,
        dimensions=dimensions,
        max_length=None if request.late_chunking else _max_length(request, limits),
        max_pixels=request.max_pixels,
        late_chunking=bool(request.late_chunking),
        keyed=len(encodings) > 1,
        priority=request.priority or FIRST,
        ignored=ignored,
        left_out=left_out,
        pool_factor=_pool_factor(request, outputs),
    )


def _items(request: EmbeddingsBody, limits: Limits) -> tuple[list[Item], list[str]]:
    name, value = agreed({"input": request.input, "content": request.content, "texts": request.texts})
    if request.messages in (None, []) and value is not None:
        return read_items(value, limits.max_items, request.modality, name), []
    if request.messages is None:
        raise invalid("input", "input is required; it is a text, an item or a list of them")
    if value is not None:
        raise invalid("messages", f"the request has {name} and messages; send one of them")
    if request.modality is not None:
        raise invalid("modality", "modality says what the strings of input are; messages have types of their own")
    return read_messages(request.messages, limits.max_items)


def _max_length(request: EmbeddingsBody, limits: Limits) -> int | None:
    tokens = request.truncate_prompt_tokens
    switch, truncates = agreed({"truncate": request.truncate, "truncation": request.truncation})
    name, value = agreed(
        {
            "max_length": request.max_length,
            "truncate_prompt_tokens": limits.max_length if tokens == _LONGEST else tokens,
        }
    )
    if value is None:
        return limits.max_length if truncates else None
    if truncates is False:
        raise invalid(name, f"{name} contradicts {switch}=false; send one of them")
    if not 1 <= value <= limits.max_length:
        raise invalid(name, f"{name}={value} is not offered; choose 1 to {limits.max_length}", value)
    length: int = value
    return length


def _outputs(request: EmbeddingsBody) -> frozenset[Output]:
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


def _pool_factor(request: EmbeddingsBody, outputs: frozenset[Output]) -> int | None:
    if request.pool_factor is not None and "multivector" not in outputs:
        message = "pool_factor is for multi-vectors; send return_multivector, or leave it out"
        raise invalid("pool_factor", message, request.pool_factor)
    return None if request.pool_factor == 1 else request.pool_factor


def _encodings(request: EmbeddingsBody) -> list[Encoding]:
    name, value = agreed(
        {
            "embedding_type": request.embedding_type,
            "encoding_format": request.encoding_format,
            "encoding_type": request.encoding_type,
            "embedding_types": request.embedding_types,
        }
    )
    if value == []:
        raise invalid(name, f"{name} is empty; choose {', '.join(get_args(Encoding))}")
    encodings: list[Encoding] = list(dict.fromkeys(value or ()))
    dtype = request.output_dtype
    # base64 is a way to write floats, and what OpenAI's and Voyage's clients ask for unless told otherwise.
    if dtype is not None and encodings not in ([], [dtype], ["base64"]):
        raise invalid(
            "output_dtype", f"output_dtype={dtype} contradicts {name}={', '.join(encodings)}; send one of them"
        )
    return encodings if dtype in (None, "float") and encodings else [dtype or "float"]


def _dimensions(
    request: EmbeddingsBody, limits: Limits, outputs: frozenset[Output], encodings: Sequence[Encoding]
) -> int | None:
    name, value = agreed(
        {
            "dimensions": request.dimensions,
            "output_dimension": request.output_dimension,
            "output_dimensionality": request.output_dimensionality,
            "truncate_dim": request.truncate_dim,
        }
    )
    if value is None:
        return None
    if outputs == {"multivector"}:
        raise invalid(name, f"{name} is for dense vectors; the rows of a multi-vector always have {PROJECTOR_DIM}")
    return check_dimensions(name, value, limits, encodings)
