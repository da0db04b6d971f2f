"""The items of an `input`: texts, images and PDF files, as strings, as objects or as content parts."""

import re
from collections.abc import Mapping, Sequence

from jina_v4_serve.api.errors import invalid, shorten
from jina_v4_serve.api.forms.parts import fused, held_by_type, is_part, read_content, read_part, read_string
from jina_v4_serve.api.request import Item

_PAGE = re.compile(r"\d{1,9}", re.ASCII)
_MOST_CHARACTERS = 20_000  # of pages
_ITEM_HARMLESS = {"type", "id", "index", "metadata"}


def read_items(value: object, max_items: int, modality: str | None, name: str = "input") -> list[Item]:
    """Read an `input`.

    Args:
        value: one item or a list of them.
        max_items: of a request.
        modality: what a bare string is; None to see by its beginning.
        name: of the field that holds it.

    Raises:
        ApiError: 422, naming the item.
    """
    if isinstance(value, str | dict):
        return [_item(value, name, modality)]
    if not isinstance(value, list):
        raise invalid(name, f"{name} is a text, an item or a list of them", value)
    if not value:
        raise invalid(name, f"{name} is empty; give at least one item")
    if len(value) > max_items:
        raise invalid(name, f"{name} has {len(value)} items; at most {max_items} go into one request")
    return [_item(item, f"{name}[{i}]", modality) for i, item in enumerate(value)]


def _item(value: object, where: str, modality: str | None) -> Item:
    if isinstance(value, str):
        return read_string(value, where, modality)
    if _is_token_id(value) or (isinstance(value, list) and value and all(map(_is_token_id, value))):
        raise invalid(
            where, f"{where} holds token ids: they are another tokenizer's and would embed as nonsense; send text"
        )
    if not isinstance(value, dict):
        raise invalid(where, f'{where} is a text, {{"text": ...}}, {{"image": ...}} or {{"pdf": ...}}', value)
    item = _object(value, where, modality)
    said = held_by_type(value)
    held = "text" if item.text is not None else "image" if item.image is not None else "pdf"
    if said not in (None, held):
        message = f"{where}.type={value['type']} contradicts its content, which is read as {held}"
        raise invalid(f"{where}.type", f"{message}; send it as text, image or pdf, without type", value["type"])
    return item


def _object(value: Mapping[str, object], where: str, modality: str | None) -> Item:
    if is_part(value):
        return read_part(value, where)
    if value.get("content") is not None:
        _check_others(value, {"content"}, where, "an item has its content alone")
        return read_content(value["content"], f"{where}.content", held_by_type(value) or modality)
    kinds = [kind for kind in ("text", "image", "pdf") if value.get(kind) is not None]
    if {"text", "image"} <= set(kinds):
        raise fused(where)
    if len(kinds) != 1:
        held = " and ".join(kinds) or "neither text nor image"
        raise invalid(where, f"{where} holds {held}; send exactly one of text, image and pdf")
    (kind,) = kinds
    if kind == "pdf":
        _check_others(value, {"pdf", "pages"}, where, "an item of a PDF file has pdf and pages alone")
    else:
        _check_others(value, {kind}, where, "an item has text or image alone")
    content = value[kind]
    if not isinstance(content, str):
        raise invalid(f"{where}.{kind}", f"{where}.{kind} must be a string", content)
    if kind == "pdf":
        return Item(pdf=content, path=f"{where}.pdf", pages=_pages(value.get("pages"), f"{where}.pages"))
    return Item(text=content, path=where) if kind == "text" else Item(image=content, path=f"{where}.image")


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
    raise invalid(where, f'{where} is numbers and ranges from 1 that ascend, such as "1-4,9" or "10-"', value)


def _check_others(value: Mapping[str, object], known: set[str], where: str, allowed: str) -> None:
    others = [str(name) for name in value if name not in known | _ITEM_HARMLESS and value[name] is not None]
    if others:
        raise invalid(where, f"{where} holds {shorten(', '.join(others))}, which is not offered; {allowed}")


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_not_empty(items: Sequence[Item]) -> None:
    """Refuse texts of no token: they are empty, and no prefix stands before them.

    Raises:
        ApiError: 422, naming the item.
    """
    for item in items:
        if item.text == "":
            message = f"{item.path} is empty, and with prompt_name=none nothing stands before it"
            raise invalid(item.path, message, "")
