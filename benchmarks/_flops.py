"""How much arithmetic an item is: floating-point operations of matrix products, from config.json.

A product of (m, k) and (k, n) is 2mkn. Left out is what no product is (norms, softmax, rotary positions, activations),
under 1 % of the whole. Attention is counted as what has to be computed: half of the scores where it is causal.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PROJECTOR_DIM = 128


def read_config(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's config.json."""
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    return config


def text_flop(config: dict[str, Any], n_tokens: int, *, causal: bool = True) -> int:
    """Count a prompt's pass through the language model; the embedding is a look-up, and there is no output layer."""
    text = config.get("text_config", config)
    hidden, mlp = text["hidden_size"], text["intermediate_size"]
    head = hidden // text["num_attention_heads"]
    n_keys = text["num_key_value_heads"] * head
    layer = 2 * n_tokens * hidden * (hidden + 2 * n_keys)  # -> queries (n, hidden), keys, values (n, n_keys)
    layer += 2 * n_tokens * hidden * hidden  # (n, hidden) -> (n, hidden)
    layer += 3 * 2 * n_tokens * hidden * mlp  # gate and up (n, hidden) -> (n, mlp); down (n, mlp) -> (n, hidden)
    n_scores = n_tokens * (n_tokens + 1) // 2 if causal else n_tokens**2
    layer += 2 * 2 * n_scores * hidden  # queries x keys and scores x values, each n_scores x head a head
    return int(text["num_hidden_layers"] * layer)


def vision_flop(config: dict[str, Any], grid: tuple[int, int]) -> int:
    """Count an image's pass through the vision tower.

    Args:
        config: of the checkpoint.
        grid: patches down and across, both even.
    """
    vision = config["vision_config"]
    hidden, mlp, merge = vision["hidden_size"], vision["intermediate_size"], vision["spatial_merge_size"]
    n_patches, depth = grid[0] * grid[1], vision["depth"]
    n_values = 3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    flop = 2 * n_patches * n_values * hidden  # (n_patches, 1176) -> (n_patches, hidden)
    block = 2 * n_patches * hidden * (3 * hidden + hidden)  # queries, keys, values; output
    block += 3 * 2 * n_patches * hidden * mlp  # gate, up, down
    flop += depth * block
    n_full = len(vision["fullatt_block_indexes"])
    n_windowed_scores = sum(n * n for n in window_sizes(grid, vision["window_size"] // vision["patch_size"], merge))
    flop += 2 * 2 * hidden * (n_full * n_patches**2 + (depth - n_full) * n_windowed_scores)
    merged, n_merged = hidden * merge**2, n_patches // merge**2
    flop += 2 * n_merged * merged * (merged + vision["out_hidden_size"])  # (n_merged, merged) -> same -> (.., hidden)
    return int(flop)


def window_sizes(grid: tuple[int, int], window: int, merge: int) -> list[int]:
    """Return how many patches each attention window of an image has; those at the lower and right edge may have fewer.

    Args:
        grid: patches down and across.
        window: side of a window in patches.
        merge: windows hold whole squares of so many patches a side.
    """
    side = window // merge
    rows, columns = (_split(n // merge, side) for n in grid)
    return [row * column * merge**2 for row in rows for column in columns]


def _split(length: int, part: int) -> list[int]:
    return [min(part, length - start) for start in range(0, length, part)]


def item_flop(config: dict[str, Any], n_tokens: int, grid: tuple[int, int] | None, multivector: bool) -> int:
    """Count everything of one item.

    Args:
        config: of the checkpoint.
        n_tokens: of its whole prompt.
        grid: of an image; None for a text.
        multivector: whether the projector is run.
    """
    hidden = config.get("text_config", config)["hidden_size"]
    flop = text_flop(config, n_tokens)
    flop += vision_flop(config, grid) if grid is not None else 0
    return flop + (2 * n_tokens * hidden * PROJECTOR_DIM if multivector else 0)


def total_flop(config: dict[str, Any], items: Iterable[tuple[int, tuple[int, int] | None]], multivector: bool) -> int:
    """Count all items, each given as its tokens and its grid."""
    return sum(item_flop(config, n_tokens, grid, multivector) for n_tokens, grid in items)
