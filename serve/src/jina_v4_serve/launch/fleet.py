"""Serves all tasks on one machine: supervised servers, and a gateway in front of them once all are ready."""

import asyncio
import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import replace

from jina_v4_serve.checkpoint import BASE
from jina_v4_serve.errors import OptionError, PortError
from jina_v4_serve.facts import PORTS, TASKS, model_name
from jina_v4_serve.gateway.run import GatewaySettings, running
from jina_v4_serve.gateway.servers import State
from jina_v4_serve.launch.checks import check_port, prepare
from jina_v4_serve.launch.options import says_tls
from jina_v4_serve.launch.screen import Screen, example, open_logs, say, say_checked
from jina_v4_serve.launch.server import LOCAL, Launch, ServerSettings, free_port, server_url
from jina_v4_serve.launch.stopping import Stop, on_signals
from jina_v4_serve.launch.supervisor import Supervisor, first_done
from jina_v4_serve.settings import variable_of
from jina_v4_serve.vllm_side.versions import find_vllm


async def serve_fleet(
    common: ServerSettings, gateway: GatewaySettings, one_base: bool = False, verbose: bool = False
) -> int:
    """Run three servers, or one for all tasks, and the gateway, until a signal or until every server has failed.

    Args:
        common: the settings of all servers; `checkpoint` is the folder that holds their checkpoints.
        gateway: the settings of the gateway; the addresses of the servers are added here.
        one_base: run one server for all tasks, which holds the base once and all adapters.
        verbose: show vLLM's logs on the screen.

    Returns:
        The exit code of the program.

    Raises:
        ServeError: a setting, a checkpoint or an address is wrong; nothing was started.
    """
    started_at = time.monotonic()
    if says_tls(common.vllm_options):
        raise OptionError(
            "--ssl-* is only offered for a single task: the gateway of `all` speaks HTTP."
            " Put an HTTPS proxy in front of it"
        )
    check_port(gateway.host, gateway.port)
    os.environ[variable_of("max_body_bytes")] = str(gateway.max_body_bytes)  # the servers' limit is the gateway's
    folders = {BASE: BASE} if one_base else {task: model_name(task) for task in TASKS}
    taken = {gateway.port}
    launches: list[tuple[ServerSettings, Launch]] = []
    for name, folder in folders.items():
        port = choose_port(PORTS.get(name, min(PORTS.values())), taken)
        taken.add(port)
        server = replace(
            common, task=name, checkpoint=common.checkpoint / folder, host=LOCAL, port=port, n_servers=len(folders)
        )
        launch = prepare(server)
        say(launch.banner)
        launch.environment.setdefault("VLLM_LOGGING_PREFIX", f"[{name}] ")
        launches.append((server, launch))
    logs = open_logs([server for server, _ in launches], verbose)
    say_checked(started_at)
    servers: dict[str, Supervisor] = {}
    urls: dict[str, str] = {}
    # vLLM measures the GPU's memory while it starts, so servers start there one after the other. On a CPU all sizes are
    # set, and a start uses one core: with two cores, three starts at once take half as long as one after the other.
    starting = None if find_vllm() else asyncio.Lock()
    for (server, launch), log in zip(launches, logs, strict=True):
        screen = Screen(server.task, log, label=f"[{server.task}] ")
        servers[server.task] = Supervisor(
            server.task, launch.command, launch.url, launch.environment, starting=starting, screen=screen
        )
        urls |= dict.fromkeys(server.tasks, launch.url)
    return await run_fleet(servers, replace(gateway, servers=urls), started_at)


async def run_fleet(servers: Mapping[str, Supervisor], gateway: GatewaySettings, started_at: float) -> int:
    """Start servers, and run a gateway in front of them until a signal, or until the last server has ended.

    At a signal the requests in flight are answered, then everything ends. A second signal ends it at once.

    Args:
        servers: by name.
        gateway: its settings, with the addresses of the servers.
        started_at: the start of this program, a monotonic time in seconds.

    Returns:
        0 or 130 after a signal, else the exit code of a server.
    """
    stop = Stop()
    on_signals(stop)
    runs = {name: asyncio.create_task(server.run()) for name, server in servers.items()}
    try:
        all_ready = asyncio.gather(*(server.ready.wait() for server in servers.values()))
        await first_done(*runs.values(), all_ready, stop.requested.wait())
        if stop.requested.is_set():
            return stop.exit_code
        for name, run in runs.items():
            if run.done():
                say(f"error: the {name} server did not start; stopping the others")
                return run.result()
        async with running(gateway, stop.at_once) as front:
            _say_ready(gateway, front.servers.states, started_at)
            all_ended = asyncio.gather(*runs.values())
            await first_done(stop.requested.wait(), all_ended)
        return stop.exit_code if stop.requested.is_set() else max(all_ended.result())
    finally:
        for server in servers.values():
            server.stop()
        all_stopped = asyncio.gather(*runs.values(), return_exceptions=True)
        await first_done(stop.at_once.wait(), all_stopped)
        for server in servers.values():
            server.stop()  # the second call ends it at once
        await all_stopped


def _say_ready(gateway: GatewaySettings, states: Mapping[str, State], started_at: float) -> None:
    url = server_url(gateway.host, gateway.port)
    ready = [task for task, state in states.items() if state == "ready"]
    if ready:
        but = f", but not for {', '.join(states.keys() - ready)}" if len(ready) < len(states) else ""
        say(f"ready on {url}/v1 after {time.monotonic() - started_at:.0f} s{but}")
        say(f"try: {example(url, ready[0])}")


def choose_port(preferred: int, taken: set[int]) -> int:
    """Return the preferred port of 127.0.0.1, or any free port if that is in use."""
    if preferred not in taken:
        with contextlib.suppress(PortError):
            check_port(LOCAL, preferred)
            return preferred
    return free_port()
