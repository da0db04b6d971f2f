"""All three tasks on one machine: a supervised server each, and the gateway before them once all are ready."""

import asyncio
import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jina_v4_serve.checkpoint import BASE
from jina_v4_serve.errors import OptionError, PortError
from jina_v4_serve.facts import GATEWAY_PORT, PORTS, TASKS, model_name
from jina_v4_serve.gateway.run import GatewaySettings, running
from jina_v4_serve.gateway.servers import State
from jina_v4_serve.launch.checks import check_port, prepare
from jina_v4_serve.launch.options import says_tls
from jina_v4_serve.launch.screen import Screen, example, open_logs, say, say_checked
from jina_v4_serve.launch.server import Launch, ServerSettings
from jina_v4_serve.launch.supervisor import LOCAL, Supervisor, first, free_port, on_signals, server_url, supervisor_of
from jina_v4_serve.settings import variable_of
from jina_v4_serve.vllm_side.versions import find_vllm


@dataclass(frozen=True)
class FleetSettings:
    """Settings of `all`; as `ServerSettings` of one server, but the address is the gateway's.

    Attributes:
        checkpoints: the folder that holds the three merged checkpoints; with `one_base` the one of an export.
        one_base: one server for all tasks, with the base once and the adapters beside it.
        default_task: of requests that name no task; None refuses them.
        verbose: vLLM's logs on the screen.
    """

    checkpoints: Path
    host: str = "127.0.0.1"
    port: int = GATEWAY_PORT
    dtype: str = "auto"
    max_pixels: int | None = None
    max_body_bytes: int = 64 * 2**20
    vllm_options: tuple[str, ...] = ()
    one_base: bool = False
    default_task: str | None = None
    verbose: bool = False


async def serve_fleet(settings: FleetSettings) -> int:
    """Run three servers, or one for all tasks, and the gateway, until a signal or until every server has failed.

    Returns:
        The exit code of the program.

    Raises:
        ServeError: a setting, a checkpoint or an address is wrong; nothing was started.
    """
    began = time.monotonic()
    if says_tls(settings.vllm_options):
        raise OptionError(
            "--ssl-* is for a server alone: under `all` the gateway answers callers, and it speaks HTTP."
            " Put a proxy that speaks HTTPS before it"
        )
    check_port(settings.host, settings.port)
    os.environ[variable_of("max_body_bytes")] = str(settings.max_body_bytes)  # the servers' limit is the gateway's
    folders = {task: settings.checkpoints / model_name(task) for task in TASKS}
    if settings.one_base:
        folders = {BASE: settings.checkpoints / BASE}
    options = settings.vllm_options
    taken = {settings.port}
    launches: list[tuple[ServerSettings, Launch]] = []
    for name, folder in folders.items():
        port = choose_port(PORTS.get(name, min(PORTS.values())), taken)
        taken.add(port)
        server = ServerSettings(
            task=name,
            checkpoint=folder,
            host=LOCAL,
            port=port,
            dtype=settings.dtype,
            max_pixels=settings.max_pixels,
            vllm_options=options,
            n_servers=len(folders),
        )
        launch = prepare(server)
        say(launch.banner)
        launch.environment.setdefault("VLLM_LOGGING_PREFIX", f"[{name}] ")
        launches.append((server, launch))
    logs = open_logs([server for server, _ in launches], settings.verbose)
    say_checked(began)
    servers: dict[str, Supervisor] = {}
    urls: dict[str, str] = {}
    # While a server starts on a GPU, vLLM measures its memory: no other may start there. On a CPU all sizes are set,
    # and a start uses one core: on two cores, three at the same time take half as long as one after the other.
    starting = None if find_vllm() else asyncio.Lock()
    for (server, launch), log in zip(launches, logs, strict=True):
        screen = Screen(server.task, log, label=f"[{server.task}] ")
        servers[server.task] = supervisor_of(server, launch, screen, starting=starting)
        urls |= dict.fromkeys(server.tasks, servers[server.task].url)
    gateway = GatewaySettings(
        urls, settings.host, settings.port, settings.max_body_bytes, default_task=settings.default_task
    )
    return await Fleet(servers, gateway, began).run()


class Fleet:
    """Starts servers, and runs a gateway before them as long as one of them lives."""

    def __init__(self, servers: dict[str, Supervisor], gateway: GatewaySettings, began: float | None = None) -> None:
        """Prepare; `run` starts.

        Args:
            servers: by name.
            gateway: before them.
            began: when this program did, a monotonic time in seconds; None for now.
        """
        self._began = began or time.monotonic()
        self._servers = servers
        self._gateway = gateway
        self._stop = asyncio.Event()
        self._at_once = asyncio.Event()

    def stop(self) -> None:
        """Answer what is in flight, then end everything; called a second time, wait for nothing."""
        if self._stop.is_set():
            self._at_once.set()
            for server in self._servers.values():
                server.stop()
        self._stop.set()

    async def run(self) -> int:
        """Run until `stop`, or until every server has failed.

        Returns:
            0 or 130 after `stop`, else the exit code of a server.
        """
        exit_code = on_signals(self.stop)
        stopping: asyncio.Task[bool] = asyncio.create_task(self._stop.wait())
        runs: dict[str, asyncio.Task[int]] = {}
        try:
            for task, server in self._servers.items():
                runs[task] = asyncio.create_task(server.run())
            all_ready = asyncio.gather(*(server.ready.wait() for server in self._servers.values()))
            await first(*runs.values(), all_ready, stopping)
            if self._stop.is_set():
                return exit_code()
            for task, run in runs.items():
                if run.done():
                    say(f"error: the {task} server did not start; the others are ended")
                    return run.result()
            async with running(self._gateway, self._at_once) as gateway:
                self._say_ready(gateway.servers.states)
                all_ended = asyncio.gather(*runs.values())
                await first(stopping, all_ended)
            return exit_code() if self._stop.is_set() else max(all_ended.result())
        finally:
            stopping.cancel()
            for server in self._servers.values():
                server.stop()
            await asyncio.gather(*runs.values(), return_exceptions=True)

    def _say_ready(self, states: Mapping[str, State]) -> None:
        url = server_url(self._gateway.host, self._gateway.port)
        ready = [task for task, state in states.items() if state == "ready"]
        if ready:
            but = f", but not for {', '.join(states.keys() - ready)}" if len(ready) < len(states) else ""
            say(f"ready on {url}/v1 after {time.monotonic() - self._began:.0f} s{but}")
            say(f"try: {example(url, ready[0])}")


def choose_port(preferred: int, taken: set[int]) -> int:
    """Return the preferred port of 127.0.0.1, or any free one when it is in use."""
    if preferred not in taken:
        with contextlib.suppress(PortError):
            check_port(LOCAL, preferred)
            return preferred
    return free_port()
