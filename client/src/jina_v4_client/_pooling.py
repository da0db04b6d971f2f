"""Sums over hidden states, as the published model pools them, and lengths of rows.

Sums are kept in float64: one page is 768 rows, and it costs nothing beside fetching them.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jina_v4_client.errors import BadReplyError, WrongServerError

Vector = NDArray[np.float32]
UNIT_TOLERANCE = 1e-3

# What a stock server must be started with, for messages.
STOCK_FLAGS = """--runner pooling --convert embed --pooler-config '{"task":"token_embed","use_activation":false}' \
--no-enable-prefix-caching"""


@dataclass(frozen=True)
class ImageFrame:
    """How many tokens of the image prompt come before vision_start and after vision_end."""

    head: int
    tail: int


def row_lengths(rows: Vector) -> NDArray[np.float64]:
    """Give the length of each row of (n, dim)."""
    lengths: NDArray[np.float64] = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))  # (n,)
    return lengths


def normalise_rows(rows: Vector) -> Vector:
    """Bring each row of (n, dim) to unit length.

    Raises:
        BadReplyError: a row of zeros has no direction.
    """
    lengths = row_lengths(rows)  # (n,)
    if not (lengths > 0).all():
        raise BadReplyError("the server's hidden states make a row of zeros: nothing is returned")
    unit: Vector = (rows / lengths[:, None]).astype(np.float32)
    return unit


def check_rows(rows: Vector) -> None:
    """Refuse hidden states that cannot be what the model computed.

    Args:
        rows: (n_tokens, hidden)
    """
    if not np.isfinite(rows).all():
        raise BadReplyError("the server's hidden states hold NaN or infinity: nothing is returned")
    if (np.abs(row_lengths(rows) - 1) < UNIT_TOLERANCE).all():
        raise WrongServerError(
            f"the server normalises every token by itself, so their mean is another; start it with {STOCK_FLAGS}"
        )


def vision_span(rows: Vector, frame: ImageFrame, n_image_tokens: int) -> Vector:
    """Give the tokens from vision_start to vision_end, both included.

    Args:
        rows: (n_tokens, hidden) of the whole image prompt.
        frame: the tokens around the span.
        n_image_tokens: how many image pads the published model makes of this image.

    Raises:
        WrongServerError: the prompt has another length: another chat template, or other pixel limits, and so other
            vectors than the published model's.
    """
    expected = frame.head + 1 + n_image_tokens + 1 + frame.tail
    if len(rows) != expected:
        raise WrongServerError(
            f"the server made {len(rows)} tokens of an image where the published model makes {expected}: its chat "
            "template or its pixel limits differ; serve a checkpoint of jina-v4-merge, or give its limit as max_pixels="
        )
    return rows[frame.head : len(rows) - frame.tail]  # (n_image_tokens + 2, hidden)


def pool(rows: Vector, truncate_dim: int | None) -> Vector:
    """Average tokens: all of a text's, the vision span of an image's.

    Args:
        rows: (n_tokens, hidden), not normalised.
        truncate_dim: how many dimensions to keep, None for all.

    Returns:
        (dim,) float32, unit length.
    """
    hidden = rows.shape[1]
    if truncate_dim is not None and truncate_dim > hidden:
        raise WrongServerError(f"truncate_dim={truncate_dim} is more than the {hidden} dimensions of the served model")
    mean = rows.mean(axis=0, dtype=np.float64)  # (hidden,)
    cut = mean[:truncate_dim]  # (dim,)
    length = np.linalg.norm(cut)
    if not length > 0:
        raise BadReplyError("the server's hidden states are all zero: nothing is returned")
    # Normalising before the cut as well, as the published code does, changes nothing after it.
    unit: Vector = (cut / length).astype(np.float32)
    return unit
