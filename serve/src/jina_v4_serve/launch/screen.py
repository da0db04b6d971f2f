"""Shows one server on the screen: the phases of its start, warnings, errors, and what to do after a failure.

Everything else is only in the server's log file. The lines are read from that file, so a slow screen delays nothing.
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
    """Print a line for the operator. An error, such as a full disk behind standard error, is ignored."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)  # noqa: T201 - the user's screen


def phase_line(phase: str, seconds: float) -> str:
    """Return the line of a phase that has ended."""
    return f"  {phase:<46} {seconds:5.1f} s"


def say_checked(started_at: float) -> None:
    """Print the first phase of a start, the checks, which began at a monotonic time in seconds."""
    say(phase_line("checkpoint, settings, address", time.monotonic() - started_at))


def open_logs(servers: Sequence[ServerSettings], verbose: bool) -> list[LogFile | None]:
    """Create the log files of servers and print where they are.

    Returns:
        A log file per server; None per server if vLLM logs to the screen, as the user wants it or no file can be
        written.
    """
    settings = read_settings()
    if verbose or settings.log != "plain":
        return [None] * len(servers)
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    try:
        folder = Path(settings.log_dir or f"{state}/jina-v4-serve").expanduser().absolute()
        logs = [LogFile(folder / f"{server.task}-{server.port}.log") for server in servers]
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        say(f"vLLM logs to this screen, as no file can be written: {error} ({variable_of('log_dir')})")
        return [None] * len(servers)
    say(f"vLLM's log: {folder}/{', '.join(log.path.name for log in logs)} (--verbose: on this screen)")
    return list(logs)


def example(url: str, task: str) -> str:
    """Return a command that embeds a text; `url` is the address of a server or gateway, without a path."""
    settings = read_settings()
    key = " -H 'Authorization: Bearer KEY'" if settings.api_key or settings.api_key_file else ""
    body = f'{{"input": "a text", "task": "{task}", "dimensions": 128}}'
    return f"curl {url}/v1/embeddings -H 'Content-Type: application/json'{key} -d '{body}'"


class Screen:
    """Shows one server, at its first start and at every restart."""

    def __init__(
        self, name: str, log: LogFile | None, label: str = "", example: str = "", started_at: float | None = None
    ) -> None:
        """Show nothing yet.

        Args:
            name: the server's name in messages.
            log: the server's log file; None if its processes print to the screen.
            label: begins each line if there are several servers behind a gateway.
            example: a command to show when the server is ready for the first time.
            started_at: the start of this program, a monotonic time in seconds; None for the start of the server.
        """
        self._name = name
        self._log = log
        self._label = label
        self._example = example
        self._program_started_at = started_at

    def begin(self) -> int | None:
        """Prepare for a start; return the file for the output of its processes, or None for the screen."""
        self._started_at, self._program_started_at = self._program_started_at or time.monotonic(), None
        self._phases: dict[str, float] = {}
        self._hidden: deque[str] = deque(maxlen=_TAIL)  # the last lines that were not shown
        self._in_traceback = False
        self._exception = ""  # the first one, which caused the others
        self._advice = ""
        self._explained = False
        return None if self._log is None else self._log.file

    def ready(self, url: str, failure: str | None) -> None:
        """Show that the server answers.

        Args:
            url: its address, without a path.
            failure: why it answers but does not serve; None if it serves.
        """
        self.look()
        if failure is not None:
            self._say(f"answers on {url}, but is not ready: {failure}")
            return
        place = "" if self._label else f" on {url}/v1"
        self._say(f"ready{place} after {time.monotonic() - self._started_at:.0f} s")
        if self._example:
            self._say(f"try: {self._example}")
            self._example = ""
        self._hidden.clear()
        self._exception = self._advice = ""

    def look(self) -> None:
        """Read the new lines of the log, and show those that matter. An error of the disk is ignored."""
        with contextlib.suppress(OSError):
            for line in self._log.new_lines() if self._log else ():
                self._read_line(line)

    def _read_line(self, line: str) -> None:
        self._advice = self._advice or advice_of(line)
        text = without_process(line)
        if ended := read_phase(line):
            phase, ended_s = ended
            if phase not in self._phases:  # several processes report the same phase
                say(phase_line(self._label + phase, ended_s - max(self._phases.values(), default=0.0)))
                self._phases[phase] = ended_s
        elif text.startswith("error: "):
            self._explained = True  # our own message, which says what to do
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
        """Show why the server has ended: the last lines that were not shown, its first error, and what to do."""
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
