"""The pages of gateway and Ray ingress that merge their servers' pages: the list of models, and `/ready`."""

import json
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

from jina_v4_serve.api.door import revisions_in
from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.gateway.forward import RETRY_AFTER_S, unavailable
from jina_v4_serve.gateway.servers import Page


def good(pages: Mapping[str, Page]) -> dict[str, Page]:
    """Return the pages with status 200, by task."""
    return {task: page for task, page in pages.items() if page.status == HTTPStatus.OK}


def merge_models(pages: Mapping[str, Page], tasks: Iterable[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Merge the servers' replies to `GET /v1/models`.

    Returns:
        The list, and the headers that describe the servers.

    Raises:
        ApiError: 401 if the servers refuse the key, 503 if no server is ready.
    """
    lists = good(pages)
    if not lists and any(page.status == HTTPStatus.UNAUTHORIZED for page in pages.values()):
        raise ApiError(401, "the servers did not accept the API key", code="UNAUTHORIZED")
    if not lists:
        raise unavailable(*tasks)
    cards: dict[str, dict[str, object]] = {}
    for page in lists.values():
        for card in json.loads(page.body)["data"]:
            cards.setdefault(card["id"], card)  # all servers list the name without a task
    # These tell a client that vectors are pooled, and for which tasks.
    headers = {"X-Jina-V4-Task": ", ".join(lists)}
    pooling = {page.headers.get("X-Jina-V4-Pooling", "") for page in lists.values()}
    if len(pooling) == 1:
        headers["X-Jina-V4-Pooling"] = pooling.pop()
    revisions = [revisions_in(page.headers).get(task, "") for task, page in lists.items()]
    if all(revisions):
        headers["X-Jina-V4-Revision"] = ", ".join(revisions)  # in the order of the tasks
    return {"object": "list", "data": list(cards.values())}, headers


def ready_page(states: Mapping[str, str]) -> tuple[dict[str, Any], int, dict[str, str]]:
    """Return content, status and headers of `/ready` for the states of the servers by task."""
    ready = all(state == "ready" for state in states.values())
    headers = {} if ready else {"Retry-After": str(RETRY_AFTER_S)}
    return {"ready": ready, "tasks": states}, 200 if ready else 503, headers
