"""The one call that the work makes: contents of one kind in, a vector or multi-vector for each out."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from jina_v4_client.embed.content import Kind

if TYPE_CHECKING:
    from jina_v4_client.client import EmbeddingsClient

Vector = NDArray[np.float32]
# Takes contents of one kind, gives a vector or multi-vector for each.
Encode = Callable[[Kind, list[Any]], list[Vector]]


def make_encode(client: "EmbeddingsClient", options: Mapping[str, Any]) -> Encode:
    """Give the call, for several threads.

    Args:
        client: that sends.
        options: of the command, by the name of the flag.
    """
    common = {"return_multivector": options["multivector"], "truncate_dim": options["dimensions"]}
    of_texts = {"max_length": options["max-length"], "prompt_name": options["prompt-name"], **common}
    of_images = {"max_pixels": options["max-pixels"], **common}

    def encode(kind: Kind, values: list[Any]) -> list[Vector]:
        if kind == "text":
            return cast(list[Vector], client.encode_text(values, batch_size=len(values), **of_texts))
        return cast(list[Vector], client.encode_image(values, batch_size=len(values), **of_images))

    return encode
