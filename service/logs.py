"""Logs of the service's processes: one line an event, as text or as JSON, and one event a phase.

    phase version=4 rank=0.1 bytes=1048576 seconds=0.0123        as text
    {"time": ..., "level": "INFO", "event": "install", "version": 4, "rank": "0.1", "bytes": ..., "seconds": ...}

A line holds names, numbers and addresses; never what a tensor or a token holds. Fields come from `extra`, of which only
those of FIELDS are written.
"""

from __future__ import annotations

import json
import logging
from typing import Literal

LogFormat = Literal["text", "json"]
FORMATS: tuple[LogFormat, ...] = ("text", "json")
TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"
FIELDS = ("event", "version", "transaction", "rank", "bytes", "seconds")

log = logging.getLogger(__name__)


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's message beside the fields that it brings."""
        line: dict[str, object] = {
            "time": record.created,
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)


def set_up(log_format: LogFormat) -> None:
    """Log this process's events to stderr, which Ray keeps in a file."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if log_format == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def phase(event: str, *, version: int, rank: str, num_bytes: int, seconds: float) -> None:
    """One phase of a push on one rank."""
    fields = {"event": event, "version": version, "rank": rank, "bytes": num_bytes, "seconds": seconds}
    log.info(
        "%s version=%d rank=%s bytes=%d seconds=%.4f", event, version, rank, num_bytes, seconds, extra=fields
    )
