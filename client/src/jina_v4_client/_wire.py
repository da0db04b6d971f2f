"""Requests and replies as data, without sockets, and what a refusal says."""

import email.utils
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeGuard, get_args

from jina_v4_client.errors import (
    BadReplyError,
    ServerAuthenticationError,
    ServerError,
    ServerFailedError,
    ServerRefusedError,
)

WireDtype = Literal["float32", "float16"]
WIRE_DTYPES: Final[tuple[WireDtype, ...]] = get_args(WireDtype)
WireFormat = Literal["safetensors", "base64", "float"]
WIRE_FORMATS: Final[tuple[WireFormat, ...]] = get_args(WireFormat)  # what cannot do one does the next


# What a stock server must be started with, for messages.
STOCK_FLAGS = """--runner pooling --convert embed --pooler-config '{"task":"token_embed","use_activation":false}' \
--no-enable-prefix-caching"""


@dataclass(frozen=True)
class Request:
    """One HTTP request: a GET without a body, else a POST of JSON."""

    path: str
    body: Mapping[str, Any] | None = None
    accept: str = "application/json"


@dataclass(frozen=True)
class Reply:
    """What came back with status 200; its headers are found in any case."""

    headers: Mapping[str, str]
    content: bytes


def read_json(reply: Reply, url: str) -> dict[str, Any]:
    """Return the JSON object of a reply; anything else did not come from a server of this kind."""
    try:
        document = json.loads(reply.content)
    except (ValueError, RecursionError) as error:
        kind = reply.headers.get("content-type", "no content type")
        raise BadReplyError(
            f"{url} does not answer with JSON ({kind}): is base_url the address of the server?"
        ) from error
    if not isinstance(document, dict):
        raise BadReplyError(f"{url} answers with JSON that is no object: is base_url the address of the server?")
    return document


def is_list_of_dicts(value: object) -> TypeGuard[list[dict[str, Any]]]:
    """Tell whether this is a JSON list of objects."""
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def refusal(url: str, path: str, status: int, headers: Mapping[str, str], content: bytes) -> ServerError:
    """Make the error for a status that is not 200, with the server's own reason in one line."""
    reason, param = _reason(content)
    facts: dict[str, Any] = {"status_code": status, "retry_after_s": read_retry_after_s(headers, time.time())}
    if status in (401, 403):
        return ServerAuthenticationError(
            f"{url} did not accept the API key ({status}): give the server's key as api_key= or in JINA_V4_API_KEY",
            **facts,
        )
    if 300 <= status < 400:
        return ServerRefusedError(
            f"{url} is not there any more ({status}); it points to {headers.get('location')}: give that as base_url",
            **facts,
        )
    if status >= 500:
        return ServerFailedError(f"{url}{path} failed with status {status}: {reason}", **facts)
    if status == 404 and path == "/v1/models":
        reason = f"is base_url the address of the server? It says: {reason}"
    elif path == "/pooling" and (status == 404 or "pooler-config" in reason):
        reason = f"a stock vLLM must be started with {STOCK_FLAGS}. It says: {reason}"
    return ServerRefusedError(f"{url}{path} refused with status {status}: {reason}", param=param, **facts)


def _reason(content: bytes) -> tuple[str, str | None]:
    """Find the message in an error of vLLM, of a server of ours, of FastAPI or of a proxy, and the field it names."""
    text = content.decode("utf-8", "replace")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        document = None
    param = None
    if isinstance(document, dict):
        inner = document.get("error") or document.get("detail") or document
        message = inner.get("message") if isinstance(inner, dict) else inner
        param = inner.get("param") if isinstance(inner, dict) else None
        text = message if isinstance(message, str) else json.dumps(message or document)
    elif "<html" in text.lower():
        text = "an HTML page; is a proxy in the way?"
    line = " ".join(text.split()) or "no reason given"
    return line if len(line) <= 600 else f"{line[:600]}...", param if isinstance(param, str) else None


def read_retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """Read how long a server asks to be left alone; now, in seconds since 1970, is for a header that holds a date."""
    for name, per_second in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            seconds = float(headers.get(name, "")) / per_second
        except ValueError:
            continue
        if math.isfinite(seconds) and seconds >= 0:
            return seconds
    try:
        until = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        return max(0.0, until.timestamp() - now)
    except (ValueError, TypeError, OverflowError, OSError):
        return None
