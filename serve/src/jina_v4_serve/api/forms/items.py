"""Reads texts, images and PDF files: as strings, as objects or as content parts.

A content part is one text or one image, as the APIs of chats and of Elastic write it. Sources: OpenAI's chat API
(`text`, `image_url`) and its responses API (`input_text`, `input_image`); Elastic's inference API (`value`).

In all functions, `where` is the path of a value, for messages, and `modality` is the kind of a bare string; None
guesses it from its beginning. For a value that cannot be read they raise ApiError 422 with its path.
"""

import re
from collections.abc import Collection, Mapping, Sequence

from jina_v4_serve.api.errors import ApiError, invalid, shorten
from jina_v4_serve.api.request import Item

# A bare string that begins like this is an image, or an error: as a text it would be thousands of tokens of nonsense. A
# blank after the colon makes it a text ("Data: 12 March"), unless an image type or base64 follows.
_DATA_URI = re.compile(r"[\s\ufeff]*data:(?:\S|[^,]{0,200}(?:image/|base64))", re.IGNORECASE)
# The first bytes of a PNG, JPEG, GIF, WebP, TIFF, AVIF or PDF file in base64, followed by base64 only.
_BASE64_FILE = re.compile(
    r"\s*(?:iVBORw0KGgo|[/_]9j[/_]|R0lGOD[dl]h|UklGR[\w+/-]{6}XRUJQ|SUkqA|TU0AK|AAAA[\w+/-]{2}Z0eXBhdm|JVBERi0)[\w+/\s=-]{48,}\Z",
    re.ASCII,
)
# The fields that can hold the content of a part, by its type.
_TEXTS = {"text": ("text", "value"), "input_text": ("text",)}
_IMAGES = {"image_url": ("image_url",), "input_image": ("image_url",), "image": ("image", "value")}
_PART_TYPES = (*_TEXTS, *_IMAGES)
# The content of an item, by its type. Other types, such as those of a program's own records, are ignored.
_KIND_BY_TYPE = {
    **dict.fromkeys(_TEXTS, "text"),
    **dict.fromkeys(_IMAGES, "image"),
    "pdf": "pdf",
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "audio"),
    **dict.fromkeys(("video", "video_url", "input_video"), "video"),
}
_ITEM_HARMLESS = {"type", "id", "index", "metadata"}
# `detail` is about the prices of another service; images are scaled by max_pixels only.
_PART_HARMLESS = {*_ITEM_HARMLESS, "detail", "format", "cache_control", "uuid"}
_PAGE = re.compile(r"\d{1,9}", re.ASCII)
_MOST_CHARACTERS = 20_000  # of the field pages


def read_items(value: object, where: str, max_items: int, modality: str | None = None) -> list[Item]:
    """Read an `input`: one item or a list of them."""
    if isinstance(value, str | dict):
        return [_item(value, where, modality)]
    if not isinstance(value, list):
        raise invalid(where, f"{where} is a text, an item or a list of them", value)
    check_count(value, where, max_items)
    return [_item(item, f"{where}[{i}]", modality) for i, item in enumerate(value)]


def check_count(values: Sequence[object], where: str, max_items: int, kind: str = "items") -> None:
    """Refuse an empty list, and a list with too many items."""
    if not values:
        raise invalid(where, f"{where} is empty; send at least one item")
    if len(values) > max_items:
        raise invalid(where, f"{where} has {len(values)} {kind}; at most {max_items} go into one request")


def check_not_empty(items: Sequence[Item]) -> None:
    """Refuse empty texts if they get no prefix: they would have no tokens."""
    for item in items:
        if item.text == "":
            message = f"{item.path} is empty, and with prompt_name=none it gets no prefix"
            raise invalid(item.path, message, "")


def read_content(value: object, where: str, modality: str | None = None) -> Item:
    """Read the content of an item or of a message: a text, a part, or a list of one part."""
    if isinstance(value, str | dict):
        return _part(value, where, modality)
    if not isinstance(value, list) or not value:
        raise invalid(where, f"{where} is a text, or a list of one part: a text or an image", value)
    items = [_part(part, f"{where}[{i}]", modality) for i, part in enumerate(value)]
    parts = [item for item in items if item.text != ""] or items[:1]
    if len(parts) == 1:
        return parts[0]
    if len({item.text is None for item in parts}) == 2:
        raise _fused(where)
    raise invalid(where, f"{where} has {len(parts)} parts; an item is one text or one image: send each as its own item")


def other_names(value: Mapping[str, object], known: Collection[str]) -> list[str]:
    """Return the unknown fields of an object; fields that are null count as absent."""
    return [str(name) for name in value if name not in known and value[name] is not None]


def _item(value: object, where: str, modality: str | None) -> Item:
    if isinstance(value, str):
        return _string(value, where, modality)
    if _is_token_id(value) or (isinstance(value, list) and value and all(map(_is_token_id, value))):
        raise invalid(
            where, f"{where} has token ids: they are another tokenizer's and would embed as nonsense; send text"
        )
    if not isinstance(value, dict):
        raise invalid(where, f'{where} is a text, {{"text": ...}}, {{"image": ...}} or {{"pdf": ...}}', value)
    item = _object(value, where, modality)
    kind = "text" if item.text is not None else "image" if item.image is not None else "pdf"
    if _kind_by_type(value) not in (None, kind):
        message = f"{where}.type={value['type']} contradicts its content, which is read as {kind}"
        raise invalid(f"{where}.type", f"{message}; send it as text, image or pdf, without type", value["type"])
    return item


def _object(value: Mapping[str, object], where: str, modality: str | None) -> Item:
    kind = value.get("type")
    if kind in _PART_TYPES and ("image_url" in value or "value" in value or kind == "input_text"):
        return _part(value, where)  # only its type tells texts from images
    if value.get("content") is not None:
        _check_others(value, {"content"} | _ITEM_HARMLESS, where, "an item with content has no other fields")
        return read_content(value["content"], f"{where}.content", _kind_by_type(value) or modality)
    kinds = [kind for kind in ("text", "image", "pdf") if value.get(kind) is not None]
    if {"text", "image"} <= set(kinds):
        raise _fused(where)
    if len(kinds) != 1:
        fields = " and ".join(kinds) or "neither text nor image"
        raise invalid(where, f"{where} has {fields}; send exactly one of text, image and pdf")
    (kind,) = kinds
    if kind == "pdf":
        _check_others(value, {"pdf", "pages"} | _ITEM_HARMLESS, where, "an item of a PDF file has only pdf and pages")
    else:
        _check_others(value, {kind} | _ITEM_HARMLESS, where, "an item has only text or image")
    content = value[kind]
    if not isinstance(content, str):
        raise invalid(f"{where}.{kind}", f"{where}.{kind} must be a string", content)
    if kind == "pdf":
        return Item(pdf=content, path=f"{where}.pdf", pages=_pages(value.get("pages"), f"{where}.pages"))
    return Item(text=content, path=where) if kind == "text" else Item(image=content, path=f"{where}.image")


def _part(value: object, where: str, modality: str | None = None) -> Item:
    if isinstance(value, str):
        return _string(value, where, modality)
    if not isinstance(value, dict):
        raise invalid(where, f'{where} is a content part, such as {{"type": "text", "text": ...}}', value)
    kind = value.get("type")
    if kind not in _PART_TYPES:
        offered = ", ".join(_PART_TYPES)
        raise invalid(f"{where}.type", f"{where}.type={shorten(kind)} is not offered; choose {offered}", kind)
    names = {**_TEXTS, **_IMAGES}[kind]
    _check_others(value, _PART_HARMLESS.union(names), where, f"a part of type {kind} has only {names[0]}")
    sent = [name for name in names if value.get(name) is not None]
    if len(sent) != 1:
        raise invalid(where, f"{where} is of type {kind}; send its {' or '.join(names)}")
    path, content = f"{where}.{sent[0]}", value[sent[0]]
    if sent == ["image_url"] and isinstance(content, dict):
        path, content = f"{path}.url", content.get("url")
    if not isinstance(content, str):
        raise invalid(path, f"{path} must be a string", content)
    return Item(text=content, path=where) if kind in _TEXTS else Item(image=content, path=path)


def _string(value: str, where: str, modality: str | None) -> Item:
    """Read a bare string: a text, or an image if it begins like one, as haystack and infinity's clients send them."""
    is_image = modality == "image" if modality else _DATA_URI.match(value) or _BASE64_FILE.match(value)
    return Item(image=value, path=f"{where}.image") if is_image else Item(text=value, path=where)


def _pages(value: object, where: str) -> tuple[tuple[int, int | None], ...]:
    """Read ranges of pages: `2`, `1-4,9` or `10-`."""
    if value is None:
        return ((1, None),)
    if isinstance(value, str) and len(value) > _MOST_CHARACTERS:
        raise invalid(where, f"{where} has {len(value)} characters; at most {_MOST_CHARACTERS} are read", value)
    ranges: list[tuple[int, int | None]] = []
    before: int | None = 0
    for part in value.split(",") if isinstance(value, str) else [""]:
        first, dash, last = (each.strip() for each in part.partition("-"))
        if before is None or not _PAGE.fullmatch(first) or not (last == "" or _PAGE.fullmatch(last)):
            break
        start = int(first)
        end = int(last) if last else None if dash else start
        if start <= before or (end is not None and end < start):
            break
        ranges.append((start, end))
        before = end
    else:
        return tuple(ranges)
    raise invalid(where, f'{where} must have ascending numbers and ranges from 1, such as "1-4,9" or "10-"', value)


def _kind_by_type(value: Mapping[str, object]) -> str | None:
    """Return the content that an item should have by its type: text, image, pdf, or audio and video; else None."""
    kind = value.get("type")
    return _KIND_BY_TYPE.get(kind) if isinstance(kind, str) else None


def _check_others(value: Mapping[str, object], known: set[str], where: str, allowed: str) -> None:
    if others := other_names(value, known):
        raise invalid(where, f"{where} has {shorten(', '.join(others))}, which is not offered; {allowed}")


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _fused(where: str) -> ApiError:
    return invalid(
        where,
        f"{where} has text and image; the model was not trained to make one vector of both. Send them as two items,"
        " with a vector each, or send only an image that shows the text",
    )
