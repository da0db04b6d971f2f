"""Content parts: one text or one image, as the APIs of chats and of Elastic write it.

Sources: OpenAI's chat API (`text`, `image_url`) and its responses API (`input_text`, `input_image`); Elastic's
inference API (`value`).
"""

import re
from collections.abc import Mapping

from jina_v4_serve.api.errors import ApiError, invalid, shorten
from jina_v4_serve.api.request import Item

# A bare string that begins so is an image, or an error: as a text it would be thousands of tokens of nonsense. Nothing
# blank follows the colon of a data URI, so that "Data: 12 March" stays a text, unless its head names an image.
_DATA_URI = re.compile(r"[\s\ufeff]*data:(?:\S|[^,]{0,200}(?:image/|base64))", re.IGNORECASE)
# The first bytes of a PNG, JPEG, GIF, WebP, TIFF, AVIF or PDF file in base64, and nothing but base64 behind them.
_BASE64_FILE = re.compile(
    r"\s*(?:iVBORw0KGgo|[/_]9j[/_]|R0lGOD[dl]h|UklGR[\w+/-]{6}XRUJQ|SUkqA|TU0AK|AAAA[\w+/-]{2}Z0eXBhdm|JVBERi0)[\w+/\s=-]{48,}\Z",
    re.ASCII,
)
# The type of a part, to the fields that can hold its content.
_TEXTS = {"text": ("text", "value"), "input_text": ("text",)}
_IMAGES = {"image_url": ("image_url",), "input_image": ("image_url",), "image": ("image", "value")}
PART_TYPES = (*_TEXTS, *_IMAGES)
# What a type says that its item holds; another type, as of a program's own records, says nothing.
_HELD_BY_TYPE = {
    **dict.fromkeys(_TEXTS, "text"),
    **dict.fromkeys(_IMAGES, "image"),
    "pdf": "pdf",
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "audio"),
    **dict.fromkeys(("video", "video_url", "input_video"), "video"),
}
# `detail` is the price list of another service; an image is scaled by max_pixels alone.
_HARMLESS = {"type", "detail", "format", "cache_control", "id", "index", "metadata", "uuid"}


def fused(where: str) -> ApiError:
    """Make the error for text and image in one item."""
    return invalid(
        where,
        f"{where} holds text and image; the model was not trained to make one vector of both. Send them as two items,"
        " a vector each, or send the image alone, with the text drawn into it",
    )


def is_part(value: Mapping[str, object]) -> bool:
    """Tell whether an item is a content part that only its type explains."""
    kind = value.get("type")
    return kind in PART_TYPES and ("image_url" in value or "value" in value or kind == "input_text")


def held_by_type(value: Mapping[str, object]) -> str | None:
    """Return what the type of an item says that it holds: text, image, pdf or what is not offered; None without one."""
    kind = value.get("type")
    return _HELD_BY_TYPE.get(kind) if isinstance(kind, str) else None


def read_string(value: str, where: str, modality: str | None = None) -> Item:
    """Read a bare string: a text, or an image that begins like one; {"text": ...} is always a text.

    haystack and infinity's clients send their images so.

    Args:
        value: the string.
        where: its path.
        modality: text or image, where the request or the item's type says which.
    """
    is_image = modality == "image" if modality else _DATA_URI.match(value) or _BASE64_FILE.match(value)
    return Item(image=value, path=f"{where}.image") if is_image else Item(text=value, path=where)


def read_content(value: object, where: str, modality: str | None = None) -> Item:
    """Read the content of an item or of a message: a text, a part, or a list of one part.

    Args:
        value: the content.
        where: its path.
        modality: what a bare string is; None to see by its beginning.

    Raises:
        ApiError: 422, naming the part.
    """
    if isinstance(value, str):
        return read_string(value, where, modality)
    if isinstance(value, dict):
        return read_part(value, where)
    if not isinstance(value, list) or not value:
        raise invalid(where, f"{where} is a text, or a list of one part: a text or an image", value)
    items = [read_part(part, f"{where}[{i}]", modality) for i, part in enumerate(value)]
    held = [item for item in items if item.text != ""] or items[:1]
    if len(held) == 1:
        return held[0]
    if any(item.text is None for item in held) and any(item.text is not None for item in held):
        raise fused(where)
    raise invalid(where, f"{where} has {len(held)} parts; an item is one text or one image: send each as its own item")


def read_part(value: object, where: str, modality: str | None = None) -> Item:
    """Read a content part.

    Args:
        value: the part.
        where: its path.
        modality: what a bare string is; None to see by its beginning.

    Raises:
        ApiError: 422, naming the field.
    """
    if isinstance(value, str):
        return read_string(value, where, modality)
    if not isinstance(value, dict):
        raise invalid(where, f'{where} is a content part, such as {{"type": "text", "text": ...}}', value)
    kind = value.get("type")
    if kind not in PART_TYPES:
        offered = ", ".join(PART_TYPES)
        raise invalid(f"{where}.type", f"{where}.type={shorten(kind)} is not offered; choose {offered}", kind)
    names = {**_TEXTS, **_IMAGES}[kind]
    others = [str(name) for name in value if name not in {*names, *_HARMLESS} and value[name] is not None]
    if others:
        message = f"{where} holds {shorten(', '.join(others))}, which is not offered; a part of type {kind} has"
        raise invalid(where, f"{message} {names[0]} alone")
    sent = [name for name in names if value.get(name) is not None]
    if len(sent) != 1:
        raise invalid(where, f"{where} is of type {kind}; give its {' or '.join(names)}")
    path, content = f"{where}.{sent[0]}", value[sent[0]]
    if sent == ["image_url"] and isinstance(content, dict):
        path, content = f"{path}.url", content.get("url")
    if not isinstance(content, str):
        raise invalid(path, f"{path} must be a string", content)
    return Item(text=content, path=where) if kind in _TEXTS else Item(image=content, path=path)
