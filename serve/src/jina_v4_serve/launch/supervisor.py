"""Keeps one server running: starts it as a child, watches it, restarts it when it fails, ends all of it.

The child is a process group of its own, so that nothing of a vLLM (engine, workers) outlives it. A child that fails
before it was ever ready is not restarted: its options or its checkpoint are wrong, and its own log says how.
This process imports no vLLM and holds no model: it is small, and it does not fail along with what it watches.
"""

import asyncio
import contextlib
import json
import math
import os
import signal
import time
from collections import deque
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from random import SystemRandom
from typing import Any

import aiohttp

from jina_v4_serve.heartbeat import HUNG
from jina_v4_serve.launch.arguments import DRAIN_S
from jina_v4_serve.launch.screen import Screen, say
from jina_v4_serve.launch.stopping import Stop, on_signals
from jina_v4_serve.phases import STARTED, STARTED_HEADER, started

_POLL_S = 0.5
_GROUP_GONE_S = 1.0  # what is dead but not reaped yet by a slow init holds nothing


@dataclass(frozen=True)
class Policy:
    """How patient a supervisor is.

    Attributes:
        max_restarts: within `window_s`; one more failure and it gives up.
        window_s: how long a restart counts.
        first_pause_s: before the first restart; twice as long before each further one within the window.
        longest_pause_s: which no pause exceeds.
        unhealthy_s: a server that was ready is killed when it has answered with failures only for so long.
        silent_s: a server that was ready is killed when it has not answered our probes for so long.
        answer_s: how long to wait for one answer.
        start_s: a server that was ready before is killed when it has not become so again within that time. At the first
            start of all the operator is told, and decides.
        stop_s: a server is killed when it has not ended so long after the signal to stop.
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
    """One server and its restarts.

    Attributes:
        name: for messages.
        url: where the server answers, without a path.
        stop: lets the server answer what is in flight and end; called a second time, ends it at once.
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
        """Prepare; `run` starts.

        Args:
            name: for messages.
            command: of the child, which must end when its standard input does.
            url: where the server answers, without a path.
            environment: variables of the child beside our own.
            policy: how patient to be.
            starting: held from a start until the server is ready or has failed. Supervisors that share one start their
                servers one after the other, as servers on one GPU must.
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
                if self.stop.asked.is_set():
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
                say(f"the {self.name} server ended by itself (exit code {code}); it restarts in {pause_s:.1f} s")
                await first(self.stop.asked.wait(), timeout_s=pause_s)
                self.n_restarts += 1

    def _next_pause_s(self) -> float | None:
        now = time.monotonic()
        while self._restarts and self._restarts[0] < now - self._policy.window_s:
            self._restarts.popleft()
        if len(self._restarts) >= self._policy.max_restarts:
            return None
        # Up to half as long again: servers that failed together must not all come back together.
        pause_s = self._policy.first_pause_s * 2.0 ** len(self._restarts) * SystemRandom().uniform(1, 1.5)
        self._restarts.append(now)
        return min(pause_s, self._policy.longest_pause_s)

    async def _run_once(self, session: aiohttp.ClientSession) -> int:
        async with contextlib.AsyncExitStack() as starting:
            await starting.enter_async_context(self._starting)
            if self.stop.asked.is_set():
                return 0
            output = self._screen.begin() if self._screen else None
            start = started()
            try:
                process = await asyncio.create_subprocess_exec(
                    *self._command,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    env=self._environment | start,
                    start_new_session=True,
                )
            except OSError as error:  # too many processes, or no memory for one more
                say(f"error: no process for the {self.name} server could be started: {error}")
                return 1
            watch = asyncio.create_task(self._watch(session, start[STARTED]))
            try:
                await first(process.wait(), self.stop.asked.wait(), self.ready.wait(), watch)
                await starting.aclose()  # another server may start now
                await first(process.wait(), self.stop.asked.wait(), watch)
                killed = watch.done()
                if self.stop.asked.is_set() and process.returncode is None:
                    # Only a ready server has anything in flight. vLLM ignores signals until its engine has started.
                    patience_s = self._policy.stop_s if self.ready.is_set() else self._policy.stop_starting_s
                    watch.cancel()  # what a server logs while it ends is for its file alone
                    process.terminate()
                    await first(process.wait(), self.stop.at_once.wait(), timeout_s=patience_s)
            finally:
                await self._end(process, watch)
        code = process.returncode or 0
        code = code if code >= 0 else 128 - code
        if self._screen and not killed and not self.stop.asked.is_set():
            self._screen.ended(code)
        return code

    async def _watch(self, session: aiohttp.ClientSession, start: str) -> None:
        """Set `ready` at the first good answer; return when the server is to be killed.

        That is when its engine hangs (`api.liveness` has the rule), when it answers with failures only, or not at all,
        or when it was ready before and takes too long to be so again.
        It is also when another program answers on its port: several API processes listen with SO_REUSEPORT, and two
        servers that started at the same time would then share the requests between them.
        """
        good_at = began = time.monotonic()
        silent_s = 0.0  # a sum of waits, not a difference of times: a machine that was suspended waited for nothing
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
                    if not healthy and (said := await _object(response)).get("status") == HUNG:
                        say(f"the {self.name} server is hung, and is killed: {said.get('reason')}")
                        return
            except TimeoutError:
                healthy = silent = self.ready.is_set()  # perhaps it is only busy
            except aiohttp.ClientError:
                pass
            silent_s = silent_s + self._policy.answer_s if silent else 0.0
            if silent_s > self._policy.silent_s:
                say(f"the {self.name} server has not answered for {silent_s:g} s, and is killed")
                return
            if healthy:
                good_at = time.monotonic()
                self._was_ever_ready = True
                was_ready = self.ready.is_set()
                self.ready.set()
                if self._screen and not was_ready:
                    self._screen.ready(self.url, await self._failure(session))
            elif not self.ready.is_set() and time.monotonic() - began > self._policy.start_s:
                late = f"the {self.name} server is not ready {self._policy.start_s:g} s after its start"
                if self._was_ever_ready:
                    say(f"{late}, and is killed")
                    return
                say(f"{late}; its log says what it does")
                began = math.inf  # that is said once
            elif self.ready.is_set() and time.monotonic() - good_at > self._policy.unhealthy_s:
                say(f"the {self.name} server has answered nothing but failures for {self._policy.unhealthy_s:g} s")
                return
            await asyncio.sleep(_POLL_S)

    async def _failure(self, session: aiohttp.ClientSession) -> str | None:
        """Return why a server that answers computes no vectors; None where it does, or does not tell."""
        with contextlib.suppress(TimeoutError, aiohttp.ClientError):
            async with session.get(f"{self.url}/ready") as response:
                if response.status == HTTPStatus.SERVICE_UNAVAILABLE:
                    return (await _object(response)).get("reason")
        return None

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
    """Wait until one of several is done. Tasks and futures among them go on; coroutines are cancelled."""
    futures = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        await asyncio.wait(futures, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for awaitable, future in zip(awaitables, futures, strict=True):
            if future is not awaitable:
                future.cancel()


async def _object(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """Return the JSON object of an answer; an empty one where it has none."""
    try:
        content = json.loads(await response.read())
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


async def supervise(supervisor: Supervisor) -> int:
    """Run one server until a signal stops it; return the exit code of the program."""
    on_signals(supervisor.stop)
    return await supervisor.run() or supervisor.stop.exit_code
