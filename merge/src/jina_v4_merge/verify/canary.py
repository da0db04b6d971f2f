"""The canary: fixed texts, an image and what a checkpoint embeds them to, stored in the checkpoint itself.

A server embeds the same when it starts and compares: a wrong or missing adapter, a swapped file or a kernel that
computes something else stops it. The vectors come from plain transformers, which shares no code with the server.

The manifest does not list the canary, which is made after it; the canary names the manifest's sha256 instead. The
manifest has that of every other file, so a canary belongs to exactly one fold, and it is copied with the folder.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jina_v4_merge.errors import ConfigError, SourceError
from jina_v4_merge.files import read_json, write_file
from jina_v4_merge.writing.checkpoint import MANIFEST_NAME
from jina_v4_merge.writing.staging import staging

CANARY_NAME = "canary.json"

Floats = NDArray[np.float32]

SHORT_TEXTS = (
    "What changes when the ice of a glacier melts?",
    "夕日が海に沈む。 Закат над морем. غروب الشمس على البحر.",
    "def area(width, height):\n    return width * height\n",
)
# Some hundred tokens: more positions, and with a small scheduling step more than one pass.
LONG_TEXT = (
    "A harbour town keeps its memory in lists. The tide table hangs beside the door of the office, and under it the "
    "names of the boats, 34 of them, with the day on which each was last painted. In the drawer are the bills for "
    "rope, salt and diesel, sorted by year; nobody has looked at 1987 since 1988. When the new bridge was planned, an "
    "engineer came and asked for the heights of the water, and was given a book that began with the flood of 1901 and "
    "left out the war. She copied 61 pages by hand, drew a curve through them, and found that the sea had risen by "
    "19 cm, or by 17 if one did not trust the first keeper, who drank. The bridge was built 40 cm higher than the law "
    "asked for. It cost 2.6 million more, and the council was voted out for it. Thirty years later the water stood a "
    "hand below the road, and the town was still there: so were the lists, in the same drawer, in the same hand."
)


@dataclass(frozen=True)
class Entry:
    """A text or an image, and its vectors.

    Attributes:
        item: What is embedded, as in the file: `prompt_name` and `text`, without prefix; or `png`, a file in base64,
            and `max_pixels`, the area to which it is scaled down.
        dense: (hidden,), unit length.
        multivector: (n_tokens, projector dim), unit rows.
    """

    item: Mapping[str, str | int]
    dense: Floats
    multivector: Floats


def texts(prompts: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return prompt name and text of every entry: the short texts with each prefix there is, the long one with one."""
    names: dict[str, str] = {}
    for name, prefix in prompts.items():
        names.setdefault(prefix, name)  # text-matching has one prefix under two names
    first, *others = names.values()
    return [(name, text) for name in (first, *others) for text in SHORT_TEXTS] + [(first, LONG_TEXT)]


def largest_distance(entries: Sequence[Entry], others: Sequence[Entry]) -> float:
    """Return the largest 1 - cosine of any two dense vectors, or of two multi-vectors in the mean of their rows."""
    cosines: list[float] = []
    for entry, other in zip(entries, others, strict=True):
        cosines.append(float(np.sum(entry.dense * other.dense, dtype=np.float64)))
        cosines.append(float(np.sum(entry.multivector * other.multivector, dtype=np.float64)) / len(entry.multivector))
    return 1 - float(np.min(cosines))


def write_canary(folder: Path, entries: Sequence[Entry], image: Entry, computed: Mapping[str, str]) -> None:
    """Put a canary into a checkpoint, in place of the one that may be there, whole or not at all.

    Args:
        folder: The checkpoint's.
        entries: Of the texts.
        image: Of the image.
        computed: With what: dtype, versions.

    Raises:
        OutputError: it cannot be written.
    """
    content = {
        "format": 1,
        "manifest_sha256": _manifest_sha256(folder),
        "computed": computed,
        "entries": [_written(entry) for entry in entries],
        "image": _written(image),  # apart, as older servers read the texts alone
    }
    with staging(folder) as stage:
        write_file(stage / CANARY_NAME, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
        (stage / CANARY_NAME).replace(folder / CANARY_NAME)


def check_canary(folder: Path) -> None:
    """Check the canary of a checkpoint, if there is one: that it is whole, and of this fold and no other.

    Raises:
        SourceError: it cannot be read, or belongs to another checkpoint.
        ConfigError: it is broken.
    """
    path = folder / CANARY_NAME
    if not path.exists():
        return
    canary = read_json(path)
    if canary.get("manifest_sha256") != _manifest_sha256(folder):
        raise SourceError(
            f"{path}: belongs to another checkpoint or an older fold; make it anew with `jina-v4-merge verify --canary`"
        )
    try:
        for entry in [*canary["entries"], *filter(None, [canary.get("image")])]:
            dense, rows = (_decoded(entry[key]) for key in ("dense", "multivector"))
            rows = rows.reshape(entry["n_tokens"], -1)  # (n_tokens, projector dim)
            if not np.allclose([1.0, *np.linalg.norm(rows, axis=-1)], np.linalg.norm(dense), atol=1e-4):
                raise ValueError("a vector is not of unit length")
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: broken: {error!r}; make it anew with `jina-v4-merge verify --canary`") from error


def _manifest_sha256(folder: Path) -> str:
    try:
        return hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest()
    except OSError as error:
        raise SourceError(f"{folder / MANIFEST_NAME}: cannot be read: {error.strerror}") from error


def _written(entry: Entry) -> dict[str, str | int]:
    vectors = {"dense": _encoded(entry.dense), "multivector": _encoded(entry.multivector)}
    return {**entry.item, "n_tokens": len(entry.multivector), **vectors}


def _encoded(vectors: Floats) -> str:
    """Return base64 of little-endian float32, as the server's answers have it."""
    return base64.b64encode(np.ascontiguousarray(vectors, dtype="<f4").tobytes()).decode()


def _decoded(text: Any) -> Floats:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4").astype(np.float32)
