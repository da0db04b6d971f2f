"""How a program stops: at a signal, after the requests in flight, or with the program that started it."""

import asyncio
import os
import signal
import threading
from collections.abc import Callable

from jina_v4_serve.launch.screen import say


class Stop:
    """A request to stop. It is called; the second call means to stop without waiting for the requests in flight.

    Attributes:
        requested: set by the first call.
        at_once: set by the second call.
        exit_code: of the program; 128 + its number after any signal but SIGTERM.
    """

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        self.at_once = asyncio.Event()
        self.exit_code = 0

    def __call__(self) -> None:
        """Request to stop; the second time, to stop at once."""
        if self.requested.is_set():
            self.at_once.set()
        self.requested.set()


def on_signals(stop: Stop) -> None:
    """Call a `Stop` at SIGTERM, Ctrl-C or the end of the terminal; the first signal sets its exit code."""

    def handle(number: int) -> None:
        if not stop.requested.is_set():
            say("stopping; requests in flight are answered first (a second signal stops at once)")
            stop.exit_code = 0 if number == signal.SIGTERM else 128 + number
        elif number == signal.SIGHUP:
            return  # a terminal that closes sends it twice: the shell does, and then the system
        stop()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN):  # as nohup wants it
            asyncio.get_running_loop().add_signal_handler(number, handle, number)


def when_stdin_ends(act: Callable[[], None]) -> None:
    """Call a function in a thread when standard input ends: a parent process that was killed sends no signal."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        act()

    threading.Thread(target=watch, name="stdin-watch", daemon=True).start()
