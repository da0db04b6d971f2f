"""The small files of a base: config.json, tokenizer and image processor, read and checked.

transformers 4 has the image processor's settings in preprocessor_config.json. transformers 5 saves them into
processor_config.json, and reads that file first. Of a folder that has both, an old and a new program see different
images where the two differ.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from jina_v4_merge.errors import ConfigError, SourceError, named
from jina_v4_merge.files import json_object, read

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"
PREPROCESSOR_NAME = "preprocessor_config.json"
PROCESSOR_NAME = "processor_config.json"
TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    TOKENIZER_NAME,
    TOKENIZER_CONFIG_NAME,
    "vocab.json",
)

# Each image setting that decides the pixels, and what it means where the name does not say.
PIXELS = {
    "min_pixels": "small images are enlarged to this many pixels",
    "max_pixels": "larger images are reduced to this many pixels",
    "patch_size": "",
    "temporal_patch_size": "",
    "merge_size": "",
    "resample": "",
    "do_resize": "",
    "do_rescale": "",
    "rescale_factor": "",
    "do_normalize": "",
    "image_mean": "",
    "image_std": "",
    "do_convert_rgb": "",
}
# What the published model's image processor does where a file does not say.
_PIXEL_DEFAULTS = {
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "resample": 3,
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "do_convert_rgb": True,
}
# Config key to token; images are found in the prompt by these ids.
_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def small_files(folder: Path) -> dict[str, bytes]:
    """Read the tokenizer's and processor's files of a base, and its generation config.

    Raises:
        SourceError: one that is always there is missing, or one cannot be read.
        ConfigError: one that must hold a JSON object does not, or two disagree about images.
    """
    names = [*TOKENIZER_FILES, PREPROCESSOR_NAME, PROCESSOR_NAME, GENERATION_NAME]
    required = (TOKENIZER_NAME, TOKENIZER_CONFIG_NAME)
    files = {name: read(folder / name) for name in names if name in required or (folder / name).exists()}
    parsed = {name: json_object(folder / name, files[name]) for name in files if name.endswith(".json")}
    _, settings = image_settings(parsed)
    if settings is None:
        raise SourceError(f"{folder / PREPROCESSOR_NAME}: no such file")
    newer = pixel_settings(settings)
    older = pixel_settings(parsed[PREPROCESSOR_NAME]) if PREPROCESSOR_NAME in parsed else newer
    if differing := [f"{key} ({newer[key]!r} and {older[key]!r})" for key in newer if newer[key] != older[key]]:
        raise ConfigError(
            f"{folder}: {PROCESSOR_NAME} and {PREPROCESSOR_NAME} have different settings of images: "
            f"{named(differing)}. Loaders differ about which they read; remove the one that is not to be used"
        )
    return files


def image_settings(files: Mapping[str, Mapping[str, Any]]) -> tuple[str, Mapping[str, Any] | None]:
    """Return the file in which transformers 5 finds the image settings, and the settings; None where it is missing.

    Args:
        files: The JSON files of a folder, by name.

    Raises:
        ConfigError: the settings are no JSON object.
    """
    settings = files.get(PROCESSOR_NAME, {}).get("image_processor")
    if settings is None:
        return PREPROCESSOR_NAME, files.get(PREPROCESSOR_NAME)
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{PROCESSOR_NAME}: image_processor must be a JSON object")
    return PROCESSOR_NAME, settings


def pixel_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the image settings that decide the pixels. The number of pixels has two names; both are read."""
    size = settings.get("size")
    found = {key: settings[key] if settings.get(key) is not None else _PIXEL_DEFAULTS.get(key) for key in PIXELS}
    for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if found[key] is None and isinstance(size, Mapping):
            found[key] = size.get(edge)
    return found


def check_tokenizer(path: Path, content: bytes, config: Mapping[str, Any]) -> None:
    """Check that a base's tokenizer belongs to its config.json; with another model's, vectors would be wrong.

    Args:
        path: Of the tokenizer.json, for the message.
        content: What it holds.
        config: The config.json. A key that is missing or null is not compared.

    Raises:
        SourceError: it is no tokenizer.
        ConfigError: its special tokens have other ids than the config says.
    """
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing more precise
        raise SourceError(f"{path}: no tokenizer: {error}") from error
    wrong = [
        f"{token} has id {tokenizer.token_to_id(token)} and {key} is {config[key]!r}"
        for key, token in _TOKENS.items()
        if config.get(key) is not None and tokenizer.token_to_id(token) != config[key]
    ]
    if wrong:
        raise ConfigError(
            f"{path}: this tokenizer is of another model than {CONFIG_NAME}: {named(wrong)}; take all files of a base "
            "from one revision of one model"
        )


def merges_of(tokenizer: Mapping[str, Any]) -> list[str]:
    """Return the merges of a tokenizer.json, which older and newer versions write differently, as "left right"."""
    merges = (tokenizer.get("model") or {}).get("merges") or []
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def adds_tokens(post_processor: Mapping[str, Any] | None) -> bool:
    """Say whether the post-processor of a tokenizer.json may add tokens to a text.

    A byte-level one trims offsets only; the template without a token of its own is what transformers 5 saves for none.
    """
    if not post_processor or post_processor.get("type") == "ByteLevel":
        return False
    pieces = [list(piece) for piece in post_processor.get("single") or []]
    return post_processor.get("type") != "TemplateProcessing" or pieces != [["Sequence"]]


def task_names(config: Mapping[str, Any]) -> list[str]:
    """Return the tasks that a base has adapters for.

    Raises:
        ConfigError: its config.json does not say.
    """
    names = config.get("task_names")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigError("config.json: task_names must list the tasks; the base must be a jina-embeddings-v4")
    return names


def dimensions(config: Mapping[str, Any]) -> list[int]:
    """Return the lengths to which a base's dense vectors may be cut.

    Raises:
        ConfigError: its config.json does not say.
    """
    dims = config.get("matryoshka_dims")
    if not isinstance(dims, list) or not dims or not all(isinstance(dim, int) for dim in dims):
        raise ConfigError(
            "config.json: matryoshka_dims must list the dimensions; the base must be a jina-embeddings-v4"
        )
    return dims
