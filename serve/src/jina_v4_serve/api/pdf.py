"""Renders the pages of PDF files in requests, in a child process (`pdf_render`) with limits.

A request has one child for all its files. If a file takes too long, needs too much memory or crashes the renderer, only
that process ends, and the error names the file. The pages are counted before they are rendered, so that the token
budget can refuse the request first.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image

from jina_v4_serve.api.errors import ApiError, invalid
from jina_v4_serve.api.record import current
from jina_v4_serve.api.request import Item
from jina_v4_serve.api.sources import PDF, SourceReader
from jina_v4_serve.api.vectors import Origin
from jina_v4_serve.settings import Settings

_PROGRAM = "jina_v4_serve.api.pdf_render"
_AT_ONCE = 2  # children of an API process
_MOST_WAITING = 32  # requests that wait for a child
_PIXELS_PER_PAGE = 2**22  # the most on average over a request's pages; A3 has 4.0 million at 144 dpi
_ENDED_BY_OTHERS = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)  # by the system or an operator, not by a file
_READ_S = 60  # for all files of a request
_BUSY_S = 90  # how long a child may wait for a busy machine, in addition to its processor time
# The rest of the environment is not for the child: it has keys, and libraries to preload.
_ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH")
_LINE_BYTES = 1000  # the longest line of the program is a fifth of it
Argument = TypeVar("Argument")
Result = TypeVar("Result")


async def _no_pictures() -> list[Image.Image]:
    return []


@dataclass(frozen=True)
class PdfPages:
    """The requested pages of one request's PDF files, which a child process has opened.

    Attributes:
        origins: the origin of each page, in order.
        pictures: renders the pages and ends the child; returns an RGB picture per page.
    """

    origins: Sequence[Origin] = ()
    pictures: Callable[[], Coroutine[Any, Any, list[Image.Image]]] = _no_pictures


class PdfReader:
    """Opens and renders the PDF files of requests."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._sources = SourceReader(settings)
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._n_waiting = 0

    @contextlib.asynccontextmanager
    async def opened(self, items: Sequence[Item]) -> AsyncIterator[PdfPages]:
        """Open the PDF files among the items of a request, until they are rendered or the block ends.

        Raises:
            ApiError: 422 for a file that cannot be read or is over a limit, 429 when too many requests wait, 503 when
                this machine is too busy to render.
        """
        pdf_items = {i: item for i, item in enumerate(items) if item.pdf is not None}
        if not pdf_items:
            yield PdfPages()
            return
        async with contextlib.AsyncExitStack() as stack:
            with current().stage("preprocessing"):
                contents = await self._take_turn(pdf_items, stack)
                child = _Child(pdf_items, self.settings)
                stack.push_async_callback(asyncio.to_thread, child.close)
                stack.callback(child.kill)  # runs first, as another thread may wait for the child
                n_pages = await child.within_time(child.open, contents)
                del contents  # the child has them now
            origins = _origins(pdf_items, n_pages, self.settings)

            async def pictures() -> list[Image.Image]:
                try:
                    return await child.within_time(child.render, origins)
                finally:
                    await stack.aclose()

            yield PdfPages(origins, pictures)

    async def _read(self, pdf_items: Mapping[int, Item]) -> list[bytes]:
        contents = []
        left = self.settings.max_pdf_bytes
        for item in pdf_items.values():
            content = await self._sources.read(item.pdf or "", item.path, PDF, self.settings.max_pdf_bytes)
            left -= len(content)
            if left < 0:
                message = f"the PDF files of the request have over {self.settings.max_pdf_bytes} bytes together"
                raise invalid(item.path, f"{item.path}: {message}")
            contents.append(content)
        return contents

    async def _take_turn(self, pdf_items: Mapping[int, Item], stack: contextlib.AsyncExitStack) -> list[bytes]:
        """Read the files and wait for a free child. The number of waiting requests is limited, as files are large."""
        if self._n_waiting >= _MOST_WAITING:
            message = f"{self._n_waiting} requests with PDF files are waiting; try again later"
            raise ApiError(429, message, code="OVERLOADED", retry_after_s=5)
        self._n_waiting += 1
        try:
            async with asyncio.timeout(_READ_S):
                contents = await self._read(pdf_items)
            await stack.enter_async_context(self._turns)
        except TimeoutError:
            path = next(iter(pdf_items.values())).path
            raise invalid(path, f"{path}: the PDF files were not fetched within {_READ_S} s") from None
        finally:
            self._n_waiting -= 1
        return contents


class _Child:
    """One child process. Methods that block are called in a thread."""

    def __init__(self, items: Mapping[int, Item], settings: Settings) -> None:
        self._paths = [item.path for item in items.values()]
        self._files = {item: file for file, item in enumerate(items)}
        self._settings = settings
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        self._stdin: Any = self._process.stdin
        self._stdout: Any = self._process.stdout

    async def within_time(self, work: Callable[[Argument], Result], argument: Argument) -> Result:
        """Do work in a thread; kill the process if it takes too long."""
        try:
            async with asyncio.timeout(self._settings.pdf_timeout_s + _BUSY_S):
                return await asyncio.to_thread(work, argument)
        except TimeoutError as error:
            self.kill()
            message = "this machine is too busy to render PDF pages; try again later"
            raise ApiError(503, message, code="PDF_RENDERER_BUSY", retry_after_s=30) from error

    def open(self, contents: Sequence[bytes]) -> list[int]:
        """Send the files; return how many pages each has."""
        limits = {"max_bytes": self._settings.pdf_memory_bytes, "max_cpu_s": self._settings.pdf_timeout_s}
        self._send(json.dumps({**limits, "n_bytes": [len(content) for content in contents]}).encode() + b"\n")
        for content in contents:
            self._send(content)
        return [int(self._facts(path)["n_pages"]) for path in self._paths]

    def render(self, origins: Sequence[Origin]) -> list[Image.Image]:
        """Request pages, and read their pictures."""
        pages = [(self._files[origin.item], origin.page) for origin in origins]
        self._send(json.dumps(pages).encode() + b"\n")
        left = max(self._settings.max_image_pixels, self._settings.max_pdf_pages * _PIXELS_PER_PAGE)
        pictures = []
        for file, number in pages:
            path = self._paths[file]
            facts = self._facts(path)
            size = int(facts["width"]), int(facts["height"])
            left -= size[0] * size[1]
            if min(size) < 1:  # the program never writes this, unless a file has taken it over
                raise self._failure(path)
            if left < 0:
                raise invalid(path, f"{path}: with page {number} the pages are too large together; send fewer")
            content = self._stdout.read(3 * size[0] * size[1])
            if len(content) < 3 * size[0] * size[1]:
                raise self._failure(path)
            pictures.append(Image.frombytes("RGB", size, content))
        return pictures

    def kill(self) -> None:
        """End the process."""
        self._process.kill()

    def close(self) -> None:
        """Wait for the end of the process, and close its pipes."""
        with contextlib.suppress(BrokenPipeError), self._process:  # the pipe may hold bytes that it did not read
            self._process.wait()

    def _send(self, content: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended; its output and exit code show why
            self._stdin.write(content)
            self._stdin.flush()

    def _facts(self, path: str) -> dict[str, Any]:
        line = self._stdout.readline(_LINE_BYTES)
        if not line.endswith(b"\n"):
            raise self._failure(path)
        facts: dict[str, Any] = json.loads(line)
        if "error" not in facts:
            return facts
        if facts["error"] is None:
            raise self._costly(path, f"{self._settings.pdf_memory_bytes} bytes of memory")
        raise invalid(path, f"{path} {facts['error']}")

    def _failure(self, path: str) -> ApiError:
        """Make the error for a child that ended or wrote something invalid while it worked on a file."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)  # it may be about to end
        code = self._process.poll()
        self.kill()
        if code in _ENDED_BY_OTHERS:
            message = "the PDF renderer was killed; try again"
            return ApiError(503, message, code="PDF_RENDERER_ENDED", retry_after_s=5)
        if code == -signal.SIGXCPU:
            return self._costly(path, f"{self._settings.pdf_timeout_s} s of processor time")
        message = f"{path}: the PDF renderer crashed on this file, or it needs over"
        message += f" {self._settings.pdf_memory_bytes} bytes of memory"
        return ApiError(422, message, code="PDF_CRASHED", param=path)

    def _costly(self, path: str, limit: str) -> ApiError:
        return ApiError(422, f"{path}: rendering its pages takes over {limit}", code="PDF_TOO_COSTLY", param=path)


def _origins(pdf_items: Mapping[int, Item], n_pages: Sequence[int], settings: Settings) -> list[Origin]:
    """Return the requested pages of all files."""
    origins: list[Origin] = []
    for (i, item), count in zip(pdf_items.items(), n_pages, strict=True):
        ranges = [range(first, min(last or count, count) + 1) for first, last in item.pages]
        for (first, _), pages in zip(item.pages, ranges, strict=True):
            if not pages:
                where = f"{item.path.removesuffix('pdf')}pages"
                raise invalid(where, f"{where} begins a range at page {first}; the last page is {count}", first)
        n_requested = sum(map(len, ranges))
        if len(origins) + n_requested > settings.max_pdf_pages:  # a small file can claim to have millions
            others = f", and {len(origins)} of earlier files" if origins else ""
            message = f"{item.path}: {n_requested} pages are requested{others}"
            message += f"; at most {settings.max_pdf_pages} go into one request"
            raise invalid(item.path, f'{message}. Send "pages", such as "1-{settings.max_pdf_pages}"')
        origins += [Origin(i, number, count) for pages in ranges for number in pages]
    return origins
