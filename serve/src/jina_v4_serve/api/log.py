"""Our log: lines in vLLM's form, or JSON objects with a line per request (`JINA_V4_LOG=json`).

The log never holds the texts and images of a request, their URLs, keys, or messages that quote a request.
"""

import logging
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import orjson

from jina_v4_serve.api.record import Record
from jina_v4_serve.settings import SERVED_TASKS, LogStyle

LOGGER = "jina_v4_serve"  # the parent of all our loggers
# In vLLM's form, so that one rule finds the warnings of both.
PLAIN = logging.Formatter("(jina-v4-serve) %(levelname)s %(asctime)s [%(filename)s:%(lineno)d] %(message)s", "%m-%d %T")
VLLM_LOG = Path(__file__).with_name("vllm_log.json")  # makes vLLM log in JSON
_requests = logging.getLogger(f"{LOGGER}.request")


class JsonFormatter(logging.Formatter):
    """Writes a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Write time, level, logger, message, the extra `fields`, and the traceback if there is one."""
        content: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.name.partition(".")[0] != LOGGER:  # vLLM's own: add the server and its process
            content |= {"tasks": os.environ.get(SERVED_TASKS), "process": record.processName, "pid": record.process}
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(content, default=str).decode()


def log_lines(style: LogStyle) -> None:
    """Make all our loggers write to standard error; a second call changes nothing."""
    logger = logging.getLogger(LOGGER)
    formatter = JsonFormatter() if style == "json" else PLAIN
    if not any(isinstance(handler.formatter, type(formatter)) for handler in logger.handlers):
        handler = logging.StreamHandler()
        handler.setFormatter(formatter)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


def log_request(program: Literal["server", "gateway"], record: Record) -> None:
    """Write the line of a finished request."""
    _requests.info("request", extra={"fields": {"program": program, **record.line()}})
