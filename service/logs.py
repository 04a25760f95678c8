"""What processes show of themselves, and their logs: one line an event, as text or as JSON, and one event a phase.

    phase version=4 rank=0.1 bytes=1048576 seconds=0.0123        as text
    {"time": ..., "level": "INFO", "event": "install", "version": 4, "rank": "0.1", "bytes": ..., "seconds": ...}

A line holds names, numbers and addresses; never what a tensor or a token holds. Fields come from `extra`, of which only
those of FIELDS are written.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

LogFormat = Literal["text", "json"]
FORMATS: tuple[LogFormat, ...] = ("text", "json")
MetricsAt = Literal["loopback", "node"]
PLACES: tuple[MetricsAt, ...] = ("loopback", "node")
TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"
FIELDS = ("event", "version", "transaction", "rank", "bytes", "seconds")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seeing:
    """What a process shows of itself.

    metrics_port: of its metrics, 0 for none; the coordinator's has the status page too. metrics_at: on loopback, or at
    the address of the node at which the process listens for calls. record_dir: of the flight recorder, None for none.
    """

    metrics_port: int = 0
    metrics_at: MetricsAt = "loopback"
    log_format: LogFormat = "text"
    record_dir: Path | None = None

    def pages(self, listen: str) -> str:
        """host:port of the pages of a process that takes calls at `listen`; "" for none."""
        host = listen.rpartition(":")[0] if self.metrics_at == "node" else "127.0.0.1"
        return f"{host}:{self.metrics_port}" if self.metrics_port else ""

    def after(self, number: int) -> Seeing:
        """That of the rank of this number, counted from 0, where this is the coordinator's."""
        return replace(self, metrics_port=self.metrics_port and self.metrics_port + 1 + number)


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
