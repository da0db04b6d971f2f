"""Keeps one server running: starts it as a child process, watches it, restarts it when it fails, stops it.

The child leads its own process group, so that no process of vLLM (engine, workers) outlives it. A child that fails
before it was ever ready is not restarted: its options or its checkpoint are wrong, and its log says why. The supervisor
imports no vLLM and holds no model, so it is small and does not fail together with the server.
"""

import asyncio
import contextlib
import errno
import math
import os
import signal
import time
from collections import deque
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from random import SystemRandom

import aiohttp

from jina_v4_serve.heartbeat import HUNG
from jina_v4_serve.launch.arguments import DRAIN_S
from jina_v4_serve.launch.screen import Screen, say
from jina_v4_serve.launch.server import json_object
from jina_v4_serve.launch.stopping import Stop, on_signals
from jina_v4_serve.phases import STARTED, STARTED_HEADER

_POLL_S = 0.5
_NO_FILES = (errno.EMFILE, errno.ENFILE)  # the supervisor, which may be a gateway too, cannot open a connection
_GROUP_GONE_S = 1.0  # enough: dead processes that a slow init has not reaped yet hold nothing


@dataclass(frozen=True)
class Policy:
    """How long a supervisor waits before it acts.

    Attributes:
        max_restarts: the restarts within `window_s`; at the next failure the supervisor gives up.
        window_s: how long a restart counts.
        first_pause_s: the pause before the first restart; it doubles with each further restart within the window.
        longest_pause_s: the upper limit of a pause.
        unhealthy_s: a ready server is killed when for this time it has answered with failures only.
        silent_s: a ready server is killed when it has not answered for this time.
        answer_s: how long to wait for one answer.
        start_s: a restarted server is killed when it is not ready after this time. At the first start, the operator
            gets a message instead.
        stop_s: a server is killed when it has not ended this long after the signal to stop.
        stop_starting_s: the same for a server that was not ready yet.
    """

    max_restarts: int = 5
    window_s: float = 600.0
    first_pause_s: float = 1.0
    longest_pause_s: float = 60.0
    unhealthy_s: float = 20.0
    silent_s: float = 180.0
    answer_s: float = 5.0
    start_s: float = 1800.0  # weights from a slow disk, kernels that are compiled
    stop_s: float = 2 * DRAIN_S + 15.0
    stop_starting_s: float = 5.0


class Supervisor:
    """Runs and restarts one server.

    Attributes:
        name: for messages.
        url: the server's address, without a path.
        stop: call it to stop the server after the requests in flight; the second call stops it at once.
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
        screen: Screen | None = None,
    ) -> None:
        """Start nothing yet; see `run`.

        Args:
            name: for messages.
            command: of the child, which must end when its standard input ends.
            url: the server's address, without a path.
            environment: variables of the child in addition to our own.
            policy: how long to wait before it acts.
            starting: held from a start until the server is ready or has failed. Supervisors that share this lock start
                their servers one after the other, as servers on one GPU must.
            screen: shows how the server starts and why it ended.
        """
        self.name = name
        self.url = url
        self.stop = Stop()
        self.ready = asyncio.Event()
        self.n_restarts = 0
        self._command = list(command)
        self._environment = {**os.environ, **(environment or {})}
        self._policy = policy or Policy()
        self._starting = starting or asyncio.Lock()
        self._screen = screen
        self._restarts: deque[float] = deque()
        self._was_ever_ready = False

    async def run(self) -> int:
        """Keep the server running until `stop`, or until it fails too often.

        Returns:
            0 after `stop`, else the exit code of the last child (128 + n for signal n, never 0).
        """
        timeout = aiohttp.ClientTimeout(total=self._policy.answer_s)
        connector = aiohttp.TCPConnector(ssl=False, force_close=True)  # our own child's certificate, if any
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            while True:
                code = await self._run_once(session)
                if self.stop.requested.is_set():
                    return 0
                if not self._was_ever_ready:
                    return code or 1
                pause_s = self._next_pause_s()
                if pause_s is None:
                    say(
                        f"error: the {self.name} server ended unexpectedly {len(self._restarts) + 1} times within"
                        f" {self._policy.window_s:g} s, the last time with exit code {code}: giving up"
                    )
                    return code or 1
                say(f"the {self.name} server ended unexpectedly (exit code {code}); it restarts in {pause_s:.1f} s")
                await first_done(self.stop.requested.wait(), timeout_s=pause_s)
                self.n_restarts += 1

    def _next_pause_s(self) -> float | None:
        now = time.monotonic()
        while self._restarts and self._restarts[0] < now - self._policy.window_s:
            self._restarts.popleft()
        if len(self._restarts) >= self._policy.max_restarts:
            return None
        # A random factor, so that servers that failed together do not all restart together.
        pause_s = self._policy.first_pause_s * 2.0 ** len(self._restarts) * SystemRandom().uniform(1, 1.5)
        self._restarts.append(now)
        return min(pause_s, self._policy.longest_pause_s)

    async def _run_once(self, session: aiohttp.ClientSession) -> int:
        async with contextlib.AsyncExitStack() as starting:
            await starting.enter_async_context(self._starting)
            if self.stop.requested.is_set():
                return 0
            output = self._screen.begin() if self._screen else None
            start = str(time.monotonic())
            try:
                process = await asyncio.create_subprocess_exec(
                    *self._command,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    env=self._environment | {STARTED: start},
                    start_new_session=True,
                )
            except OSError as error:  # too many processes, or no memory for one more
                say(f"error: the process of the {self.name} server could not be started: {error}")
                return 1
            watch = asyncio.create_task(self._watch(session, start))
            try:
                await first_done(process.wait(), self.stop.requested.wait(), self.ready.wait(), watch)
                await starting.aclose()  # another server may start now
                await first_done(process.wait(), self.stop.requested.wait(), watch)
                killed = watch.done()
                if self.stop.requested.is_set() and process.returncode is None:
                    # Only a ready server has requests in flight. vLLM ignores signals until its engine has started.
                    wait_s = self._policy.stop_s if self.ready.is_set() else self._policy.stop_starting_s
                    watch.cancel()  # the screen does not show the log of a server that stops
                    process.terminate()
                    await first_done(process.wait(), self.stop.at_once.wait(), timeout_s=wait_s)
            finally:
                await self._end(process, watch)
        code = process.returncode or 0
        code = code if code >= 0 else 128 - code
        if self._screen and not killed and not self.stop.requested.is_set():
            self._screen.ended(code)
        return code

    async def _watch(self, session: aiohttp.ClientSession, start: str) -> None:
        """Set `ready` at the first good answer; return when the server must be killed.

        It must be killed when its engine hangs (`api.liveness` has the rule), when it answers with failures only or not
        at all, when a restart takes too long, or when another program answers on its port. The last happens because
        several API processes listen with SO_REUSEPORT: two servers on one port would share the requests.
        """
        started_at = time.monotonic()
        silent_s = failed_s = 0.0  # sums of waits: differences of times would count the time of a suspended machine
        while True:
            healthy, silent = False, False
            if self._screen:
                self._screen.look()
            try:
                async with session.get(f"{self.url}/health") as response:
                    if response.headers.get(STARTED_HEADER) != start:
                        say(
                            f"error: another program answers on {self.url}, so the {self.name} server ends. "
                            "Stop that program, or choose another port with --port"
                        )
                        return
                    healthy = response.ok
                    if not healthy and (content := json_object(await response.read())).get("status") == HUNG:
                        say(f"the {self.name} server is hung, and is killed: {content.get('reason')}")
                        return
            except TimeoutError:
                healthy = silent = self.ready.is_set()  # it may only be busy
            except aiohttp.ClientError as error:
                healthy = self.ready.is_set() and getattr(error, "errno", None) in _NO_FILES
            silent_s = silent_s + self._policy.answer_s if silent else 0.0
            failed_s = 0.0 if healthy else failed_s + _POLL_S
            if silent_s > self._policy.silent_s:
                say(f"the {self.name} server has not answered for {silent_s:g} s, and is killed")
                return
            if healthy:
                self._was_ever_ready = True
                was_ready = self.ready.is_set()
                self.ready.set()
                if self._screen and not was_ready:
                    self._screen.ready(self.url, await self._failure(session))
            elif not self.ready.is_set() and time.monotonic() - started_at > self._policy.start_s:
                late = f"the {self.name} server is not ready {self._policy.start_s:g} s after its start"
                if self._was_ever_ready:
                    say(f"{late}, and is killed")
                    return
                say(f"{late}; see its log")
                started_at = math.inf  # say this only once
            elif self.ready.is_set() and failed_s > self._policy.unhealthy_s:
                say(f"the {self.name} server has only failed for {self._policy.unhealthy_s:g} s, and is killed")
                return
            await asyncio.sleep(_POLL_S)

    async def _failure(self, session: aiohttp.ClientSession) -> str | None:
        """Return why a server answers but does not serve; None if it serves, or if its reply has no reason."""
        with contextlib.suppress(TimeoutError, aiohttp.ClientError):
            async with session.get(f"{self.url}/ready") as response:
                if response.status == HTTPStatus.SERVICE_UNAVAILABLE:
                    return json_object(await response.read()).get("reason")
        return None

    async def _end(self, process: asyncio.subprocess.Process, watch: asyncio.Task[None]) -> None:
        """Kill the rest of the child's process group, and wait until it has ended."""
        watch.cancel()
        self.ready.clear()
        deadline = time.monotonic() + _GROUP_GONE_S
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(process.pid, signal.SIGKILL)
                await asyncio.sleep(0.02)
        await process.wait()


async def first_done(*awaitables: Awaitable[object], timeout_s: float | None = None) -> None:
    """Wait until one of several awaitables is done. Coroutines are cancelled then; tasks and futures are not."""
    futures = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        await asyncio.wait(futures, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for awaitable, future in zip(awaitables, futures, strict=True):
            if future is not awaitable:
                future.cancel()


async def supervise(supervisor: Supervisor) -> int:
    """Run one server until a signal stops it; return the exit code of the program."""
    on_signals(supervisor.stop)
    return await supervisor.run() or supervisor.stop.exit_code
