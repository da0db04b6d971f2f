"""`POST /v1/embeddings`: the fields of OpenAI and of Jina, which do not contradict each other, and our own.

Source of the rules: the published model's prompts (`query` is the default) and the hosted service's description
(`return_multivector` not with `dimensions`, `late_chunking` for texts only, the names of a field).
"""

from collections.abc import Sequence
from typing import get_args

from jina_v4_serve.api.errors import invalid
from jina_v4_serve.api.forms.common import (
    INPUT_TYPES,
    agreed,
    agreed_prompt,
    check_dimensions,
    check_max_pixels,
    settle_task,
    text_length,
    text_prompt,
)
from jina_v4_serve.api.forms.foreign import check_foreign
from jina_v4_serve.api.forms.items import check_not_empty, read_items
from jina_v4_serve.api.forms.messages import read_messages
from jina_v4_serve.api.forms.schema import EmbeddingsBody
from jina_v4_serve.api.request import FIRST, EmbedRequest, Encoding, Item, Limits, Output
from jina_v4_serve.api.tasks import prompt_of_model, prompt_of_task
from jina_v4_serve.facts import PROJECTOR_DIM, model_name

_LONGEST = -1  # of truncate_prompt_tokens: the server's limit


def settle(request: EmbeddingsBody, limits: Limits) -> EmbedRequest:
    """Make the inner request.

    Raises:
        ApiError: a field is wrong; the message names the field, its value and the allowed values.
    """
    ignored = check_foreign(request, "/v1/embeddings")
    field, value = agreed(request, "task", "task_type")
    task = settle_task(value, request.model, limits, field)
    from_model = prompt_of_model(request.model, task, limits.model_names)
    prompt_name = agreed_prompt(
        {
            "prompt_name": request.prompt_name,
            "input_type": INPUT_TYPES.get(request.input_type or ""),
            field: prompt_of_task(value, task, field),
            "model": from_model,
        }
    )
    prompt_name, prefix = text_prompt(prompt_name or "query", limits.prompts[task])
    items, left_out = _items(request, limits)
    if not prefix:
        check_not_empty(items[:1] if request.late_chunking else items)  # later parts follow a joiner
    outputs = _outputs(request)
    encodings = _encodings(request)
    dimensions = _dimensions(request, limits, outputs, encodings)
    if request.late_chunking:
        _check_late_chunking(request, items, outputs)
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
        priority=request.priority or FIRST,
        ignored=ignored,
        left_out=left_out,
        pool_factor=_pool_factor(request, outputs),
    )


def _items(request: EmbeddingsBody, limits: Limits) -> tuple[list[Item], list[str]]:
    name, value = agreed(request, "input", "content", "texts")
    if request.messages in (None, []) and value is not None:
        return read_items(value, name, limits.max_items, request.modality), []
    if request.messages is None:
        raise invalid("input", "input is required; it is a text, an item or a list of them")
    if value is not None:
        raise invalid("messages", f"the request has {name} and messages; send one of them")
    if request.modality is not None:
        raise invalid("modality", "modality is for the strings of input; messages have types of their own")
    return read_messages(request.messages, limits.max_items)


def _check_late_chunking(request: EmbeddingsBody, items: Sequence[Item], outputs: frozenset[Output]) -> None:
    if any(item.text is None for item in items):
        raise invalid("late_chunking", "late_chunking is for texts; there is an image or PDF among the items")
    if outputs != {"dense"}:
        raise invalid("late_chunking", "late_chunking returns dense vectors only")
    if request.max_length is not None or request.truncate_prompt_tokens is not None:
        raise invalid("late_chunking", "late_chunking cuts no text; leave out max_length, or late_chunking")


def _max_length(request: EmbeddingsBody, limits: Limits) -> int | None:
    if request.truncate_prompt_tokens == _LONGEST:
        request.truncate_prompt_tokens = limits.max_length
    switch, cut = agreed(request, "truncate", "truncation")
    name, value = agreed(request, "max_length", "truncate_prompt_tokens")
    return text_length(name, value, limits, cut=cut, switch=f"{switch}=false")


def _outputs(request: EmbeddingsBody) -> frozenset[Output]:
    if request.outputs is None:
        return frozenset({"multivector" if request.return_multivector else "dense"})
    outputs = frozenset(request.outputs)
    if not outputs:
        raise invalid("outputs", "outputs is empty; choose dense, multivector or both")
    if request.return_multivector is not None and request.return_multivector != ("multivector" in outputs):
        raise invalid("return_multivector", "return_multivector contradicts outputs; send one of them")
    return outputs


def _pool_factor(request: EmbeddingsBody, outputs: frozenset[Output]) -> int | None:
    if request.pool_factor is not None and "multivector" not in outputs:
        message = "pool_factor is for multi-vectors; send return_multivector, or leave it out"
        raise invalid("pool_factor", message, request.pool_factor)
    return None if request.pool_factor == 1 else request.pool_factor


def _encodings(request: EmbeddingsBody) -> list[Encoding]:
    name, value = agreed(request, "embedding_type", "encoding_format", "encoding_type", "embedding_types")
    if value == []:
        raise invalid(name, f"{name} is empty; choose {', '.join(get_args(Encoding))}")
    encodings: list[Encoding] = list(dict.fromkeys(value or ()))
    dtype = request.output_dtype
    # base64 is a way to write floats, and the default of OpenAI's and Voyage's clients.
    if dtype is not None and encodings not in ([], [dtype], ["base64"]):
        raise invalid(
            "output_dtype", f"output_dtype={dtype} contradicts {name}={', '.join(encodings)}; send one of them"
        )
    return encodings if dtype in (None, "float") and encodings else [dtype or "float"]


def _dimensions(
    request: EmbeddingsBody, limits: Limits, outputs: frozenset[Output], encodings: Sequence[Encoding]
) -> int | None:
    name, value = agreed(request, "dimensions", "output_dimension", "output_dimensionality", "truncate_dim")
    if value is not None and outputs == {"multivector"}:
        raise invalid(name, f"{name} is for dense vectors; the rows of a multi-vector always have {PROJECTOR_DIM}")
    check_dimensions(name, value, limits, encodings)
    dimensions: int | None = value
    return dimensions
