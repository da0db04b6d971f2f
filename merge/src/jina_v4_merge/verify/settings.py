"""The settings that vectors depend on, apart from the weights, and in which of them two checkpoints differ.

Only what changes vectors is compared, whatever file or form it is in: transformers renamed and moved settings from one
version to the next.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

from jina_v4_merge.files import read, read_json
from jina_v4_merge.prompts import IMAGE_PROMPT
from jina_v4_merge.reading.configs import (
    CONFIG_NAME,
    PIXELS,
    PREPROCESSOR_NAME,
    PROCESSOR_NAME,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
    adds_tokens,
    image_settings,
    merges_of,
    pixel_settings,
)
from jina_v4_merge.writing.checkpoint import PROMPTS_NAME

_TEXT = ("hidden_act", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta", "mrope_section")
_VISION = (
    "depth",
    "fullatt_block_indexes",
    "hidden_act",
    "num_heads",
    "patch_size",
    "spatial_merge_size",
    "temporal_patch_size",
    "window_size",
)
_TOKENS = ("image_token_id", "vision_start_token_id", "vision_end_token_id")
# What of tokenizer_config.json decides which tokens a text becomes, and what holds where it does not say.
_TOKENIZER_DEFAULTS = {
    "tokenizer_class": "Qwen2Tokenizer",
    "add_prefix_space": False,
    "split_special_tokens": False,
    "add_bos_token": False,
    "add_eos_token": False,
}
# transformers' classes, 4 and 5, that do what tokenizer.json says, as Qwen2's does.
_PLAIN_TOKENIZERS = ("PreTrainedTokenizer", "TokenizersBackend")
_MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the image."}]},
]


def differing_settings(ours: Path, other: Path) -> list[str]:
    """Compare two checkpoints' settings.

    Returns:
        What differs, each a sentence that names file and setting.

    Raises:
        MergeError: one of its classes: a file of the other cannot be read.
    """
    images_file, images = _images(other)
    return [
        *_differing(CONFIG_NAME, _config(other), _config(ours)),
        *_differing(images_file, images, _images(ours)[1], PIXELS),
        *_differing(TOKENIZER_NAME, _tokenizer(other), _tokenizer(ours), shown=False),
        *_differing(TOKENIZER_CONFIG_NAME, _tokenizer_config(other), _tokenizer_config(ours)),
        *_template(other),
        *_prompts(ours, other),
    ]


def _differing(
    file: str,
    other: Mapping[str, Any] | None,
    ours: Mapping[str, Any] | None,
    meaning: Mapping[str, str] | None = None,
    shown: bool = True,
) -> list[str]:
    if other is None or ours is None:
        return [f"{file} is missing, so its settings are not compared"]
    return [
        f"{file}: {key} is {other.get(key)!r} and ours {ours.get(key)!r}{_also((meaning or {}).get(key))}"
        if shown
        else f"{file}: another {key}"
        for key in ours
        if other.get(key) != ours.get(key)
    ]


def _also(meaning: str | None) -> str:
    return f"; {meaning}" if meaning else ""


def _config(folder: Path) -> dict[str, Any]:
    """Return what of a config.json the vectors depend on."""
    config = read_json(folder / CONFIG_NAME)
    text = config.get("text_config") or config
    vision = config.get("vision_config") or {}
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    found = {key: rope.get(key, text.get(key)) for key in _TEXT}
    rope_type = rope.get("rope_type", rope.get("type"))
    found["rope_type"] = None if rope_type in ("default", "mrope") else rope_type
    found["use_sliding_window"] = bool(text.get("use_sliding_window"))
    found["quantization_config"] = config.get("quantization_config")
    found |= {f"vision_config.{key}": vision.get(key) for key in _VISION}
    # transformers 4.57 saves these among the text's settings.
    return found | {key: config.get(key, text.get(key)) for key in _TOKENS}


def _images(folder: Path) -> tuple[str, dict[str, Any] | None]:
    """Return what decides the pixels of an image, and the file that it is in."""
    paths = (folder / name for name in (PROCESSOR_NAME, PREPROCESSOR_NAME))
    name, settings = image_settings({path.name: read_json(path) for path in paths if path.exists()})
    return name, None if settings is None else pixel_settings(settings)


def _tokenizer(folder: Path) -> dict[str, Any] | None:
    """Return what of a tokenizer.json decides which tokens a text becomes."""
    path = folder / TOKENIZER_NAME
    if not path.exists():
        return None
    content = read_json(path)
    model, post_processor = content.get("model") or {}, content.get("post_processor")
    added = sorted((token["id"], token["content"]) for token in content.get("added_tokens") or [])
    return {
        "vocabulary": model.get("vocab"),
        "list of merges": merges_of(content),
        "list of added tokens": added,
        "normalizer": content.get("normalizer"),
        "pre-tokenizer": _without_offsets(content.get("pre_tokenizer")),
        "post-processor": post_processor if adds_tokens(post_processor) else None,
        "truncation": content.get("truncation"),
        "order of merges": bool(model.get("ignore_merges")),
    }


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    """Return what of a tokenizer_config.json decides which tokens a text becomes; a folder may have none."""
    path = folder / TOKENIZER_CONFIG_NAME
    content = read_json(path) if path.exists() else {}
    found = _TOKENIZER_DEFAULTS | {key: content[key] for key in _TOKENIZER_DEFAULTS if content.get(key) is not None}
    name = str(found["tokenizer_class"]).removesuffix("Fast")
    found["tokenizer_class"] = _TOKENIZER_DEFAULTS["tokenizer_class"] if name in _PLAIN_TOKENIZERS else name
    return found


def _without_offsets(value: Any) -> Any:
    """Return a pre-tokenizer without what only says where in a text a token was."""
    if isinstance(value, Mapping):
        return {key: _without_offsets(held) for key, held in value.items() if key != "trim_offsets"}
    return [_without_offsets(held) for held in value] if isinstance(value, list) else value


def _template(folder: Path) -> list[str]:
    """Say what a chat template makes of an image, unless it is the image prompt."""
    template, file = _template_of(folder)
    if template is None:
        return ["no chat template: for images the caller has to send the image prompt"]
    try:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        rendered = environment.from_string(template).render(messages=_MESSAGES, add_generation_prompt=False)
    except Exception as error:  # a template can raise anything
        return [f"{file}: the chat template cannot be rendered: {error}"]
    if rendered == IMAGE_PROMPT:
        return []
    return [f"{file}: the chat template makes {rendered!r} of an image, and the image prompt is {IMAGE_PROMPT!r}"]


def _template_of(folder: Path) -> tuple[str | None, str]:
    """Return a checkpoint's chat template, and the file that it is in."""
    if (folder / "chat_template.jinja").exists():
        return read(folder / "chat_template.jinja").decode(), "chat_template.jinja"
    for name in ("chat_template.json", TOKENIZER_CONFIG_NAME):
        if (folder / name).exists() and isinstance(template := read_json(folder / name).get("chat_template"), str):
            return template, name
    return None, ""


def _prompts(ours: Path, other: Path) -> list[str]:
    """Say where the other names other prompts; one that names none leaves them to the caller."""
    if not (other / PROMPTS_NAME).exists():
        return []
    found, expected = (read_json(folder / PROMPTS_NAME).get("prompts") or {} for folder in (other, ours))
    return [
        f"{PROMPTS_NAME}: the prompt {name} is {json.dumps(found[name])} and ours {json.dumps(prompt)}"
        for name, prompt in expected.items()
        if found.get(name, prompt) != prompt
    ]
