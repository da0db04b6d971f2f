"""`messages`, as in vLLM's chat embeddings: a chat with one user turn, which is a text or an image.

The caller's chat template is not used. A text gets its prefix, and an image the published image prompt, as everywhere.
"""

from jina_v4_serve.api.errors import invalid, shorten
from jina_v4_serve.api.forms.items import check_count, other_names, read_content
from jina_v4_serve.api.request import Item

_INSTRUCTIONS = ("system", "developer")
_MESSAGE_HARMLESS = {"role", "content", "name", "id"}


def read_messages(value: object, max_items: int) -> tuple[list[Item], list[str]]:
    """Read one chat, or a list of chats.

    Returns:
        An item per chat, and the paths of the instructions that were left out.

    Raises:
        ApiError: 422 with the path of the wrong message.
    """
    if not isinstance(value, list) or not value:
        raise invalid("messages", "messages is a list of messages, or a list of chats", value)
    many = isinstance(value[0], list)
    chats = value if many else [value]
    check_count(chats, "messages", max_items, "chats")
    items: list[Item] = []
    left_out: list[str] = []
    for i, chat in enumerate(chats):
        items.append(_read_chat(chat, f"messages[{i}]" if many else "messages", left_out))
    return items, left_out


def _read_chat(chat: object, where: str, left_out: list[str]) -> Item:
    if not isinstance(chat, list):
        raise invalid(where, f"{where} is a list of messages", chat)
    turns: list[Item] = []
    for i, message in enumerate(chat):
        path = f"{where}[{i}]"
        if not isinstance(message, dict):
            raise invalid(path, f'{path} is a message: {{"role": "user", "content": ...}}', message)
        if others := other_names(message, _MESSAGE_HARMLESS):
            raise invalid(path, f"{path} has {shorten(', '.join(others))}; a message has only role and content")
        role, content = message.get("role"), message.get("content")
        if role in _INSTRUCTIONS:
            left_out.append(path)
        elif role == "user":
            turns.append(read_content(content, f"{path}.content"))
        elif role != "assistant" or not _is_empty(content):  # vLLM's examples end with an empty answer
            message = f"{path}.role={shorten(role)} is not offered; a chat has one user turn"
            raise invalid(f"{path}.role", message, role)
    if len(turns) != 1:
        raise invalid(where, f"{where} has {len(turns)} user turns; send one, which is a text or an image")
    return turns[0]


def _is_empty(content: object) -> bool:
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) and part.keys() <= {"type", "text"} else part for part in parts]
    return all(text in ("", None) for text in texts)
