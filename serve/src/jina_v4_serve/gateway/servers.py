"""The servers behind the gateway, and which of them are ready.

Each is probed once a second. Requests for a server that is not ready are refused at once, so that no caller waits for a
connection attempt.
"""

import asyncio
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Literal

import aiohttp
from yarl import URL

logger = logging.getLogger(__name__)

State = Literal["ready", "not ready", "down", "wrong server"]  # wrong server: another program, or another task
_POLL_S = 1.0
_POLL_TIMEOUT_S = 6.0  # longer than the 4 s of a server's own probe
CONNECT_TIMEOUT_S = 2.0
# Shorter than the time after which a server closes an idle connection (5 s in a stock vLLM), so that no request is sent
# at that moment.
_KEEP_ALIVE_S = 3.0
_TASK_HEADER = "x-jina-v4-task"


@dataclass(frozen=True)
class Page:
    """A server's reply to a GET."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Servers:
    """Addresses and states by task, and the connections to them."""

    def __init__(self, urls: Mapping[str, str], timeout_s: float) -> None:
        """Connect to nothing yet; every server counts as down until its first probe.

        Args:
            urls: of the servers by task, without a path.
            timeout_s: the longest time without a byte from a server.
        """
        self.urls = {task: URL(url) for task, url in urls.items()}
        self.states: dict[str, State] = dict.fromkeys(urls, "down")
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=timeout_s),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        )

    async def check_all(self) -> None:
        """Probe every server."""
        await asyncio.gather(*map(self._check, self.urls))

    async def watch(self) -> None:
        """Probe all servers again and again; a slow server does not delay the others' probes."""
        checks: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                for task in self.urls:
                    if task not in checks or checks[task].done():
                        checks[task] = asyncio.create_task(self._check(task))
                await asyncio.sleep(_POLL_S)
        finally:
            for check in checks.values():
                check.cancel()

    async def replace(self, urls: Mapping[str, str]) -> None:
        """Use other servers from now on. Requests at the old servers continue.

        Each new address is probed first, so that its state is known when requests come.
        """
        new = {task: URL(url) for task, url in urls.items()}
        changed = [task for task, url in new.items() if url != self.urls.get(task)]
        changed_states = await asyncio.gather(*(self._state(task, new[task]) for task in changed))
        states = {**self.states, **dict(zip(changed, changed_states, strict=True))}
        self.urls, self.states = new, {task: states[task] for task in new}

    async def _check(self, task: str) -> None:
        url = self.urls[task]
        self.note(task, url, await self._state(task, url))

    def note(self, task: str, url: URL, state: State) -> None:
        """Record the state of a server, unless it has been replaced."""
        if self.urls.get(task) == url:
            self.states[task] = state

    async def _state(self, task: str, url: URL) -> State:
        try:
            page = await self._page(url.with_path("/ready"))
        except (aiohttp.ClientError, TimeoutError):
            return "down"
        if not may_answer(task, page.status, page.headers):
            if self.states.get(task) != "wrong server":
                tasks = page.headers.get(_TASK_HEADER)
                actual = f"a server for {tasks}" if tasks else "not a server of jina-v4-serve"
                logger.error("%s is %s: not used for %s. Correct the address", url, actual, task)
            return "wrong server"
        return "ready" if page.status == HTTPStatus.OK else "not ready"

    async def _page(self, url: URL, headers: Mapping[str, str] | None = None) -> Page:
        timeout = aiohttp.ClientTimeout(total=_POLL_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S)
        async with self.session.get(url, timeout=timeout, headers=headers, allow_redirects=False) as response:
            return Page(response.status, response.headers, await response.read())

    def by_address(self, tasks: Iterable[str]) -> list[tuple[str, ...]]:
        """Group tasks by their server; tasks that are no longer served are left out."""
        groups: dict[URL, tuple[str, ...]] = {}
        for task in tasks:
            if task in self.urls:
                groups[self.urls[task]] = (*groups.get(self.urls[task], ()), task)
        return list(groups.values())

    async def get_all(self, path: str, headers: Mapping[str, str]) -> dict[str, Page]:
        """Get a page from every ready server, once from a server of several tasks.

        Returns:
            Pages by task, without those of servers that do not answer.
        """
        groups = self.by_address([task for task, state in self.states.items() if state == "ready"])
        pages = (self._page(self.urls[group[0]].with_path(path), headers) for group in groups)
        answers = await asyncio.gather(*pages, return_exceptions=True)
        pages_by_task: dict[str, Page] = {}
        for group, answer in zip(groups, answers, strict=True):
            if isinstance(answer, Page):
                pages_by_task |= dict.fromkeys(group, answer)
            elif not isinstance(answer, aiohttp.ClientError | TimeoutError):
                raise answer
        return pages_by_task


def may_answer(task: str, status: int, headers: Mapping[str, str]) -> bool:
    """Tell whether a reply may be forwarded as one for a task.

    Every reply of our servers names their tasks, errors too. A stock vLLM names none, and its vectors are pooled in
    another way. So a reply without a task is only forwarded if it is an error, as from a proxy in front of our server.
    """
    tasks = headers.get(_TASK_HEADER)
    if tasks is None:
        return status >= HTTPStatus.BAD_REQUEST and status != HTTPStatus.NOT_FOUND
    return task in [name.strip() for name in tasks.split(",")]
