"""What an operator sets of the routes, from `JINA_V4_*` variables; a bad value stops the server."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jina_v4_serve.api.images import ImageLimits
from jina_v4_serve.errors import OptionError
from jina_v4_serve.plugin import SERVED_REVISIONS, SERVED_TASKS

KEY = "JINA_V4_API_KEY"
KEY_FILE = "JINA_V4_API_KEY_FILE"
LOG = "JINA_V4_LOG"
LogStyle = Literal["plain", "json"]


@dataclass(frozen=True)
class ApiSettings:
    """How the routes are guarded.

    Attributes:
        tasks: the tasks that are served.
        revisions: of what is served, by task; empty where the launcher did not start this.
        api_key: what callers must send as `Authorization: Bearer`; None lets everybody in.
        max_body_bytes: of a request.
        body_timeout_s: within which a body must have arrived.
        max_items: of a request.
        max_tokens_in_flight: past which requests are refused; None is 32 scheduling steps.
        images: what an image may cost.
        log: plain, which tells of failures only, or json, in which every request has a line.
    """

    tasks: tuple[str, ...]
    revisions: Mapping[str, str]
    api_key: str | None
    max_body_bytes: int
    body_timeout_s: float
    max_items: int
    max_tokens_in_flight: int | None
    images: ImageLimits
    log: LogStyle = "plain"


def read_settings(tasks: Sequence[str] | None = None) -> ApiSettings:
    """Read the settings from the environment.

    Args:
        tasks: that are served; where None, the launcher has put them into the environment.

    Raises:
        OptionError: naming the variable and what it may hold.
    """
    served = tuple(tasks or os.environ[SERVED_TASKS].split(","))
    revisions = os.environ.get(SERVED_REVISIONS)
    tokens = _count("JINA_V4_MAX_TOKENS_IN_FLIGHT", 0)
    return ApiSettings(
        tasks=served,
        revisions=dict(zip(served, revisions.split(","), strict=True)) if revisions else {},
        api_key=read_key(),
        max_body_bytes=_count("JINA_V4_MAX_BODY_BYTES", 64 * 2**20),
        body_timeout_s=_count("JINA_V4_BODY_TIMEOUT_S", 30),
        max_items=_count("JINA_V4_MAX_ITEMS", 2048),
        max_tokens_in_flight=tokens or None,
        images=ImageLimits(
            max_bytes=_count("JINA_V4_MAX_IMAGE_BYTES", 20 * 2**20),
            max_pixels=_count("JINA_V4_MAX_IMAGE_PIXELS", 64_000_000),
            fetch_timeout_s=_count("JINA_V4_FETCH_TIMEOUT_S", 10),
            hosts=frozenset(
                host.strip().lower() for host in os.environ.get("JINA_V4_IMAGE_HOSTS", "").split(",") if host
            ),
        ),
        log=read_log_style(),
    )


def read_key() -> str | None:
    """Read the API key from its variable or the file that another names; never from an argument.

    Raises:
        OptionError: the file cannot be read, or there is nothing in it.
    """
    if path := os.environ.get(KEY_FILE):
        try:
            key = Path(path).read_text().strip()
        except (OSError, ValueError) as error:
            raise OptionError(f"{KEY_FILE}: cannot read {path}: {error}") from error
        if not key:
            raise OptionError(f"{KEY_FILE}: {path} is empty")
        return key
    return os.environ.get(KEY) or None


def read_log_style() -> LogStyle:
    """Read how the log is to be written.

    Raises:
        OptionError: naming the variable and what it may hold.
    """
    match os.environ.get(LOG) or "plain":
        case "plain":
            return "plain"
        case "json":
            return "json"
        case other:
            raise OptionError(f"{LOG}={other} is not offered; choose plain or json")


def _count(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    if not value:
        return default
    if not value.isdecimal() or int(value) == 0:
        raise OptionError(f"{name}={value} is not offered; give a whole number above 0")
    return int(value)
