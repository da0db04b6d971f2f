"""The one call that the work makes: contents of one kind in, for each a vector, a multi-vector or an error out."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from jina_v4_client.embed.content import Kind
from jina_v4_client.errors import JinaV4Error
from jina_v4_client.results import Vector
from jina_v4_client.scoring.token_pooling import pool_tokens

if TYPE_CHECKING:
    from jina_v4_client.client import EmbeddingsClient

Outcome = Vector | JinaV4Error
Encode = Callable[[Kind, list[Any]], list[Outcome]]


def make_encode(
    client: "EmbeddingsClient", options: Mapping[str, Any], batch_sizes: Mapping[Kind, int] | None = None
) -> Encode:
    """Make the call; several threads may use it.

    Args:
        client: that sends.
        options: of the command, by the name of the flag.
        batch_sizes: items a request, by kind; None sends each call as one request.
    """
    pool_factor: int | None = options.get("pool-factor")
    common = {"return_multivector": options["multivector"], "truncate_dim": options["dimensions"]}
    for_texts = {"max_length": options["max-length"], "prompt_name": options["prompt-name"], **common}
    for_images = {"max_pixels": options["max-pixels"], **common}

    def encode(kind: Kind, values: list[Any]) -> list[Outcome]:
        batch_size = len(values) if batch_sizes is None else batch_sizes[kind]
        if kind == "text":
            found = client.encode_text(values, batch_size=batch_size, on_error="skip", **for_texts)
        else:
            found = client.encode_image(values, batch_size=batch_size, on_error="skip", **for_images)
        outcomes: list[Outcome] = []
        for place, vector in enumerate(found.vectors):
            if vector is not None and pool_factor is not None:
                vector = pool_tokens(vector, pool_factor)  # (n_pooled, 128)
            outcomes.append(found.errors[place] if vector is None else vector)
        return outcomes

    return encode
