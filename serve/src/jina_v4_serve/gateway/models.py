"""One list of models for all servers, with the headers by which a client knows them."""

import json
from collections.abc import Mapping
from typing import Any

from jina_v4_serve.gateway.servers import Page


def merge_models(pages: Mapping[str, Page]) -> tuple[dict[str, Any], dict[str, str]]:
    """Merge what the servers answer to `GET /v1/models`.

    Args:
        pages: by task; with status 200.

    Returns:
        The list, and the headers beside it.
    """
    cards: dict[str, dict[str, object]] = {}
    for page in pages.values():
        for card in json.loads(page.body)["data"]:
            cards.setdefault(card["id"], card)  # the name without a task is every server's
    # By these a client knows that vectors come pooled, and for which tasks.
    headers = {"X-Jina-V4-Task": ", ".join(pages)}
    ways = {page.headers.get("X-Jina-V4-Pooling", "") for page in pages.values()}
    if len(ways) == 1:
        headers["X-Jina-V4-Pooling"] = ways.pop()
    revisions = [_revision(page, task) for task, page in pages.items()]
    if all(revisions):
        headers["X-Jina-V4-Revision"] = ", ".join(revisions)  # in the order of the tasks
    return {"object": "list", "data": list(cards.values())}, headers


def _revision(page: Page, task: str) -> str:
    """Tell which revision a server has of a task; of several tasks it names all, in one order."""
    revisions = page.headers.get("X-Jina-V4-Revision", "").split(", ")
    if len(revisions) == 1:
        return revisions[0]
    tasks = page.headers.get("X-Jina-V4-Task", "").split(", ")
    return dict(zip(tasks, revisions, strict=False)).get(task, "")
