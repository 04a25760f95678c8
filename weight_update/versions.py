"""Durable things that are not weights: decisions, epochs and the index of versions, in one SQLite file.

WAL with synchronous=FULL: when `decide` returns, the decision survives a power cut. The coordinator is the only writer.
"""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import numpy as np

from .errors import VersionError
from .messages import Decision

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS versions (
    version INTEGER PRIMARY KEY, base_version INTEGER NOT NULL, txn INTEGER NOT NULL, push_id TEXT NOT NULL UNIQUE,
    pushed_by TEXT NOT NULL, created_s REAL NOT NULL, digest TEXT NOT NULL, digests BLOB NOT NULL,
    fingerprint TEXT NOT NULL, num_tensors INTEGER NOT NULL, wire_bytes INTEGER NOT NULL, logical_bytes INTEGER NOT
    NULL, seconds REAL NOT NULL, pause_s REAL NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS events (
    time_s REAL NOT NULL, kind TEXT NOT NULL, version INTEGER NOT NULL, txn INTEGER NOT NULL, text TEXT NOT NULL);
"""
COLUMNS = (
    'version, base_version, txn AS "transaction", push_id, pushed_by, created_s, digest, digests, num_tensors,'
    " wire_bytes, logical_bytes, seconds"
)


class VersionIndex:
    """The coordinator's SQLite file.

    path: a file on a disk that survives a restart. Opening it starts a new epoch, durably.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(SCHEMA)
        self._db.execute("INSERT INTO meta VALUES ('epoch', 1) ON CONFLICT (key) DO UPDATE SET value = value + 1")
        self.epoch: int = self._db.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()[0]

    def decide(self, decision: Decision, fingerprint: int) -> None:
        """Make one decision durable."""
        self._db.execute(
            "INSERT INTO versions (version, base_version, txn, push_id, pushed_by, created_s, digest, digests,"
            " fingerprint, num_tensors, wire_bytes, logical_bytes, seconds) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)",
            (
                decision.version,
                decision.base_version,
                decision.transaction,
                decision.push_id,
                decision.pushed_by,
                decision.created_s,
                decision.digest,
                decision.digests.astype("<u8").tobytes(),
                f"{fingerprint:016x}",
                decision.num_tensors,
                decision.wire_bytes,
                decision.logical_bytes,
                decision.seconds,
            ),
        )

    def set_pause(self, version: int, pause_s: float) -> None:
        """Record how long serving stopped for a version; a measurement, not part of the decision."""
        self._db.execute("UPDATE versions SET pause_s = ? WHERE version = ?", (pause_s, version))

    def decisions(self) -> list[Decision]:
        """All decisions, oldest first."""
        return self._decisions("ORDER BY version")

    def decision(self, version: int | None = None) -> Decision:
        """The decision of one version, the last one by default."""
        where = "ORDER BY version DESC LIMIT 1" if version is None else f"WHERE version = {version:d}"
        found = self._decisions(where)
        if not found:
            raise VersionError(f"version {version}: unknown; 'transfuse versions' lists what was committed")
        return found[0]

    def _decisions(self, where: str) -> list[Decision]:
        cursor = self._db.execute(f"SELECT {COLUMNS} FROM versions {where}")
        names = [column[0] for column in cursor.description]
        rows = [dict(zip(names, row, strict=True)) for row in cursor]
        return [
            Decision(**row | {"digests": np.frombuffer(row["digests"], "<u8").astype(np.uint64).reshape(-1, 2)})
            for row in rows
        ]

    def pauses(self) -> dict[int, float]:
        """Version -> pause in seconds."""
        return dict(self._db.execute("SELECT version, pause_s FROM versions"))

    def last_version(self) -> int:
        """The largest version ever decided; 0 when there is none. Versions are never reused."""
        return int(self._db.execute("SELECT COALESCE(MAX(version), 0) FROM versions").fetchone()[0])

    def record(self, kind: str, version: int, transaction: int, text: str) -> float:
        """Append one event; returns its time in Unix seconds."""
        now_s = time.time()
        self._db.execute("INSERT INTO events VALUES (?,?,?,?,?)", (now_s, kind, version, transaction, text))
        return now_s

    def close(self) -> None:
        """Close the file."""
        self._db.close()
