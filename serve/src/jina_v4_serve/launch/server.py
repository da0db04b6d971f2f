"""The settings of one server, its address, and what it answers there."""

import json
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jina_v4_serve.checkpoint import BASE, STORED_DTYPES
from jina_v4_serve.facts import TASKS
from jina_v4_serve.launch.options import says_tls

DTYPES = ("auto", *STORED_DTYPES)
LOCAL = "127.0.0.1"  # for servers that only this machine may reach
LOOPBACK = (LOCAL, "localhost", "::1")


@dataclass(frozen=True)
class ServerSettings:
    """The settings of one server, from the flags of `jina-v4-serve`.

    Attributes:
        task: "base" is an exported base with the adapters of all tasks.
        checkpoint: the folder of the checkpoint.
        host: to listen on.
        port: to listen on.
        dtype: "auto" is the checkpoint's own, or float32 on a processor that is faster in it.
        max_pixels: the largest image area; None is the checkpoint's own.
        vllm_options: the user's options for vLLM.
        n_servers: how many servers share this machine.
    """

    task: str
    checkpoint: Path
    host: str = "127.0.0.1"
    port: int = 0
    dtype: str = "auto"
    max_pixels: int | None = None
    vllm_options: tuple[str, ...] = ()
    n_servers: int = 1

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that are served."""
        return TASKS if self.task == BASE else (self.task,)


@dataclass(frozen=True)
class Launch:
    """How to start a server.

    Attributes:
        arguments: our arguments of `vllm serve`.
        options: the user's options, which win over ours.
        environment: the variables to add.
        url: the server's address, without a path.
        banner: the lines to show before the start.
    """

    arguments: tuple[str, ...]
    options: tuple[str, ...]
    environment: dict[str, str]
    url: str
    banner: str

    @property
    def command(self) -> list[str]:
        """The command of the process that runs vLLM."""
        # -P: no module is imported from the current folder, which may have one with the same name.
        python = (sys.executable, "-P", "-m", "jina_v4_serve.vllm_side.worker")
        return [*python, json.dumps(self.arguments), json.dumps(self.options)]


def server_url(host: str, port: int, options: Sequence[str] = ()) -> str:
    """Return the URL at which this machine can reach a server that listens on an address."""
    reachable = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - not bound here
    scheme = "https" if says_tls(options) else "http"
    return f"{scheme}://[{reachable}]:{port}" if ":" in reachable else f"{scheme}://{reachable}:{port}"


def json_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in the body of a reply; {} if it has none."""
    try:
        content = json.loads(body)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def free_port() -> int:
    """Return a port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind((LOCAL, 0))
        return int(probe.getsockname()[1])
