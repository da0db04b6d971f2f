"""The servers behind the gateway, and which of them are ready.

Each is asked once a second. Of one that is not ready nothing is asked meanwhile: its requests are refused at once, and
no connection attempt keeps a caller waiting.
"""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Literal

import aiohttp
from yarl import URL

State = Literal["ready", "not ready", "down"]
_POLL_S = 1.0
_POLL_TIMEOUT_S = 6.0  # a server's own probe takes 4 s until it gives up
CONNECT_TIMEOUT_S = 2.0
# Shorter than the 5 s after which vLLM closes an idle connection: a request must not meet that moment.
_KEEP_ALIVE_S = 3.0


@dataclass(frozen=True)
class Page:
    """What a server answered to a GET."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Servers:
    """Addresses and states by task, and the connections to them."""

    def __init__(self, urls: Mapping[str, str], timeout_s: float) -> None:
        """Connect lazily; every server counts as down until it was asked.

        Args:
            urls: of the servers by task, without a path.
            timeout_s: within which a server must go on with an answer.
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
        """Ask every server for its state."""
        await asyncio.gather(*map(self._check, self.urls))

    async def watch(self) -> None:
        """Ask again and again; a server that is slow to answer delays nobody else's turn."""
        await asyncio.gather(*map(self._watch, self.urls))

    async def _watch(self, task: str) -> None:
        while True:
            await self._check(task)
            await asyncio.sleep(_POLL_S)

    async def _check(self, task: str) -> None:
        try:
            status = await self._status(task, "/ready")
            if status == HTTPStatus.NOT_FOUND:  # a server that can only tell that it lives
                status = await self._status(task, "/health")
        except (aiohttp.ClientConnectionError, TimeoutError):
            self.states[task] = "down"
        else:
            self.states[task] = "ready" if status == HTTPStatus.OK else "not ready"

    async def _status(self, task: str, path: str) -> int:
        timeout = aiohttp.ClientTimeout(total=_POLL_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S)
        async with self.session.get(
            self.urls[task].with_path(path), timeout=timeout, allow_redirects=False
        ) as response:
            return response.status

    def by_address(self, tasks: Iterable[str]) -> list[tuple[str, ...]]:
        """Put those of some tasks together that have one server."""
        groups: dict[URL, tuple[str, ...]] = {}
        for task in tasks:
            groups[self.urls[task]] = (*groups.get(self.urls[task], ()), task)
        return list(groups.values())

    async def get_all(self, path: str, headers: Mapping[str, str]) -> dict[str, Page]:
        """Get a page of every server that is ready; one that is there for several tasks is asked once.

        Args:
            path: of the page.
            headers: to send.

        Returns:
            Pages by task; of a server that does not answer, none.
        """

        async def get(task: str) -> Page:
            timeout = aiohttp.ClientTimeout(total=_POLL_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S)
            url = self.urls[task].with_path(path)
            async with self.session.get(url, timeout=timeout, headers=headers, allow_redirects=False) as response:
                return Page(response.status, response.headers, await response.read())

        groups = self.by_address([task for task, state in self.states.items() if state == "ready"])
        answers = await asyncio.gather(*(get(group[0]) for group in groups), return_exceptions=True)
        found: dict[str, Page] = {}
        for group, answer in zip(groups, answers, strict=True):
            if isinstance(answer, Page):
                found |= dict.fromkeys(group, answer)
            elif not isinstance(answer, aiohttp.ClientError | TimeoutError):
                raise answer
        return found
