"""The one call that the work makes: contents of one kind in; a vector, a multi-vector or an error out for each.

A server's error is blamed on a row only if the row was sent alone, and right after it the server embeds a plain text or
image. The client's errors are not enough: after several failures it gives up the rest of a call, with the error of
another row.
"""

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from PIL import Image

from jina_v4_client.embed.content import Kind
from jina_v4_client.embed.errors import RowError, StoppedError
from jina_v4_client.errors import ArgumentError, JinaV4Error, ServerError
from jina_v4_client.results import Vector
from jina_v4_client.scoring.token_pooling import pool_tokens

if TYPE_CHECKING:
    from jina_v4_client.client import EmbeddingsClient

# A vector; RowError if the row is at fault; any other error must stop the run, and no row after it can be blamed.
Outcome = Vector | RowError | JinaV4Error
Encode = Callable[[Kind, list[Any]], list[Outcome]]
_FAILED = 500
_STATUSES_OF_ROWS = (400, 413, 415, 422, _FAILED)
_PROBES: dict[Kind, Any] = {"text": "a text", "image": Image.new("RGB", (56, 56))}
# How the client and the server name an item of a request or a call; the id of the row takes its place.
_PLACES = re.compile(
    r"(texts|images|input)\[\d+\]( \([^)]*\))?: |(?<=input)\[\d+\]| \(input\[\d+\] is item \d+ of the call\)$"
)


def make_encode(client: "EmbeddingsClient", options: Mapping[str, Any], batch_sizes: Mapping[Kind, int]) -> Encode:
    """Make the call; several threads may use it.

    Args:
        client: sends the requests.
        options: of the command, by the name of the flag.
        batch_sizes: items a request, by kind.
    """
    pool_factor: int | None = options.get("pool-factor")
    common = {"return_multivector": options["multivector"], "truncate_dim": options["dimensions"]}
    for_texts = {"max_length": options["max-length"], "prompt_name": options["prompt-name"], **common}
    for_images = {"max_pixels": options["max-pixels"], **common}

    def send(kind: Kind, values: list[Any]) -> list[Vector | JinaV4Error]:
        try:
            if kind == "text":
                found = client.encode_text(values, batch_size=batch_sizes[kind], on_error="skip", **for_texts)
            else:
                found = client.encode_image(values, batch_size=batch_sizes[kind], on_error="skip", **for_images)
        except ServerError as error:
            return [error] * len(values)
        outcomes: list[Vector | JinaV4Error] = []
        for place, vector in enumerate(found.vectors):
            if vector is not None and pool_factor is not None:
                vector = pool_tokens(vector, pool_factor)  # (n_pooled, 128)
            outcomes.append(found.errors[place] if vector is None else vector)
        return outcomes

    def encode(kind: Kind, values: list[Any]) -> list[Outcome]:
        outcomes: list[Outcome] = [*send(kind, values)]
        for place, outcome in enumerate(outcomes):
            if isinstance(outcome, ServerError) and outcome.status_code == _FAILED:
                (outcome,) = send(kind, [values[place]])
            is_refused = isinstance(outcome, ServerError) and outcome.status_code in _STATUSES_OF_ROWS
            if is_refused and isinstance(send(kind, [_PROBES[kind]])[0], JinaV4Error):
                outcomes[place] = StoppedError(f"{outcome}; then the server did not embed a plain {kind} either")
                break
            is_of_row = is_refused or isinstance(outcome, ArgumentError)
            outcomes[place] = RowError(_PLACES.sub("", str(outcome))) if is_of_row else outcome
        return outcomes

    return encode
