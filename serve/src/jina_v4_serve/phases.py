"""The phases of a server's start: its processes log each as it ends, and the launcher shows them with their seconds."""

import logging
import os
import re
import time

from jina_v4_serve.api.log import LOGGER, log_lines
from jina_v4_serve.settings import read_settings

STARTED = "JINA_V4_STARTED"  # the launcher sets it for the processes of its server: a monotonic time in seconds
STARTED_HEADER = "X-Jina-V4-Started"  # of /health: by it the launcher knows its own server from another on the port
_LINE = re.compile(r"\] (.+): (\d+\.\d) s after the start$")


def started() -> dict[str, str]:
    """Return the variable that says to a server's processes that it is started now."""
    return {STARTED: str(time.monotonic())}


def started_header() -> dict[str, str]:
    """Return the header of /health that says which start this process is of; none where no launcher started it."""
    return {STARTED_HEADER: os.environ[STARTED]} if STARTED in os.environ else {}


def reached(phase: str) -> None:
    """Log that a phase has ended. Where the launcher did not start this server, nobody asks."""
    if since := os.environ.get(STARTED):
        log_lines(read_settings().log)
        logging.getLogger(LOGGER).info("%s: %.1f s after the start", phase, time.monotonic() - float(since))


def read_phase(line: str) -> tuple[str, float] | None:
    """Return the phase that ends by a line of a plain log, and the seconds since the start; None for other lines."""
    found = _LINE.search(line)
    return (found[1], float(found[2])) if found else None
