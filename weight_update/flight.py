"""The flight recorder: what one process saw of a transaction, in one SQLite file, for a replay on another machine.

    DIR/<transaction>/coordinator.sqlite    the manifest, digests of the trainer's bytes
    DIR/<transaction>/0.1.sqlite            rank 1 of replica 0: its rows, every chunk as it came, digests, timings

The files hold weights: they are 0600, and written only where somebody asked for them. A recorder that cannot write
gives its file up and says so; it never fails a push.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .digest import Digests
from .errors import PlanError

log = logging.getLogger(__name__)

SUFFIX = ".sqlite"
SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, json TEXT NOT NULL);
CREATE TABLE chunks (time_s REAL NOT NULL, trainer_rank INTEGER NOT NULL, message BLOB NOT NULL);
CREATE TABLE digests (step TEXT PRIMARY KEY, time_s REAL NOT NULL, lanes BLOB NOT NULL);
"""


class Recorder:
    """Writes the files of one process. directory: of all transactions. who: names its file. keep: transactions whose
    file stays."""

    def __init__(self, directory: Path, who: str, keep: int = 4) -> None:
        self._directory, self._who, self._keep = directory, who, keep
        self._guard = threading.Lock()  # guards the open file, which streams and steps write to
        self._db: sqlite3.Connection | None = None
        self._transaction = 0

    def begin(self, transaction: int, facts: Mapping[str, Any]) -> None:
        """A transaction is open; facts: values for JSON, by name."""

        def start() -> None:
            self._close()
            path = self._directory / f"{transaction}" / f"{self._who}{SUFFIX}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            # A crash of this machine may lose the file; a crash of the process loses no more than the last chunk.
            self._db.executescript(f"PRAGMA synchronous=OFF; {SCHEMA}")
            self._transaction = transaction
            self._facts(facts)
            self._prune()

        self._attempt(start)

    def chunk(self, transaction: int, trainer_rank: int, message: bytes) -> None:
        """A chunk as it came."""
        self._write(transaction, "INSERT INTO chunks VALUES (?,?,?)", (time.time(), trainer_rank, message))

    def digests(self, transaction: int, step: str, lanes: Digests) -> None:
        """What a step found, [n, 2] uint64."""
        row = (step, time.time(), lanes.astype("<u8").tobytes())
        self._write(transaction, "INSERT OR REPLACE INTO digests VALUES (?,?,?)", row)

    def end(self, transaction: int, facts: Mapping[str, Any]) -> None:
        """It is over."""
        if transaction == self._transaction:

            def stop() -> None:
                self._facts(facts)
                self._close()

            self._attempt(stop)

    def _write(self, transaction: int, statement: str, row: tuple[object, ...]) -> None:
        if transaction == self._transaction and self._db is not None:
            self._attempt(lambda: self._db.execute(statement, row) if self._db else None)

    def _attempt(self, work: Callable[[], object]) -> None:
        with self._guard:
            try:
                work()
            except (OSError, sqlite3.Error) as error:
                log.warning("flight recorder %s: this transaction is not recorded: %s", self._who, error)
                self._db, self._transaction = None, 0

    def _facts(self, facts: Mapping[str, Any]) -> None:
        if self._db is not None:
            rows = [(name, json.dumps(value)) for name, value in facts.items()]
            self._db.executemany("INSERT OR REPLACE INTO facts VALUES (?,?)", rows)

    def _close(self) -> None:
        if self._db is not None:
            self._db.close()
        self._db, self._transaction = None, 0

    def _prune(self) -> None:
        mine = sorted(self._directory.glob(f"*/{self._who}{SUFFIX}"), key=lambda path: int(path.parent.name))
        for path in mine[: -self._keep]:
            path.unlink(missing_ok=True)
            if not any(path.parent.iterdir()):
                path.parent.rmdir()


class Flight:
    """One file, read."""

    def __init__(self, path: Path) -> None:
        self.who = path.name.removesuffix(SUFFIX)
        try:
            db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
            try:
                self.facts = {name: json.loads(value) for name, value in db.execute("SELECT name, json FROM facts")}
                self.digests: dict[str, Digests] = {
                    step: np.frombuffer(lanes, "<u8").astype(np.uint64).reshape(-1, 2)
                    for step, lanes in db.execute("SELECT step, lanes FROM digests")
                }
                (self.num_chunks,) = db.execute("SELECT COUNT(*) FROM chunks").fetchone()
            finally:
                db.close()
        except (sqlite3.Error, ValueError) as error:
            raise PlanError(f"{path}: no file of the flight recorder ({error})") from None
        self._path = path

    def chunks(self) -> Iterator[tuple[float, int, bytes]]:
        """(Unix time, trainer rank, message), in the order in which they came."""
        db = sqlite3.connect(f"file:{self._path}?mode=ro", uri=True)
        try:
            yield from db.execute("SELECT time_s, trainer_rank, message FROM chunks ORDER BY rowid")
        finally:
            db.close()
