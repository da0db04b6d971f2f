"""Start and stop: the listening socket opens when every server was asked once, and closes before anything else does."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from aiohttp import web

from jina_v4_serve.api.log import log_json
from jina_v4_serve.api.settings import read_key, read_log_style
from jina_v4_serve.errors import OptionError
from jina_v4_serve.gateway.app import Gateway
from jina_v4_serve.gateway.metrics import GatewayMetrics
from jina_v4_serve.gateway.servers import Servers
from jina_v4_serve.launcher import DRAIN_S, PORTS, check_port
from jina_v4_serve.supervisor import on_signals, say

# What a client has sent before it could know that we stop arrives within this time.
_LINGER_S = 0.5


@dataclass(frozen=True)
class GatewaySettings:
    """What the gateway is started with.

    Attributes:
        servers: addresses by task.
        host: to listen on.
        port: to listen on.
        max_body_bytes: of a request.
        body_timeout_s: within which a request's body must have arrived.
        timeout_s: within which a server must begin, and go on with, its answer.
        drain_s: what is in flight at a SIGTERM has so long to be answered.
    """

    servers: Mapping[str, str]
    host: str = "127.0.0.1"
    port: int = 8000
    max_body_bytes: int = 64 * 2**20
    body_timeout_s: float = 60.0
    timeout_s: float = 600.0
    drain_s: float = DRAIN_S


def parse_servers(arguments: Sequence[str]) -> dict[str, str]:
    """Read TASK=URL arguments.

    Raises:
        OptionError: one is not of that form, or names a task twice.
    """
    servers: dict[str, str] = {}
    for argument in arguments:
        task, _, url = argument.partition("=")
        if task not in PORTS:
            raise OptionError(f"--server {argument}: the task before the = is one of {', '.join(PORTS)}")
        if task in servers:
            raise OptionError(f"--server {argument}: there is a server for {task} already")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/") or parts.query:
            raise OptionError(f"--server {argument}: after the = stands an address such as http://127.0.0.1:8001")
        servers[task] = url.rstrip("/")
    return servers


@contextlib.asynccontextmanager
async def running(settings: GatewaySettings, at_once: asyncio.Event) -> AsyncIterator[Gateway]:
    """Run the gateway for the length of a block; at its end, answer what is in flight.

    Args:
        settings: of the gateway.
        at_once: when set, nothing is waited for any more.

    Raises:
        PortError: the address cannot be listened on.
        OptionError: the file that is to hold the key does not, or the log can not be written as is asked.
    """
    key, log = read_key(), read_log_style()
    if log == "json":
        log_json()
    check_port(settings.host, settings.port)
    servers = Servers(settings.servers, settings.timeout_s)
    gateway = Gateway(servers, GatewayMetrics(), key, settings.max_body_bytes, settings.body_timeout_s, log)
    application = web.Application(client_max_size=settings.max_body_bytes)
    application.router.add_route("*", "/{path:.*}", gateway.handle)
    runner = web.AppRunner(
        application, access_log=None, handler_cancellation=True, auto_decompress=False, shutdown_timeout=1.0
    )
    await runner.setup()
    watch = None
    try:
        await servers.check_all()
        watch = asyncio.create_task(servers.watch())
        site = web.TCPSite(runner, settings.host, settings.port, backlog=1024)
        await site.start()
        say(f"the gateway answers on http://{settings.host}:{settings.port}/v1 for {', '.join(settings.servers)}")
        yield gateway
        gateway.draining = True
        await site.stop()  # closes the listening socket; open connections live on
        await _until_idle(gateway, settings.drain_s, at_once)
    finally:
        if watch is not None:
            watch.cancel()
        await runner.cleanup()
        await servers.session.close()


async def _until_idle(gateway: Gateway, drain_s: float, at_once: asyncio.Event) -> None:
    deadline = asyncio.get_running_loop().time() + drain_s
    await asyncio.sleep(_LINGER_S)
    while gateway.in_flight and not at_once.is_set() and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.05)


async def run_gateway(settings: GatewaySettings) -> int:
    """Run the gateway until it is told to stop; a second signal ends it at once.

    Returns:
        The exit code of the program.
    """
    stop, at_once = asyncio.Event(), asyncio.Event()

    def asked() -> None:
        if stop.is_set():
            at_once.set()
        stop.set()

    exit_code = on_signals(asked)
    async with running(settings, at_once):
        await stop.wait()
    return exit_code()
