"""Keeps one server running: starts it as a child, watches it, starts it anew when it fails, ends all of it.

The child is a process group of its own, so that nothing of a vLLM (engine, workers) outlives it. A child that fails
before it was ever ready is not started again: its options or its checkpoint are wrong, and its own words say how.
This process imports no vLLM and holds no model: it is small, and it does not fail along with what it watches.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from random import SystemRandom

import aiohttp

from jina_v4_serve.launcher import DRAIN_S, Launch, Settings

_POLL_S = 0.5
_HEALTH_TIMEOUT_S = 5.0
_GROUP_GONE_S = 1.0  # what is dead but not reaped yet by a slow init holds nothing


@dataclass(frozen=True)
class Policy:
    """How patient a supervisor is.

    Attributes:
        max_restarts: within `window_s`; one more failure and it gives up.
        window_s: how long a restart counts.
        first_pause_s: before the first restart; twice as long before each further one within the window.
        longest_pause_s: which no pause exceeds.
        unhealthy_s: a server that was ready and has answered nothing but failures for so long is killed.
        stop_s: a server that is told to stop and has not ended after so long is killed.
        stop_starting_s: the same for one that was not ready yet.
    """

    max_restarts: int = 5
    window_s: float = 600.0
    first_pause_s: float = 1.0
    longest_pause_s: float = 60.0
    unhealthy_s: float = 20.0
    stop_s: float = 2 * DRAIN_S + 15.0
    stop_starting_s: float = 5.0


class Supervisor:
    """One server and its restarts.

    Attributes:
        name: for messages.
        ready: set while the server answers /health.
        n_restarts: so far.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        url: str,
        environment: Mapping[str, str] | None = None,
        policy: Policy | None = None,
        starting: asyncio.Lock | None = None,
    ) -> None:
        """Take note; `run` starts.

        Args:
            name: for messages.
            command: of the child, which must end when its standard input does.
            url: where the server answers, without a path.
            environment: variables of the child beside our own.
            policy: how patient to be.
            starting: held from a start until the server is ready or has failed; supervisors that share one start their
                servers one after the other, as servers on one GPU must.
        """
        self.name = name
        self.ready = asyncio.Event()
        self.n_restarts = 0
        self._command = list(command)
        self._url = url
        self._environment = {**os.environ, **(environment or {})}
        self._policy = policy or Policy()
        self._starting = starting or asyncio.Lock()
        self._stop = asyncio.Event()
        self._kill = asyncio.Event()
        self._restarts: deque[float] = deque()
        self._was_ever_ready = False

    def stop(self) -> None:
        """Let the server finish what is in flight and end; asked a second time, end it at once."""
        if self._stop.is_set():
            self._kill.set()
        self._stop.set()

    async def run(self) -> int:
        """Keep the server running until it is told to stop, or cannot be kept.

        Returns:
            0 after `stop`, else the exit code of the last child (128 + n for signal n, never 0).
        """
        timeout = aiohttp.ClientTimeout(total=_HEALTH_TIMEOUT_S)
        connector = aiohttp.TCPConnector(ssl=False, force_close=True)  # our own child's certificate, if any
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            while True:
                code = await self._run_once(session)
                if self._stop.is_set():
                    return 0
                if not self._was_ever_ready:
                    return code or 1
                pause_s = self._next_pause_s()
                if pause_s is None:
                    say(
                        f"error: the {self.name} server ended by itself {len(self._restarts) + 1} times within"
                        f" {self._policy.window_s:g} s, the last time with exit code {code}: giving up"
                    )
                    return code or 1
                say(
                    f"the {self.name} server ended by itself (exit code {code}); it is started again in {pause_s:.1f} s"
                )
                await first(self._stop.wait(), timeout_s=pause_s)
                self.n_restarts += 1

    def _next_pause_s(self) -> float | None:
        now = time.monotonic()
        while self._restarts and self._restarts[0] < now - self._policy.window_s:
            self._restarts.popleft()
        if len(self._restarts) >= self._policy.max_restarts:
            return None
        # Up to half as long again: servers that failed together shall not all come back together.
        pause_s = self._policy.first_pause_s * 2.0 ** len(self._restarts) * SystemRandom().uniform(1, 1.5)
        self._restarts.append(now)
        return min(pause_s, self._policy.longest_pause_s)

    async def _run_once(self, session: aiohttp.ClientSession) -> int:
        async with self._starting:
            if self._stop.is_set():
                return 0
            process = await asyncio.create_subprocess_exec(
                *self._command, stdin=asyncio.subprocess.PIPE, env=self._environment, start_new_session=True
            )
            watch = asyncio.create_task(self._watch(session))
            try:
                await first(process.wait(), self._stop.wait(), self.ready.wait())
            except BaseException:
                await self._end(process, watch)
                raise
        try:
            await first(process.wait(), self._stop.wait(), watch)
            if self._stop.is_set() and process.returncode is None:
                # Only a server that is ready has anything in flight. Until its engine has started vLLM hears nothing.
                serving = self.ready.is_set()
                process.terminate()
                patience_s = self._policy.stop_s if serving else self._policy.stop_starting_s
                await first(process.wait(), self._kill.wait(), timeout_s=patience_s)
        finally:
            await self._end(process, watch)
        code = process.returncode or 0
        return code if code >= 0 else 128 - code

    async def _watch(self, session: aiohttp.ClientSession) -> None:
        """Set `ready` at the first good answer; return when a server that was ready answers with failures only."""
        good_at = time.monotonic()
        while True:
            try:
                async with session.get(f"{self._url}/health") as response:
                    healthy = response.ok
            except TimeoutError:
                healthy = self.ready.is_set()  # busy, or stopped by a debugger: not known to have failed
            except aiohttp.ClientError:
                healthy = False
            if healthy:
                good_at = time.monotonic()
                self.ready.set()
                self._was_ever_ready = True
            elif self.ready.is_set() and time.monotonic() - good_at > self._policy.unhealthy_s:
                say(f"the {self.name} server has answered nothing but failures for {self._policy.unhealthy_s:g} s")
                return
            await asyncio.sleep(_POLL_S)

    async def _end(self, process: asyncio.subprocess.Process, watch: asyncio.Task[None]) -> None:
        """Kill what is left of the child's process group, and see it gone."""
        watch.cancel()
        self.ready.clear()
        deadline = time.monotonic() + _GROUP_GONE_S
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(process.pid, signal.SIGKILL)
                await asyncio.sleep(0.02)
        await process.wait()


async def first(*awaitables: Awaitable[object], timeout_s: float | None = None) -> None:
    """Wait until one of several is done. Tasks among them go on; what is none yet is dropped with the waiting."""
    given = {awaitable for awaitable in awaitables if isinstance(awaitable, asyncio.Future)}
    futures = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        await asyncio.wait(futures, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for future in futures:
            if future not in given:
                future.cancel()


def say(line: str) -> None:
    """Tell the operator."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - the user's screen


def worker_command(arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    """Return the command of the process that runs vLLM.

    Args:
        arguments: of vLLM, ours.
        options: of vLLM, the user's.
    """
    # -P: a folder of the user's named like a module of ours or of vLLM's must not be imported in its place.
    return [sys.executable, "-P", "-m", "jina_v4_serve.worker", json.dumps(list(arguments)), json.dumps(list(options))]


def server_url(host: str, port: int, options: Sequence[str] = ()) -> str:
    """Return where a server that listens on an address can be reached from this machine."""
    reachable = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - not bound here
    scheme = "https" if any(option.replace("_", "-").startswith("--ssl-certfile") for option in options) else "http"
    return f"{scheme}://[{reachable}]:{port}" if ":" in reachable else f"{scheme}://{reachable}:{port}"


def on_signals(stop: Callable[[], None]) -> Callable[[], int]:
    """Have SIGTERM and SIGINT call a function, the second time too.

    Returns:
        A function that gives the exit code which the first signal calls for: 0 for SIGTERM, 130 for SIGINT.
    """
    received: list[int] = []

    def handle(number: int) -> None:
        received.append(number)
        stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, handle, number)
    return lambda: 130 if received[:1] == [signal.SIGINT] else 0


def stop_with_stdin() -> None:
    """Take the end of the standard input for a SIGTERM: a program that started this one and was killed sends none."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="stdin-watch", daemon=True).start()


async def supervise(settings: Settings, launch: Launch, policy: Policy | None = None) -> int:
    """Run one server until it is told to stop.

    Args:
        settings: of the server.
        launch: what `prepare` made of them.
        policy: how patient to be.

    Returns:
        The exit code of the program.
    """
    command = worker_command(launch.arguments, launch.options)
    url = server_url(settings.host, settings.port, launch.options)
    supervisor = Supervisor(settings.task, command, url, launch.environment, policy)
    exit_code = on_signals(supervisor.stop)
    return await supervisor.run() or exit_code()
