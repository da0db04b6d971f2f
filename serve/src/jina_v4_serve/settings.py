"""The `JINA_V4_*` variables: default, allowed values and purpose of each setting.

Docs, doctor and flags use these definitions. A bad value stops the program. Nothing is read at import.
"""

import ipaddress
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from jina_v4_serve.errors import OptionError

PREFIX = "JINA_V4_"
# The launcher sets these for every process of a server: the tasks, and their revisions in the same order.
SERVED_TASKS = f"{PREFIX}SERVED_TASKS"
SERVED_REVISIONS = f"{PREFIX}SERVED_REVISIONS"
LogStyle = Literal["plain", "json", "verbose"]

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]+)?")
_USUAL_PORT = re.compile(r"(?<=^http)(://.*):80$|(?<=^https)(://.*):443$")
_HOST_NAME = re.compile(r"(?![0-9.]+$)[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")


def _count(variable: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) == 0:
        raise OptionError(f"{variable}={text} is not offered; choose a whole number above 0")
    return int(text)


def _key(variable: str, text: str) -> str:
    if not text:
        raise OptionError(f"{variable} is empty; set it to a key, or unset it to serve everybody")
    return text


def _log_style(variable: str, text: str) -> str:
    if text not in get_args(LogStyle):
        raise OptionError(f"{variable}={text} is not offered; choose {' or '.join(get_args(LogStyle))}")
    return text


def _words(text: str) -> list[str]:
    return [part.strip().lower() for part in text.split(",") if part.strip()]


def _origins(variable: str, text: str) -> frozenset[str]:
    for origin in _words(text):
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise OptionError(
                f"{variable}: {origin} is not an origin; write origins without a path, separated by commas, such as"
                " https://app.example,http://localhost:5173, or * for every page"
            )
    return frozenset(_USUAL_PORT.sub(r"\1\2", origin) for origin in _words(text))  # as browsers write it


def _hosts(variable: str, text: str) -> frozenset[str]:
    return frozenset(_host(variable, host) for host in _words(text))


def _host(variable: str, host: str) -> str:
    try:
        return str(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")))
    except ValueError as error:
        if _HOST_NAME.fullmatch(host):
            return host
        raise OptionError(
            f"{variable}: {host} is not a host; write names or addresses separated by commas, such as minio,10.0.0.5,"
            " without scheme, port, path, range or *"
        ) from error


def _setting(default: Any, read: Callable[[str, str], Any], shown: str, about: str) -> Any:
    """Define a setting.

    Args:
        default: the value if the variable is empty or not set.
        read: makes the value from the variable's name and text.
        shown: the default, as the docs write it.
        about: the purpose, as the docs write it.
    """
    return field(default=default, metadata={"read": read, "shown": shown, "about": about})


@dataclass(frozen=True)
class Settings:
    """All settings. The variable of a setting is `JINA_V4_` and its name in capitals."""

    api_key: str = _setting(
        "", _key, "none", "the key that callers must send as `Authorization: Bearer`; one line of ASCII"
    )
    api_key_file: str = _setting("", lambda _, text: text, "none", "a file that holds the key, or [several](#keys)")
    allowed_origins: frozenset[str] = _setting(
        frozenset(),
        _origins,
        "none",
        "[web pages](#connections-and-web-pages) that may call from a browser: `https://app.example`, or `*`",
    )
    max_body_bytes: int = _setting(64 * 2**20, _count, "64 MiB", "largest body of a request")
    body_timeout_s: int = _setting(30, _count, "30", "seconds within which a request's body must arrive")
    max_items: int = _setting(2048, _count, "2048", "items of a request")
    max_tokens_in_flight: int | None = _setting(
        None, _count, "10 s of work", "over it, requests get 429 with Retry-After before any work"
    )
    max_image_bytes: int = _setting(20 * 2**20, _count, "20 MiB", "largest file of an image")
    max_image_pixels: int = _setting(64_000_000, _count, "64 million", "largest image, before it is scaled down")
    max_pdf_bytes: int = _setting(64 * 2**20, _count, "64 MiB", "the PDF files of a request, together")
    max_pdf_pages: int = _setting(100, _count, "100", "the pages of a request's PDF files, together")
    pdf_timeout_s: int = _setting(30, _count, "30", "seconds of processor time to render a request's PDF files")
    pdf_memory_bytes: int = _setting(2 * 2**30, _count, "2 GiB", "memory of the process that renders them")
    fetch_timeout_s: int = _setting(10, _count, "10", "seconds for the URL of an image or PDF file, redirects included")
    image_hosts: frozenset[str] = _setting(
        frozenset(), _hosts, "none", "private hosts that these URLs may lead to: `minio,10.0.0.5`"
    )
    hung_after_s: int | None = _setting(
        None,
        _count,
        "measured",
        "seconds: a server is restarted if its engine has work but finishes no step in this time",
    )
    servers_on_machine: int = _setting(
        1, _count, "1", "servers in containers that share this machine's cores, as these do not know of each other"
    )
    log: LogStyle = _setting(  # noqa: RUF009 - it is a dataclass field
        "plain",
        _log_style,
        "`plain`",
        "`verbose`: vLLM's log on the screen; `json`: JSON there, and [a line for every request](monitoring.md#logs)",
    )
    log_dir: str = _setting(
        "",
        lambda _, text: text,
        "`~/.local/state/jina-v4-serve`",
        "the folder of [vLLM's log](#what-a-start-shows): a file per server",
    )


def variable_of(name: str) -> str:
    """Return the variable of a setting."""
    return PREFIX + name.upper()


VARIABLES = tuple(variable_of(setting.name) for setting in fields(Settings))


def read_settings() -> Settings:
    """Read all settings from the environment. An empty variable counts as not set.

    Raises:
        OptionError: a value is not allowed; the message names the variable and the allowed values.
    """
    values = {}
    for setting in fields(Settings):
        variable = variable_of(setting.name)
        text = os.environ.get(variable, "")
        # A key of white space alone is a mistake and must not open the server to all. A key file wins over the key.
        is_blank_key = (
            text and setting.name == "api_key" and not os.environ.get(variable_of("api_key_file"), "").strip()
        )
        if text.strip() or is_blank_key:
            values[setting.name] = setting.metadata["read"](variable, text.strip())
    return Settings(**values)


@dataclass(frozen=True)
class Served:
    """What this server serves.

    Attributes:
        tasks: in the order of the revisions.
        revisions: by task; empty if the launcher did not start this server.
    """

    tasks: tuple[str, ...]
    revisions: Mapping[str, str]


def read_served() -> Served:
    """Read tasks and revisions from the variables that the launcher has set."""
    tasks = tuple(os.environ[SERVED_TASKS].split(","))
    revisions = os.environ.get(SERVED_REVISIONS)
    return Served(tasks, dict(zip(tasks, revisions.split(","), strict=True)) if revisions else {})


def served_environment(tasks: Sequence[str], revisions: Sequence[str] = ()) -> dict[str, str]:
    """Return the variables that `read_served` reads."""
    variables = {SERVED_TASKS: ",".join(tasks)}
    return variables | ({SERVED_REVISIONS: ",".join(revisions)} if revisions else {})
