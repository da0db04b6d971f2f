"""What a server's answers say to the program that watches it."""

import json
from http import HTTPStatus

import aiohttp

from jina_v4_serve.heartbeat import HUNG


def hung_reason(body: bytes) -> str | None:
    """Return why a server calls its engine hung, by its answer to /health; None where it does not."""
    try:
        content = json.loads(body)
        return str(content["reason"]) if content["status"] == HUNG else None
    except (ValueError, LookupError, TypeError):
        return None


async def failure_of(url: str, session: aiohttp.ClientSession) -> str | None:
    """Return why a server that answers computes no vectors; None where it does, or does not tell."""
    try:
        async with session.get(f"{url}/ready") as response:
            if response.status == HTTPStatus.SERVICE_UNAVAILABLE:
                return str(json.loads(await response.read())["reason"])
    except (TimeoutError, aiohttp.ClientError, ValueError, LookupError, TypeError):
        pass
    return None
