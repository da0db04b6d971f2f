"""Starts and stops the gateway. It listens after the first probe of every server, and stops listening first."""

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
from jina_v4_serve.launch.checks import check_port, key_warning
from jina_v4_serve.launch.screen import say
from jina_v4_serve.launch.server import server_url
from jina_v4_serve.launch.stopping import Stop, on_signals
from jina_v4_serve.settings import Settings, read_settings
from jina_v4_serve.watched_file import WatchedFile

_LINGER_S = 0.5  # for requests that were sent before their client could notice the stop
_SHARE = 4  # a quarter of the memory is for bodies; under `all` the servers use the rest


@dataclass(frozen=True)
class GatewaySettings:
    """Settings of the gateway.

    Attributes:
        servers: addresses by task.
        host: to listen on.
        port: to listen on.
        max_body_bytes: of a request.
        max_bodies_bytes: of all requests in flight together; None for a quarter of the memory.
        timeout_s: the longest time without a byte from a server.
        drain_s: the time to answer the requests in flight after SIGTERM.
        servers_file: has the servers instead, and is read again when it changes and on SIGHUP.
        default_task: of requests that name no task; None refuses them.
    """

    servers: Mapping[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = GATEWAY_PORT
    max_body_bytes: int = Settings.max_body_bytes
    max_bodies_bytes: int | None = None
    timeout_s: float = 600.0
    drain_s: float = DRAIN_S
    servers_file: Path | None = None
    default_task: str | None = None


def parse_servers(arguments: Sequence[str]) -> dict[str, str]:
    """Read the TASK=URL arguments of --server.

    Raises:
        OptionError: an argument does not have this form, or a task occurs twice.
    """
    return _parse((argument, f"--server {argument}") for argument in arguments)


def _parse(arguments: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Read TASK=URL arguments, each with its place for error messages."""
    servers: dict[str, str] = {}
    for argument, place in arguments:
        task, _, url = argument.partition("=")
        if task not in TASKS:
            raise OptionError(f"{place}: the task before the = must be one of {', '.join(TASKS)}")
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
        (URL(url).host or "").encode("idna")  # the form in which it is looked up later
    except ValueError:  # UnicodeError is one
        return False
    plain = parts.path in ("", "/") and not parts.query and not parts.fragment and parts.username is None
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0 and plain


def read_servers(path: Path) -> dict[str, str]:
    """Read a file of TASK=URL lines; a # begins a comment.

    Raises:
        OptionError: the file cannot be read, has no server, or a line does not have this form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot read {path}: {error}") from error
    entries = [(i, line.partition("#")[0].strip()) for i, line in enumerate(lines, 1)]
    servers = _parse((entry, f"{path}:{i}: {entry}") for i, entry in entries if entry)
    if not servers:
        raise OptionError(f"{path} has no server; write a line such as retrieval=http://127.0.0.1:8001 into it")
    return servers


@contextlib.asynccontextmanager
async def running(settings: GatewaySettings, at_once: asyncio.Event) -> AsyncIterator[Gateway]:
    """Run the gateway during a block. At its end, answer the requests in flight, unless `at_once` is set.

    Raises:
        PortError: the gateway cannot listen on the address.
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
        # asyncio would listen on IPv6 alone for "::"; vLLM's servers listen on both.
        host = None if settings.host == "::" else settings.host
        site = web.TCPSite(runner, host, settings.port, backlog=1024)
        await site.start()
        say(f"the gateway answers on {server_url(settings.host, settings.port)}/v1 for {', '.join(servers.urls)}")
        for line in key_warning(settings.host):
            say(line)
        yield gateway
        gateway.draining = True
        await site.stop()  # closes the listening socket, but no open connection
        await _until_idle(gateway, settings.drain_s, at_once)
    finally:
        for watch in watches:
            watch.cancel()
        await runner.cleanup()
        await servers.session.close()


async def _follow(file: WatchedFile, gateway: Gateway) -> None:
    """Use the servers in a file, and read it again at each change."""
    while True:
        await file.changed()
        try:
            urls = read_servers(file.path)
            await gateway.servers.replace(urls)
        except Exception as error:  # of whatever kind: the next change of the file must still be seen
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
    """Run the gateway until a signal; a second signal stops it at once. Return the exit code of the program."""
    stop = Stop()
    on_signals(stop)
    async with running(settings, stop.at_once):
        await stop.requested.wait()
    return stop.exit_code
