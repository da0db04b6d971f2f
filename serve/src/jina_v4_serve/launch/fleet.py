"""All three tasks on one machine: a supervised server each, and the gateway before them once all are ready."""

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
from jina_v4_serve.launch.supervisor import Supervisor, first
from jina_v4_serve.settings import variable_of
from jina_v4_serve.vllm_side.versions import find_vllm


async def serve_fleet(
    common: ServerSettings, gateway: GatewaySettings, one_base: bool = False, verbose: bool = False
) -> int:
    """Run three servers, or one for all tasks, and the gateway, until a signal or until every server has failed.

    Args:
        common: to all servers; its folder holds their checkpoints.
        gateway: before them, but for their addresses.
        one_base: one server for all tasks, with the base once and the adapters beside it.
        verbose: vLLM's logs on the screen.

    Returns:
        The exit code of the program.

    Raises:
        ServeError: a setting, a checkpoint or an address is wrong; nothing was started.
    """
    began = time.monotonic()
    if says_tls(common.vllm_options):
        raise OptionError(
            "--ssl-* is for a server alone: under `all` the gateway answers callers, and it speaks HTTP."
            " Put a proxy that speaks HTTPS before it"
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
    say_checked(began)
    servers: dict[str, Supervisor] = {}
    urls: dict[str, str] = {}
    # While a server starts on a GPU, vLLM measures its memory: no other may start there. On a CPU all sizes are set,
    # and a start uses one core: on two cores, three at the same time take half as long as one after the other.
    starting = None if find_vllm() else asyncio.Lock()
    for (server, launch), log in zip(launches, logs, strict=True):
        screen = Screen(server.task, log, label=f"[{server.task}] ")
        servers[server.task] = Supervisor(
            server.task, launch.command, launch.url, launch.environment, starting=starting, screen=screen
        )
        urls |= dict.fromkeys(server.tasks, launch.url)
    return await run_fleet(servers, replace(gateway, servers=urls), began)


async def run_fleet(servers: Mapping[str, Supervisor], gateway: GatewaySettings, began: float) -> int:
    """Start servers, and run a gateway before them as long as one of them lives, or until a signal.

    At a signal what is in flight is answered, then everything is ended; at a second one nothing is waited for.

    Args:
        servers: by name.
        gateway: before them.
        began: when this program did, a monotonic time in seconds.

    Returns:
        0 or 130 after a signal, else the exit code of a server.
    """
    stop = Stop()
    on_signals(stop)
    runs = {name: asyncio.create_task(server.run()) for name, server in servers.items()}
    try:
        all_ready = asyncio.gather(*(server.ready.wait() for server in servers.values()))
        await first(*runs.values(), all_ready, stop.asked.wait())
        if stop.asked.is_set():
            return stop.exit_code
        for name, run in runs.items():
            if run.done():
                say(f"error: the {name} server did not start; the others are ended")
                return run.result()
        async with running(gateway, stop.at_once) as front:
            _say_ready(gateway, front.servers.states, began)
            all_ended = asyncio.gather(*runs.values())
            await first(stop.asked.wait(), all_ended)
        return stop.exit_code if stop.asked.is_set() else max(all_ended.result())
    finally:
        for server in servers.values():
            server.stop()
        none_left = asyncio.gather(*runs.values(), return_exceptions=True)
        await first(stop.at_once.wait(), none_left)
        for server in servers.values():
            server.stop()  # at once
        await none_left


def _say_ready(gateway: GatewaySettings, states: Mapping[str, State], began: float) -> None:
    url = server_url(gateway.host, gateway.port)
    ready = [task for task, state in states.items() if state == "ready"]
    if ready:
        but = f", but not for {', '.join(states.keys() - ready)}" if len(ready) < len(states) else ""
        say(f"ready on {url}/v1 after {time.monotonic() - began:.0f} s{but}")
        say(f"try: {example(url, ready[0])}")


def choose_port(preferred: int, taken: set[int]) -> int:
    """Return the preferred port of 127.0.0.1, or any free one when it is in use."""
    if preferred not in taken:
        with contextlib.suppress(PortError):
            check_port(LOCAL, preferred)
            return preferred
    return free_port()
