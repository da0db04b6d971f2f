"""What one server is started with, and where it can be reached."""

import json
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jina_v4_serve.checkpoint import BASE, STORED_DTYPES
from jina_v4_serve.facts import TASKS
from jina_v4_serve.launch.options import says_tls

DTYPES = ("auto", *STORED_DTYPES)
LOCAL = "127.0.0.1"  # of servers that only this machine may reach


@dataclass(frozen=True)
class ServerSettings:
    """What one server is started with; the flags of `jina-v4-serve` are its fields.

    Attributes:
        task: "base" is an exported base with the adapters of all tasks.
        checkpoint: its folder.
        host: to listen on.
        port: to listen on.
        dtype: "auto" is the checkpoint's own, or float32 on a processor that is slow in it.
        max_pixels: largest image area; None is the checkpoint's own.
        vllm_options: the user's.
        n_servers: that share this machine.
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
    """All that a process needs to run vLLM with.

    Attributes:
        arguments: of vLLM's `serve`, ours.
        options: the user's, which win over ours.
        environment: variables beside those already set.
        url: where the server will answer, without a path.
        banner: what to tell the user before the start.
    """

    arguments: tuple[str, ...]
    options: tuple[str, ...]
    environment: dict[str, str]
    url: str
    banner: str

    @property
    def command(self) -> list[str]:
        """The command of the process that runs vLLM."""
        # -P: a folder of the user's with the name of a module of ours or of vLLM's must not be imported in its place.
        python = (sys.executable, "-P", "-m", "jina_v4_serve.vllm_side.worker")
        return [*python, json.dumps(self.arguments), json.dumps(self.options)]


def server_url(host: str, port: int, options: Sequence[str] = ()) -> str:
    """Return where a server that listens on an address can be reached from this machine."""
    reachable = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - not bound here
    scheme = "https" if says_tls(options) else "http"
    return f"{scheme}://[{reachable}]:{port}" if ":" in reachable else f"{scheme}://{reachable}:{port}"


def free_port() -> int:
    """Return a port of this machine's own address that nobody uses now."""
    with socket.socket() as probe:
        probe.bind((LOCAL, 0))
        return int(probe.getsockname()[1])
