"""Start and stop: the listening socket opens after the first probe of every server, and closes before all else."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web
from yarl import URL

from jina_v4_serve.api.door import Door
from jina_v4_serve.api.log import log_lines
from jina_v4_serve.errors import OptionError
from jina_v4_serve.facts import GATEWAY_PORT, TASKS
from jina_v4_serve.gateway.app import Gateway
from jina_v4_serve.gateway.bodies import Bodies
from jina_v4_serve.gateway.connection import Listener
from jina_v4_serve.gateway.metrics import GatewayMetrics
from jina_v4_serve.gateway.servers import Servers
from jina_v4_serve.launch import cpu
from jina_v4_serve.launch.arguments import DRAIN_S
from jina_v4_serve.launch.checks import check_port
from jina_v4_serve.launch.screen import say
from jina_v4_serve.launch.stopping import Stop, on_signals
from jina_v4_serve.settings import read_settings
from jina_v4_serve.watched_file import WatchedFile

# A request that a client sent before it could know that we stop arrives within this time.
_LINGER_S = 0.5
_SHARE = 4  # of the memory, a quarter is for bodies: under `all` the servers have the rest


@dataclass(frozen=True)
class GatewaySettings:
    """Settings of the gateway.

    Attributes:
        servers: addresses by task.
        host: to listen on.
        port: to listen on.
        max_body_bytes: of a request.
        max_bodies_bytes: of all requests in flight together; None for a quarter of the memory.
        timeout_s: longest silence of a server before and within its answer.
        drain_s: time to answer the requests that are in flight at a SIGTERM.
        servers_file: names the servers instead, and is read again when it changes and on SIGHUP.
        default_task: of requests that name no task; None refuses them.
    """

    servers: Mapping[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = GATEWAY_PORT
    max_body_bytes: int = 64 * 2**20
    max_bodies_bytes: int | None = None
    timeout_s: float = 600.0
    drain_s: float = DRAIN_S
    servers_file: Path | None = None
    default_task: str | None = None


def parse_servers(arguments: Sequence[str]) -> dict[str, str]:
    """Read the TASK=URL arguments of --server.

    Raises:
        OptionError: one is not of that form, or names a task twice.
    """
    return _parse((argument, f"--server {argument}") for argument in arguments)


def _parse(arguments: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Read TASK=URL arguments, each with the words by which an error names it."""
    servers: dict[str, str] = {}
    for argument, place in arguments:
        task, _, url = argument.partition("=")
        if task not in TASKS:
            raise OptionError(f"{place}: the task before the = is one of {', '.join(TASKS)}")
        if task in servers:
            raise OptionError(f"{place}: there is a server for {task} already")
        if not _is_address(url):
            raise OptionError(f"{place}: write an address such as http://127.0.0.1:8001 after the =")
        servers[task] = url.rstrip("/")
    return servers


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        port = parts.port
        (URL(url).host or "").encode("idna")  # as it is looked up later
    except ValueError:  # UnicodeError is one
        return False
    plain = parts.path in ("", "/") and not parts.query and not parts.fragment and parts.username is None
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0 and plain


def read_servers(path: Path) -> dict[str, str]:
    """Read a file of TASK=URL lines; a # begins a comment.

    Raises:
        OptionError: it cannot be read, names no server, or a line is not of that form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot read {path}: {error}") from error
    entries = [(i, line.partition("#")[0].strip()) for i, line in enumerate(lines, 1)]
    servers = _parse((entry, f"{path}:{i}: {entry}") for i, entry in entries if entry)
    if not servers:
        raise OptionError(f"{path} names no server; write a line such as retrieval=http://127.0.0.1:8001 into it")
    return servers


@contextlib.asynccontextmanager
async def running(settings: GatewaySettings, at_once: asyncio.Event) -> AsyncIterator[Gateway]:
    """Run the gateway for the length of a block; at its end, answer what is in flight unless `at_once` is set.

    Raises:
        PortError: the address cannot be listened on.
        OptionError: a setting is out of range.
    """
    common = replace(read_settings(), max_body_bytes=settings.max_body_bytes)
    if common.log == "json":
        log_lines("json")
    check_port(settings.host, settings.port)
    file = WatchedFile(settings.servers_file) if settings.servers_file else None
    urls = read_servers(file.path) if file else settings.servers
    if settings.default_task is not None and settings.default_task not in urls:
        raise OptionError(f"--default-task {settings.default_task} has no server; choose {', '.join(urls)}")
    servers = Servers(urls, settings.timeout_s)
    bodies = Bodies(settings.max_bodies_bytes or cpu.memory_bytes() // _SHARE)
    gateway = Gateway(servers, GatewayMetrics(), Door(common), bodies, common.log, settings.default_task)
    runner = web.ServerRunner(Listener(gateway.handle, handler_cancellation=True), shutdown_timeout=1.0)
    await runner.setup()
    watches: list[asyncio.Task[None]] = []
    try:
        await servers.check_all()
        watches.append(asyncio.create_task(servers.watch()))
        if file is not None:
            watches.append(asyncio.create_task(_follow(file, gateway)))
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, file.read_again)
        site = web.TCPSite(runner, settings.host, settings.port, backlog=1024)
        await site.start()
        say(f"the gateway answers on http://{settings.host}:{settings.port}/v1 for {', '.join(servers.urls)}")
        yield gateway
        gateway.draining = True
        await site.stop()  # closes the listening socket; open connections live on
        await _until_idle(gateway, settings.drain_s, at_once)
    finally:
        for watch in watches:
            watch.cancel()
        await runner.cleanup()
        await servers.session.close()


async def _follow(file: WatchedFile, gateway: Gateway) -> None:
    """Have the gateway use the servers in a file, each time the file is to be read again."""
    while True:
        await file.changed()
        try:
            urls = read_servers(file.path)
            await gateway.servers.replace(urls)
        except Exception as error:  # whatever it is, the next change of the file must be followed
            say(f"error: {error}. The servers stay as they are")
            continue
        gateway.metrics.prepare(urls)
        states = gateway.servers.states
        say(f"the servers are now {', '.join(f'{task}={url} ({states[task]})' for task, url in urls.items())}")


async def _until_idle(gateway: Gateway, drain_s: float, at_once: asyncio.Event) -> None:
    deadline = asyncio.get_running_loop().time() + drain_s
    await asyncio.sleep(_LINGER_S)
    while gateway.in_flight and not at_once.is_set() and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.05)


async def run_gateway(settings: GatewaySettings) -> int:
    """Run the gateway until a signal stops it, the second signal at once; return the exit code of the program."""
    stop = Stop()
    on_signals(stop)
    async with running(settings, stop.at_once):
        await stop.asked.wait()
    return stop.exit_code
