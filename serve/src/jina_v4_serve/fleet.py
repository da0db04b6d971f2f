"""All three tasks on one machine: a supervised server each, started one after another, and the gateway before them."""

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from jina_v4_serve.checkpoint import BASE
from jina_v4_serve.errors import OptionError, PortError
from jina_v4_serve.gateway.run import GatewaySettings, running
from jina_v4_serve.launcher import PORTS, Launch, Settings, check_port, find_vllm, prepare
from jina_v4_serve.supervisor import Supervisor, first, on_signals, say, server_url, worker_command

_HOST = "127.0.0.1"  # of the servers: the gateway alone is for others to reach
USABLE = 0.9  # of the GPU's free memory; the rest is for what vLLM's own account leaves out


@dataclass(frozen=True)
class FleetSettings:
    """What `all` is started with; as `Settings` of one server, but for the address, which is the gateway's.

    Attributes:
        checkpoints: the folder that holds the three merged checkpoints; with `one_base` the one of an export.
        one_base: one server for all tasks, with the base once and the adapters beside it.
    """

    checkpoints: Path
    host: str = "127.0.0.1"
    port: int = 8000
    dtype: str = "auto"
    max_pixels: int | None = None
    max_body_bytes: int = 64 * 2**20
    vllm_options: tuple[str, ...] = ()
    one_base: bool = False


async def serve_fleet(settings: FleetSettings) -> int:
    """Run three servers, or one for all tasks, and the gateway until told to stop, or until no server can be kept.

    Returns:
        The exit code of the program.

    Raises:
        ServeError: what can be known to be wrong before anything is started.
    """
    check_port(settings.host, settings.port)
    folders = {task: settings.checkpoints / f"jina-embeddings-v4-{task}" for task in PORTS}
    if settings.one_base:
        folders = {BASE: settings.checkpoints / BASE}
    options = (*memory_options(len(folders)), *settings.vllm_options)
    taken = {settings.port}
    servers: dict[str, Supervisor] = {}
    urls: dict[str, str] = {}
    starting = asyncio.Lock()
    for name, folder in folders.items():
        port = choose_port(PORTS.get(name, min(PORTS.values())), taken)
        taken.add(port)
        server = Settings(
            task=name,
            checkpoint=folder,
            host=_HOST,
            port=port,
            dtype=settings.dtype,
            max_pixels=settings.max_pixels,
            vllm_options=options,
            n_servers=len(folders),
        )
        launch = prepare(server)
        say(launch.banner)
        url = server_url(_HOST, port, options)
        urls |= dict.fromkeys(server.tasks, url)
        servers[name] = supervisor_of(name, url, launch, starting)
    return await Fleet(servers, GatewaySettings(urls, settings.host, settings.port, settings.max_body_bytes)).run()


def supervisor_of(task: str, url: str, launch: Launch, starting: asyncio.Lock) -> Supervisor:
    """Make the supervisor of one server; its log lines say of which task they are, or that they are the base's."""
    environment = {"VLLM_LOGGING_PREFIX": f"[{task}] ", **launch.environment}
    return Supervisor(task, worker_command(launch.arguments, launch.options), url, environment, starting=starting)


class Fleet:
    """Servers that are started in their order, and a gateway before them for as long as one of them lives."""

    def __init__(self, servers: dict[str, Supervisor], gateway: GatewaySettings) -> None:
        self._servers = servers
        self._gateway = gateway
        self._stop = asyncio.Event()
        self._at_once = asyncio.Event()

    def stop(self) -> None:
        """Answer what is in flight, then end everything; asked a second time, wait for nothing."""
        if self._stop.is_set():
            self._at_once.set()
            for server in self._servers.values():
                server.stop()
        self._stop.set()

    async def run(self) -> int:
        """Run until told to stop or no server can be kept.

        Returns:
            0 or 130 after `stop`, else the exit code of a server.
        """
        exit_code = on_signals(self.stop)
        stopping: asyncio.Task[bool] = asyncio.create_task(self._stop.wait())
        runs: dict[str, asyncio.Task[int]] = {}
        try:
            for task, server in self._servers.items():
                runs[task] = asyncio.create_task(server.run())
                await first(runs[task], server.ready.wait(), stopping)
                if self._stop.is_set():
                    return exit_code()
                if runs[task].done():
                    say(f"error: the {task} server did not start; the others are ended")
                    return runs[task].result()
            async with running(self._gateway, self._at_once):
                all_ended = asyncio.gather(*runs.values())
                await first(stopping, all_ended)
            return exit_code() if self._stop.is_set() else max(all_ended.result())
        finally:
            stopping.cancel()
            for server in self._servers.values():
                server.stop()
            await asyncio.gather(*runs.values(), return_exceptions=True)


def choose_port(wanted: int, taken: set[int]) -> int:
    """Return the wanted port of 127.0.0.1, or any free one when it is in use."""
    if wanted not in taken:
        with contextlib.suppress(PortError):
            check_port(_HOST, wanted)
            return wanted
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def memory_options(n_servers: int) -> tuple[str, ...]:
    """Return the option of vLLM by which several servers fit one GPU; none for the CPU build.

    Raises:
        OptionError: when nvidia-smi does not tell how much memory is free.
    """
    if find_vllm():
        return ()
    free, total = gpu_memory_mib() or (1, 1)  # where nothing tells, take the GPU for empty
    return (f"--gpu-memory-utilization={memory_share(free, total, n_servers):.3f}",)


def gpu_memory_mib() -> tuple[float, float] | None:
    """Return the free and the whole memory of the GPU that servers get; None where there is no nvidia-smi.

    Raises:
        OptionError: when it does not tell.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    command = [program, "-i", device, "--query-gpu=memory.free,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        free, total = (float(part) for part in answer.strip().split(","))
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        raise OptionError(
            f"cannot tell the free memory of GPU {device} ({error}); say it with -- --gpu-memory-utilization=SHARE"
        ) from error
    return free, total


def memory_share(free: float, total: float, n_servers: int) -> float:
    """Return the share of a GPU's whole memory that each of several servers may use."""
    return USABLE * free / total / n_servers
