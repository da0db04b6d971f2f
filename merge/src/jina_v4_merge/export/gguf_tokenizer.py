"""A base's tokenizer as a GGUF file holds it, for llama.cpp's own implementation of byte-level BPE.

llama.cpp has no copy of a tokenizer's rules for cutting text into words: it knows a list of them by name. A file with
the wrong name loads, and embeds other tokens. So the rules in tokenizer.json are compared with those of the names.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from jina_v4_merge.errors import ConfigError
from jina_v4_merge.reading.configs import TOKENIZER_CONFIG_NAME, TOKENIZER_NAME, adds_tokens, merges_of

# Qwen2's words, as tokenizer.json has them.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What llama.cpp's byte-level BPE does not do.
_OFF = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")


class TokenType(IntEnum):
    """How llama.cpp treats a token; the numbers are GGUF's."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


@dataclass(frozen=True)
class GgufTokenizer:
    """What goes into the file.

    Attributes:
        words: llama.cpp's name for how text is cut into words.
        tokens: By id, as many as the embedding has rows.
        types: The same.
        merges: Pairs of tokens, a space between the two; the earlier in the list, the earlier it is applied.
        ids: The ids of `bos`, `eos` and `pad`, of those that there are.
    """

    words: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    ids: dict[str, int]


def gguf_tokenizer(path: Path, files: Mapping[str, bytes], config: Mapping[str, Any]) -> GgufTokenizer:
    """Return a base's tokenizer.

    Args:
        path: Of tokenizer.json, for the message.
        files: The base's small files, by name.
        config: The base's config.json.

    Raises:
        ConfigError: llama.cpp has no such tokenizer, or it has more tokens than the embedding has rows.
    """
    content = json.loads(files[TOKENIZER_NAME])
    model, text = content["model"], config.get("text_config", config)
    words = _words(content)
    if words is None:
        raise ConfigError(
            f"{path}: no tokenizer of Qwen2: it cuts text in a way that llama.cpp is not known to have; take all files "
            "of a base from one revision of one model"
        )
    by_id = {number: (token, TokenType.NORMAL) for token, number in model["vocab"].items()}
    for added in content.get("added_tokens") or []:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        by_id[added["id"]] = (added["content"], kind)
    n_rows = text["vocab_size"]
    if max(by_id) >= n_rows:
        raise ConfigError(f"{path}: a token has id {max(by_id)}, and the embedding has {n_rows} rows (vocab_size)")
    listed = [by_id.get(number, (f"[PAD{number}]", TokenType.UNUSED)) for number in range(n_rows)]
    return GgufTokenizer(
        words,
        [token for token, _ in listed],
        [kind for _, kind in listed],
        merges_of(content),
        _special_ids(json.loads(files[TOKENIZER_CONFIG_NAME]), text, {token: i for i, (token, _) in by_id.items()}),
    )


def _words(content: Mapping[str, Any]) -> str | None:
    """Return llama.cpp's name for the rules of a tokenizer.json; None where it has none."""
    model = content["model"]
    if model["type"] != "BPE" or any(model.get(key) for key in _OFF):
        return None
    # llama.cpp does not normalise; the caller can.
    normalizer = (content.get("normalizer") or {"type": None})["type"]
    if normalizer not in (None, "NFC") or adds_tokens(content.get("post_processor")):
        return None
    steps = content.get("pre_tokenizer") or {}
    match steps.get("pretokenizers", [steps]):
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return "gpt-2"
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ] if pattern == _QWEN2_WORDS:
            return "qwen2"
    return None


def _special_ids(settings: Mapping[str, Any], text: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, int]:
    """Return the ids of the tokens at begin and end of a text, and of padding: the tokenizer's, else the config's."""
    found: dict[str, int] = {}
    for name in ("bos", "eos", "pad"):
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        number = ids.get(token, text.get(f"{name}_token_id")) if token else text.get(f"{name}_token_id")
        if number is not None:
            found[name] = number
    return found
