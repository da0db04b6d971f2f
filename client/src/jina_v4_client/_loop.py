"""The event loop of a synchronous client: in a thread of its own, from the first call to the end of the client.

A forked child inherits copies of its parent's sockets and event loops, and must not touch them.
"""

import asyncio
import contextlib
import os
import queue
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from jina_v4_client._progress import Post
from jina_v4_client.errors import ArgumentError

T = TypeVar("T")
Close = Callable[[], Awaitable[None]]
Calls = set[asyncio.Task[Any]]

# Of this process, while one of its calls needs it; a forked child has none of the threads.
_IMAGE_THREADS: weakref.WeakValueDictionary[int, ThreadPoolExecutor] = weakref.WeakValueDictionary()
_WATCHED: weakref.WeakSet[Any] = weakref.WeakSet()
# Of the parent, in a forked child: collecting a loop or a transport would close descriptors that both share.
_KEPT: list[object] = []


def watch_forks(owner: Any) -> None:
    """Reset an object that holds sockets or a loop in each forked child.

    Its `leave_to_parent` returns what the parent continues to use. The child keeps that, so that it never closes it.
    """
    _WATCHED.add(owner)


os.register_at_fork(after_in_child=lambda: _KEPT.extend([owner.leave_to_parent() for owner in list(_WATCHED)]))


async def in_thread(work: Callable[..., T], *args: Any) -> T:
    """Read files and images in a few threads that all calls share, and that end with the last of these.

    Not in the threads of asyncio, which must stay free: it looks up the names of hosts there.
    """
    pool = _IMAGE_THREADS.setdefault(os.getpid(), ThreadPoolExecutor(os.cpu_count(), "jina-v4-images"))
    return await asyncio.get_running_loop().run_in_executor(pool, work, *args)


class _Running(NamedTuple):
    thread: threading.Thread
    loop: asyncio.AbstractEventLoop
    ending: asyncio.Event
    calls: Calls


class BackgroundLoop:
    """Runs coroutines for threads that wait for them; a forked child has a loop of its own.

    Args:
        close: awaited in the loop when it ends.
    """

    def __init__(self, close: Close) -> None:
        self._close = close
        self._changing = threading.RLock()  # a signal handler may interrupt this and use the client
        self._running: _Running | None = None
        self._stopped = False
        watch_forks(self)

    def run(self, work: Callable[[Post], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine function and wait for it; whatever interrupts the wait, such as Ctrl-C, cancels it.

        It may post functions to be called in the waiting thread.
        """
        if (running := self._running) is not None and running.thread is threading.current_thread():
            raise ArgumentError("this client was called from its own event loop and would wait for itself")
        posted: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        tasks: list[asyncio.Task[T]] = []

        def start() -> None:
            tasks.append(asyncio.create_task(work(posted.put)))
            calls.add(tasks[0])
            tasks[0].add_done_callback(calls.discard)
            tasks[0].add_done_callback(lambda _: posted.put(None))

        with self._changing:  # so that what is submitted is either run or cancelled by stop()
            _, loop, _, calls = self._started()
            loop.call_soon_threadsafe(start)
        try:
            while (act := posted.get()) is not None:
                act()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and the call with it
                loop.call_soon_threadsafe(lambda: tasks[0].cancel())
            raise
        if tasks[0].cancelled():
            raise ArgumentError("this client was closed in the middle of the call")
        try:
            return tasks[0].result()
        finally:
            tasks.clear()  # an error holds this frame, which must not hold the error

    def stop(self) -> None:
        """Cancel what still runs, close its connections and end the thread."""
        with self._changing:
            self._stopped = True
            running, self._running = self._running, None
        if running is None:
            return
        running.loop.call_soon_threadsafe(running.ending.set)
        if running.thread is not threading.current_thread():  # the client may be collected in that thread
            running.thread.join()

    def leave_to_parent(self) -> object:
        """Reset in a forked child; another thread of the parent may have held the lock."""
        left, self._running = self._running, None
        self._changing = threading.RLock()
        return left

    def _started(self) -> _Running:
        if self._stopped:
            raise ArgumentError("this client is closed; make a new one")
        if self._running is None:
            loop, ending, calls = asyncio.new_event_loop(), asyncio.Event(), Calls()
            arguments = (loop, ending, calls, self._close)  # and not this object, which must be collected while it runs
            thread = threading.Thread(target=_run_loop, args=arguments, name="jina-v4-client", daemon=True)
            try:
                thread.start()
            except BaseException:
                loop.close()
                raise
            if self._running is None:
                self._running = _Running(thread, loop, ending, calls)
            else:  # a signal handler used the client in between
                loop.call_soon_threadsafe(ending.set)
        return self._running


def _run_loop(loop: asyncio.AbstractEventLoop, ending: asyncio.Event, calls: Calls, close: Close) -> None:
    """Run a loop until `ending` is set; asyncio.run would start a thread at its end, too late at a program's end."""
    main = loop.create_task(_until_ended(ending, calls, close))
    try:
        while not main.done():
            with contextlib.suppress(SystemExit, KeyboardInterrupt):  # of a call: its waiting thread gets it
                loop.run_until_complete(main)
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()


async def _until_ended(ending: asyncio.Event, calls: Calls, close: Close) -> None:
    """End the calls first: each ends the tasks that the HTTP library began for it, in the order that these need."""
    await ending.wait()
    await _cancel(calls)
    try:
        await close()
    finally:
        await _cancel(asyncio.all_tasks() - {asyncio.current_task()})


async def _cancel(tasks: Calls) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
