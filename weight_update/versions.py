"""Durable things that are not weights: decisions, epochs, members and the index of versions, in one SQLite file.

WAL with synchronous=FULL: when `decide` returns, the decision survives a power cut. The coordinator is the only writer:
whoever opened the file last, all others' writes are refused.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from .errors import VersionError
from .messages import Decision, MemberId, Notify

SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS versions (
    version INTEGER PRIMARY KEY, base_version INTEGER NOT NULL, txn INTEGER NOT NULL, push_id TEXT NOT NULL UNIQUE,
    pushed_by TEXT NOT NULL, created_s REAL NOT NULL, digest TEXT NOT NULL, digests BLOB NOT NULL,
    fingerprint TEXT NOT NULL, num_tensors INTEGER NOT NULL, wire_bytes INTEGER NOT NULL, logical_bytes INTEGER NOT
    NULL, seconds REAL NOT NULL, pause_s REAL NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS pauses (version INTEGER PRIMARY KEY, pause_s REAL NOT NULL);
CREATE TABLE IF NOT EXISTS members (
    replica INTEGER NOT NULL, rank INTEGER NOT NULL, address TEXT NOT NULL, PRIMARY KEY (replica, rank));
CREATE TABLE IF NOT EXISTS dismissed (replica INTEGER PRIMARY KEY);
CREATE TABLE IF NOT EXISTS events (
    time_s REAL NOT NULL, kind TEXT NOT NULL, version INTEGER NOT NULL, txn INTEGER NOT NULL, text TEXT NOT NULL);
CREATE TRIGGER IF NOT EXISTS events_stay BEFORE DELETE ON events
    BEGIN SELECT RAISE(ABORT, 'events is append-only'); END;
CREATE TRIGGER IF NOT EXISTS events_stand BEFORE UPDATE ON events
    BEGIN SELECT RAISE(ABORT, 'events is append-only'); END;
CREATE TRIGGER IF NOT EXISTS events_follow BEFORE INSERT ON events
    WHEN EXISTS (SELECT 1 FROM events WHERE rowid = NEW.rowid) BEGIN SELECT RAISE(ABORT, 'events is append-only'); END;
"""
# columns that files of earlier releases lack
ADDED = {
    "versions": {"step": "INTEGER NOT NULL DEFAULT 0", "restores": "INTEGER NOT NULL DEFAULT 0", "durable": "REAL"},
    "events": {"who": "TEXT NOT NULL DEFAULT ''", "peer": "TEXT NOT NULL DEFAULT ''"},
}
COLUMNS = (
    'version, base_version, txn AS "transaction", push_id, pushed_by, created_s, digest, digests, num_tensors,'
    " wire_bytes, logical_bytes, seconds, step, restores"
)
EVENT_COLUMNS = "time_s, kind, version, txn, text, who, peer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """An event as it was recorded. number: grows by one with each. who, peer: see `VersionIndex.record`."""

    time_s: float
    event: Notify
    who: str
    peer: str
    number: int = 0

    @classmethod
    def of(cls, row: tuple[Any, ...]) -> Record:
        """From the file."""
        number, time_s, kind, version, transaction, text, who, peer = row
        event = Notify(kind=kind, version=version, transaction=transaction, text=text)
        return cls(time_s=time_s, event=event, who=who, peer=peer, number=number)

    def row(self) -> tuple[object, ...]:
        """Values of EVENT_COLUMNS."""
        event = self.event
        return (self.time_s, event.kind, event.version, event.transaction, event.text, self.who, self.peer)


class VersionIndex:
    """The coordinator's SQLite file.

    path: a file on a disk that survives a restart. Opening it starts a new epoch, durably.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()  # guards the connection, which knows one transaction at a time
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(SCHEMA)
        for table, columns in ADDED.items():
            held = {row[1] for row in self._db.execute(f"PRAGMA table_info({table})")}
            for name in columns.keys() - held:
                self._db.execute(f"ALTER TABLE {table} ADD COLUMN {name} {columns[name]}")
        self._newest: Decision | None = None  # the last decision: it is asked for at every call, and is large
        self._db.execute("INSERT INTO meta VALUES ('epoch', 1) ON CONFLICT (key) DO UPDATE SET value = value + 1")
        self.epoch: int = self._db.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()[0]

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """What a query finds. Even a query ends the process where another thread closes the connection meanwhile."""
        with self._lock:
            return self._db.execute(query, values).fetchall()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction of the file, refused where another coordinator has opened it since."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self.require_epoch()
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def require_epoch(self) -> None:
        """Raise VersionError where another coordinator has opened the file since."""
        ((epoch,),) = self._rows("SELECT value FROM meta WHERE key = 'epoch'")
        if epoch != self.epoch:
            raise VersionError(f"epoch {self.epoch} is over, a coordinator of epoch {epoch} took its place; stop")

    def decide(self, decision: Decision, fingerprint: int) -> None:
        """Make one decision durable."""
        row = (
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
            decision.step,
            decision.restores,
        )
        with self._writing() as db:
            db.execute(
                "INSERT INTO versions (version, base_version, txn, push_id, pushed_by, created_s, digest, digests,"
                " fingerprint, num_tensors, wire_bytes, logical_bytes, seconds, step, restores)"
                " VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
                row,
            )
        self._newest = decision

    def set_durable(self, version: int, durable: bool = True) -> None:
        """The version store has this version, or has it no more."""
        with self._writing() as db:
            db.execute("UPDATE versions SET durable = ? WHERE version = ?", (time.time() if durable else None, version))

    def durable(self) -> list[int]:
        """Versions that the store has, oldest first."""
        return [row[0] for row in self._rows("SELECT version FROM versions WHERE durable NOT NULL ORDER BY 1")]

    def members(self) -> dict[MemberId, str]:
        """Who takes part, and at which address."""
        rows = self._rows("SELECT replica, rank, address FROM members ORDER BY replica, rank")
        return {MemberId(replica=replica, rank=rank): address for replica, rank, address in rows}

    def enroll(self, addresses: Mapping[MemberId, str]) -> None:
        """These ranks are the members of their replicas from now on."""
        with self._writing() as db:
            for replica in {member.replica for member in addresses}:
                db.execute("DELETE FROM members WHERE replica = ?", (replica,))
            rows = [(member.replica, member.rank, address) for member, address in addresses.items()]
            db.executemany("INSERT INTO members VALUES (?,?,?)", rows)

    def dismiss(self, replica: int) -> None:
        """A replica is no member any more, and its number never comes back to this fleet."""
        with self._writing() as db:
            db.execute("DELETE FROM members WHERE replica = ?", (replica,))
            db.execute("INSERT OR IGNORE INTO dismissed VALUES (?)", (replica,))

    def dismissed(self) -> set[int]:
        """Numbers of replicas that were dismissed."""
        return {replica for (replica,) in self._rows("SELECT replica FROM dismissed")}

    def disband(self) -> None:
        """No replica is a member any more, or ever was: another fleet comes."""
        with self._writing() as db:
            db.execute("DELETE FROM members")
            db.execute("DELETE FROM dismissed")

    def is_fleet(self, key: str) -> bool:
        """Whether the file was last used by the processes of this key: a restart of the coordinator alone."""
        known = self._rows("SELECT value FROM meta WHERE key = 'fleet'")
        return known == [(xxhash.xxh3_64_intdigest(key.encode()) >> 1,)]

    def set_fleet(self, key: str) -> None:
        """From now on it is."""
        with self._writing() as db:
            number = xxhash.xxh3_64_intdigest(key.encode()) >> 1
            db.execute("INSERT OR REPLACE INTO meta VALUES ('fleet', ?)", (number,))

    def fingerprint(self, version: int) -> int:
        """Of the manifest that a version was decided for."""
        ((text,),) = self._rows("SELECT fingerprint FROM versions WHERE version = ?", version)
        return int(text, 16)

    def set_pause(self, version: int, pause_s: float) -> None:
        """Record how long serving stopped for a version; a measurement, not part of the decision."""
        with self._writing() as db:
            db.execute("INSERT OR REPLACE INTO pauses VALUES (?, ?)", (version, pause_s))

    def decisions(self, last: int = 0) -> list[Decision]:
        """The `last` newest decisions, 0 for all of them, oldest first."""
        limit = f" LIMIT {last:d}" if last else ""
        return self._decisions(f"ORDER BY version DESC{limit}")[::-1]

    def decision(self, version: int | None = None) -> Decision:
        """The decision of one version, the last one by default."""
        newest = self._newest
        if newest is not None and version in (None, newest.version):
            return newest
        where = "ORDER BY version DESC LIMIT 1" if version is None else f"WHERE version = {version:d}"
        with self._lock:
            found = self._decisions(where)
            if not found:
                raise VersionError(f"version {version}: unknown; 'transfuse versions' lists what was committed")
            if version is None:
                self._newest = found[0]
        return found[0]

    def _decisions(self, where: str) -> list[Decision]:
        with self._lock:
            cursor = self._db.execute(f"SELECT {COLUMNS} FROM versions {where}")
            names = [column[0] for column in cursor.description]
            rows = [dict(zip(names, row, strict=True)) for row in cursor]
        return [
            Decision(**row | {"digests": np.frombuffer(row["digests"], "<u8").astype(np.uint64).reshape(-1, 2)})
            for row in rows
        ]

    def pauses(self) -> dict[int, float]:
        """Version -> pause in seconds."""
        measured = "COALESCE(pauses.pause_s, versions.pause_s)"  # the column is of earlier releases
        return dict(self._rows(f"SELECT version, {measured} FROM versions LEFT JOIN pauses USING (version)"))

    def last_version(self) -> int:
        """The largest version ever decided; 0 when there is none. Versions are never reused."""
        return int(self._rows("SELECT COALESCE(MAX(version), 0) FROM versions")[0][0])

    def record(self, notify: Notify, *, who: str = "", peer: str = "") -> Record:
        """Append one event. who, peer: of the call that it was, "" for what the service did by itself."""
        record = Record(time_s=time.time(), event=notify, who=who, peer=peer)
        with self._lock:
            cursor = self._db.execute(f"INSERT INTO events ({EVENT_COLUMNS}) VALUES (?,?,?,?,?,?,?)", record.row())
            return replace(record, number=cursor.lastrowid or 0)

    def events(self, *, after: int = 0, limit: int = 100, kinds: Sequence[str] = ()) -> list[Record]:
        """The newest `limit` events of these kinds, of all where none is named, oldest first. after: only those with a
        larger number."""
        among = f" AND kind IN ({','.join('?' * len(kinds))})" if kinds else ""
        query = f"SELECT rowid, {EVENT_COLUMNS} FROM events WHERE rowid > ?{among} ORDER BY rowid DESC LIMIT ?"
        rows = self._rows(query, after, *kinds, limit)
        return [Record.of(row) for row in reversed(rows)]

    def close(self) -> None:
        """Close the file; nobody is reading it then."""
        with self._lock:
            self._db.close()
