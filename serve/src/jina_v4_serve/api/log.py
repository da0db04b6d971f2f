"""Log lines for programs (`JINA_V4_LOG=json`): each line of ours is one JSON object, and every request has one.

Never in it: what was sent to be embedded, where images lie, keys, messages that quote a request.
"""

import logging
from datetime import UTC, datetime
from typing import Any, Literal

import orjson

from jina_v4_serve.api.record import Record

LOGGER = "jina_v4_serve"  # the parent of all of ours
_requests = logging.getLogger(f"{LOGGER}.request")


class JsonFormatter(logging.Formatter):
    """Writes a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Write time, level, logger, message, what else was given as `fields`, and a traceback where there is one."""
        content: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(content, default=str).decode()


def log_json() -> None:
    """Have all our loggers write JSON to standard error; a second call changes nothing."""
    logger = logging.getLogger(LOGGER)
    if not any(isinstance(handler.formatter, JsonFormatter) for handler in logger.handlers):
        handler = logging.StreamHandler()
        handler.setFormatter(JsonFormatter())
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


def log_request(program: Literal["server", "gateway"], record: Record) -> None:
    """Write the line of a request that is over."""
    _requests.info("request", extra={"fields": {"program": program, **record.line()}})
