"""The phases of a server's start. Its processes log the end of each; the launcher shows how many seconds it took."""

import logging
import os
import re
import time

from jina_v4_serve.api.log import LOGGER, log_lines
from jina_v4_serve.settings import read_settings

STARTED = "JINA_V4_STARTED"  # the launcher sets it for the processes of its server: a monotonic time in seconds
STARTED_HEADER = "X-Jina-V4-Started"  # of /health: tells the launcher whether its own server answers on the port
_LINE = re.compile(r"\] (.+): (\d+\.\d) s after the start$")


def started_header() -> dict[str, str]:
    """Return the header of /health with the time of this server's start; none if the launcher did not start it."""
    return {STARTED_HEADER: os.environ[STARTED]} if STARTED in os.environ else {}


def reached(phase: str) -> None:
    """Log that a phase has ended; do nothing if the launcher did not start this server."""
    if since := os.environ.get(STARTED):
        log_lines(read_settings().log)
        logging.getLogger(LOGGER).info("%s: %.1f s after the start", phase, time.monotonic() - float(since))


def read_phase(line: str) -> tuple[str, float] | None:
    """Return the phase whose end a log line reports, and the seconds since the start; None for other lines."""
    match = _LINE.search(line)
    return (match[1], float(match[2])) if match else None
