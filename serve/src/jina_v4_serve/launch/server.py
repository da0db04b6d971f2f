"""What one server is started with."""

from dataclasses import dataclass
from pathlib import Path

from jina_v4_serve.checkpoint import BASE, STORED_DTYPES
from jina_v4_serve.facts import TASKS

DTYPES = ("auto", *STORED_DTYPES)


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
        banner: what to tell the user before the start.
    """

    arguments: tuple[str, ...]
    options: tuple[str, ...]
    environment: dict[str, str]
    banner: str
