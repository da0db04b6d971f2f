"""Checking that a base's tokenizer belongs to its config.json; a tokenizer of some other model embeds, and wrongly."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from jina_v4_merge.errors import ConfigError, SourceError, named

# Config key to token; images are found in the prompt by these ids.
_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def check_tokenizer(path: Path, content: bytes, config: Mapping[str, Any]) -> None:
    """Check a tokenizer against the config.json beside it.

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
            f"{path}: this tokenizer is of another model than config.json: {named(wrong)}; take all files of a base "
            "from one revision of one model"
        )
