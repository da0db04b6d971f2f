"""The two ways of turning a dispatcher: with threads, and with tasks of an event loop."""

import asyncio
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Collection

from jina_v4_client._dispatch import Attempt, Dispatcher
from jina_v4_client._wire import Reply, Request
from jina_v4_client.errors import ServerError

Outcome = Reply | BaseException


def run_in_threads(dispatcher: Dispatcher, send: Callable[[Request, float], Reply]) -> None:
    """See a call through, each request in a thread of its own.

    The calling thread only waits, so that Ctrl-C and the time limits end the call at once, whatever the network does.
    A blocked socket cannot be freed from outside: requests that are on their way then end by themselves, unheard.
    """
    outcomes: queue.SimpleQueue[tuple[Attempt, Outcome]] = queue.SimpleQueue()

    def work(attempt: Attempt) -> None:
        try:
            outcome: Outcome = send(attempt.job.request, attempt.timeout_s)
        except BaseException as error:  # whatever it is, it is for the calling thread
            outcome = error
        outcomes.put((attempt, outcome))

    while not dispatcher.done:
        now = time.monotonic()
        for attempt in dispatcher.start(now):
            threading.Thread(target=work, args=(attempt,), name="jina-v4-client", daemon=True).start()
        try:
            attempt, outcome = outcomes.get(timeout=min(dispatcher.wait_s(now), threading.TIMEOUT_MAX))
            dispatcher.receive(attempt, _known(outcome), time.monotonic())
        except queue.Empty:
            pass
        dispatcher.expire(time.monotonic())


async def run_in_tasks(dispatcher: Dispatcher, send: Callable[[Request, float], Awaitable[Reply]]) -> None:
    """See a call through, each request in a task of its own; whatever ends the call closes their connections."""

    async def work(attempt: Attempt) -> Outcome:
        try:
            return await send(attempt.job.request, attempt.timeout_s)
        except Exception as error:  # whatever it is, it is for the call, which waits
            return error

    tasks: dict[asyncio.Task[Outcome], Attempt] = {}
    cancelled: set[asyncio.Task[Outcome]] = set()
    try:
        while not dispatcher.done:
            now = time.monotonic()
            for attempt in dispatcher.start(now):
                tasks[asyncio.create_task(work(attempt))] = attempt
            await _first_of(tasks, dispatcher.wait_s(now))
            for task in [task for task in tasks if task.done()]:
                dispatcher.receive(tasks.pop(task), _known(task.result()), time.monotonic())
            overdue = set(dispatcher.expire(time.monotonic()))
            for task in [task for task, attempt in tasks.items() if attempt in overdue]:
                task.cancel()
                del tasks[task]
                cancelled.add(task)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *cancelled, return_exceptions=True)


async def _first_of(tasks: Collection[asyncio.Task[Outcome]], patience_s: float) -> None:
    if tasks:
        await asyncio.wait(tasks, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
    else:
        await asyncio.sleep(patience_s)


def _known(outcome: Outcome) -> Reply | ServerError:
    """Give what a dispatcher can take; anything else ends the call."""
    if isinstance(outcome, Reply | ServerError):
        return outcome
    raise outcome
