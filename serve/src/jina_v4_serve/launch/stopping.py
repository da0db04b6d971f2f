"""How a program ends: at a signal, after what is in flight, or with the program that started it."""

import asyncio
import os
import signal
import threading
from collections.abc import Callable

from jina_v4_serve.launch.screen import say


class Stop:
    """A wish to end, which is called: a second call no longer waits for what is in flight.

    Attributes:
        asked: set by the first call.
        at_once: set by the second.
        exit_code: of the program, 130 where Ctrl-C has ended it.
    """

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.at_once = asyncio.Event()
        self.exit_code = 0

    def __call__(self) -> None:
        """Ask for the end; once more, for the end at once."""
        if self.asked.is_set():
            self.at_once.set()
        self.asked.set()


def on_signals(stop: Stop) -> None:
    """Have SIGTERM and SIGINT call a `Stop`; the first of them decides about its exit code."""

    def handle(number: int) -> None:
        if not stop.asked.is_set():
            say("stopping; what is in flight is answered first (a second signal ends it at once)")
            stop.exit_code = 130 if number == signal.SIGINT else 0
        stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, handle, number)


def when_stdin_ends(act: Callable[[], None]) -> None:
    """Call a function, in a thread, once the standard input ends: a parent that was killed sends no signal."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        act()

    threading.Thread(target=watch, name="stdin-watch", daemon=True).start()
