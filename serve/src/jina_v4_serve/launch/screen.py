"""What the screen shows of one server: its phases with their seconds, warnings and errors, what to do after a failure.

All else is in the server's log file. The lines are picked out of that file, so that serving waits for no screen.
"""

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from jina_v4_serve.launch.known_lines import (
    advice_after,
    advice_of,
    exception_of,
    is_routine,
    is_warning,
    without_process,
)
from jina_v4_serve.launch.log_file import LogFile
from jina_v4_serve.launch.server import ServerSettings
from jina_v4_serve.phases import read_phase
from jina_v4_serve.settings import read_settings, variable_of

_TAIL = 15  # lines
_TRACEBACK = "Traceback (most recent call last):"


def say(line: str) -> None:
    """Tell the operator. A log on a disk that is full ends nothing."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)  # noqa: T201 - the user's screen


def phase_line(phase: str, seconds: float) -> str:
    """Return the line of a phase that is over."""
    return f"  {phase:<46} {seconds:5.1f} s"


def say_checked(began: float) -> None:
    """Say how long the checks before a start took, the first of its phases."""
    say(phase_line("checkpoint, settings, address", time.monotonic() - began))


def open_logs(servers: Sequence[ServerSettings], verbose: bool) -> list[LogFile | None]:
    """Begin the logs of servers and say where they are; None each where all of vLLM's log comes on the screen.

    It does so where the user wants that, and where no file can be written.
    """
    settings = read_settings()
    if verbose or settings.log != "plain":
        return [None] * len(servers)
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    try:
        folder = Path(settings.log_dir or f"{state}/jina-v4-serve").expanduser().absolute()
        logs = [LogFile(folder / f"{server.task}-{server.port}.log") for server in servers]
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        say(f"vLLM's log comes on this screen, for no file can be written: {error} ({variable_of('log_dir')})")
        return [None] * len(servers)
    say(f"vLLM's log: {folder}/{', '.join(log.path.name for log in logs)} (--verbose: on this screen)")
    return list(logs)


def example(url: str, task: str) -> str:
    """Return a command that embeds a text, by the address of a server or gateway without a path."""
    settings = read_settings()
    key = " -H 'Authorization: Bearer KEY'" if settings.api_key or settings.api_key_file else ""
    body = f'{{"input": "a text", "task": "{task}", "dimensions": 128}}'
    return f"curl {url}/v1/embeddings -H 'Content-Type: application/json'{key} -d '{body}'"


class Screen:
    """The screen of one server, start after start."""

    def __init__(
        self, name: str, log: LogFile | None, label: str = "", example: str = "", began: float | None = None
    ) -> None:
        """Show nothing yet.

        Args:
            name: of the server, for messages.
            log: of the server; None where its processes write on the screen themselves.
            label: of each line where there are several servers, and a gateway that callers use.
            example: a command to try once it is ready.
            began: when this program did, a monotonic time in seconds; None for the moment of the server's start.
        """
        self._name = name
        self._log = log
        self._label = label
        self._example = example
        self._began = began

    def begin(self) -> int | None:
        """Note that a start begins; return the file for what its processes print, None for the screen."""
        self._since, self._began = self._began or time.monotonic(), None
        self._phases: dict[str, float] = {}
        self._hidden: deque[str] = deque(maxlen=_TAIL)
        self._in_traceback = False
        self._exception = ""  # the first, which the others follow from
        self._advice = ""
        self._explained = False
        return None if self._log is None else self._log.file

    def ready(self, url: str, failure: str | None) -> None:
        """Say that the server answers.

        Args:
            url: where, without a path.
            failure: why it computes no vectors nevertheless; None where it does.
        """
        self.look()
        if failure is not None:
            self._say(f"answers on {url}, but is not ready: {failure}")
            return
        place = "" if self._label else f" on {url}/v1"
        self._say(f"ready{place} after {time.monotonic() - self._since:.0f} s")
        if self._example:
            self._say(f"try: {self._example}")
            self._example = ""
        self._hidden.clear()
        self._exception = self._advice = ""

    def look(self) -> None:
        """Show what is to be seen of the lines that are new. A disk that fails ends no server."""
        with contextlib.suppress(OSError):
            for line in self._log.new_lines() if self._log else ():
                self._look_at(line)

    def _look_at(self, line: str) -> None:
        self._advice = self._advice or advice_of(line)
        text = without_process(line)
        if found := read_phase(line):
            phase, ended_s = found
            if phase not in self._phases:  # several processes pass through some
                say(phase_line(self._label + phase, ended_s - max(self._phases.values(), default=0.0)))
                self._phases[phase] = ended_s
        elif text.startswith("error: "):
            self._explained = True  # ours, and it says what to do
            self._say(line)
        elif self._is_shown(line, text):
            self._exception = self._exception or exception_of(line)
            self._say(line)
        elif not is_routine(line):
            self._hidden.append(line)

    def _is_shown(self, line: str, text: str) -> bool:
        if text.startswith(_TRACEBACK):
            self._in_traceback = True
        elif self._in_traceback:
            self._in_traceback = text.startswith((" ", "Traceback"))
        else:
            return is_warning(line)
        return True

    def ended(self, code: int) -> None:
        """Say why the server has ended by itself, as far as its log tells: also by what went past vLLM's logging."""
        self.look()
        if self._log is None or self._explained:
            return
        for line in self._hidden:
            say(f"  | {line}")
        self._say(f"the {self._name} server ended with exit code {code}; all of its log is in {self._log.path}")
        if self._exception:
            self._say(f"its first error: {self._exception}")
        self._say(f"what to do: {self._advice or advice_after(code)}")

    def _say(self, line: str) -> None:
        say(line if line.startswith(self._label) else self._label + line)
