"""Keeps committed versions in the store: a thread beside the coordinator that takes each from a replica and writes it.

    commit -> fetch from one replica's ranks into a spool -> digests as committed? -> Store.write -> durable

The newest version is what matters: one that is replaced before its rows are here is given up. Whoever waits for a
version holds the next push back until its rows are here, so that a busy trainer cannot starve the store. Nothing here
can stop serving: what a disk does is shown and tried again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from protos import transfuse_pb2 as pb
from weight_update.channels import PLAINTEXT
from weight_update.errors import (
    BusyError,
    DigestError,
    MemberError,
    StoreError,
    VersionError,
    WeightUpdateError,
    raise_all,
)
from weight_update.fetch import fetch
from weight_update.manifest import Manifest
from weight_update.messages import Decision, Notify
from weight_update.security import Security
from weight_update.spool import Spool
from weight_update.store import Store, StoredVersion, tensor_digest

from .coordinator import CoordinatorShell

log = logging.getLogger(__name__)

POLL_S = 0.2
RETRY_S = 5.0  # after a failure of the disk, or of whoever was asked
STOP_S = 10.0
HOLD_S = 60.0  # how long one Begin waits for the store; a trainer's calls last 120 s

Donors = Callable[[], Sequence[Sequence[pb.RankSpec]]]  # the ranks of every serving replica


class Keeper:
    """The writer of a version store.

    newest: the last decision. donors: who can be asked for its rows. told: gets events, as (kind, version, text).
    durable: is told of every version that the store has, or has no more. security: of the connections to the donors.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        *,
        newest: Callable[[], Decision],
        donors: Donors,
        told: Callable[[str, int, str], None],
        durable: Callable[[int, bool], None],
        security: Security = PLAINTEXT,
    ) -> None:
        self._security = security
        self.directory = store.directory
        self._store, self._manifest = store, manifest
        self._newest, self._donors, self._told, self._mark = newest, donors, told, durable
        self._changed = threading.Condition()  # guards all below; nothing slow is done under it
        self._stored = 0  # newest version that is durable
        self._here = 0  # newest version whose rows are here, or stored
        self._wanted = 0  # newest version that somebody waits for
        self._deciding = 0  # commits under way that somebody will wait for
        self._error: tuple[int, str] | None = None  # version, and why it is not stored
        self._turn = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def start(self) -> None:
        """Begin with what is there already."""
        newest = self._store.newest()
        if newest is not None and newest.fingerprint == self._store.fingerprint:
            self._stored = self._here = newest.version
            self._mark(newest.version, True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, before the version index is closed; a version that takes long is left to the next start."""
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(STOP_S)

    def status(self) -> str:
        """What an operator should know; "" while all is well."""
        error = self._error
        return (
            "" if error is None else f"version {error[0]} is not stored, tried again every {RETRY_S:.0f} s: {error[1]}"
        )

    # -- who waits

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """Around a commit that somebody will wait for: no later version may take its place."""
        with self._changed:
            self._deciding += 1
        try:
            yield
        finally:
            with self._changed:
                self._deciding -= 1
                self._changed.notify_all()

    def want(self, version: int) -> None:
        """Somebody waits for this version."""
        with self._changed:
            self._wanted = max(self._wanted, version)
            self._changed.notify_all()

    def wait(self, version: int, alive: Callable[[], bool]) -> None:
        """Return once a version is durable; StoreError where it cannot be stored now, or was replaced before."""
        self.want(version)
        since = self._error
        with self._changed:
            while self._stored < version and alive():
                if self._stopped.is_set():
                    raise StoreError(
                        f"version {version} is committed; whether it is stored, the next coordinator knows"
                    )
                if self._error is not None and self._error is not since:
                    raise StoreError(f"version {version} is committed and served, and not stored: {self._error[1]}")
                self._changed.wait(POLL_S)
        if version not in {each.version for each in self._store.versions()}:
            raise StoreError(f"version {version} is not in the store: version {self._stored} took its place")

    def admit(self) -> None:
        """Return once a new transaction may begin: nobody waits for rows that it would replace."""
        deadline_s = time.monotonic() + HOLD_S
        with self._changed:
            while self._deciding or (self._here < self._wanted and self._error is None):
                if not self._changed.wait(POLL_S) and time.monotonic() > deadline_s:
                    raise BusyError(f"version {self._wanted} is being stored for a trainer that waits; ask again")

    # -- the thread

    def _run(self) -> None:
        while not self._stopped.is_set():
            delay_s = POLL_S
            try:
                self._keep()
            except VersionError as error:
                log.info("store: %s", error)  # published a moment later, or replaced: look again
            except WeightUpdateError as error:
                delay_s = RETRY_S
                self._failed(str(error))
            self._stopped.wait(delay_s)

    def _failed(self, why: str) -> None:
        version = self._newest().version
        is_new = self._error is None or self._error[0] != version
        with self._changed:
            self._error = (version, why)
            self._changed.notify_all()
        if is_new:
            self._told("store", version, f"not stored: {why}")

    def _keep(self) -> None:
        decision = self._newest()
        if decision.version <= self._stored:
            return
        with Spool(self._store.directory, self._manifest.tensors) as spool:
            self._take(decision, spool)
            with self._changed:
                self._here, self._error = decision.version, None
                self._changed.notify_all()
            record = self._store.write(self._record(decision), spool.rows)
        self._mark(record.version, True)
        with self._changed:
            self._stored = record.version
            self._changed.notify_all()
        kind = f"changes of version {record.base}" if record.base else "in full"
        self._told("store", record.version, f"durable, {kind}, {record.num_bytes} bytes")
        for dropped in self._store.prune():
            self._mark(dropped.version, False)
            self._told("drop", dropped.version, f"dropped from the store, {dropped.num_bytes} bytes")

    def _take(self, decision: Decision, spool: Spool) -> None:
        """The rows of a version from one replica, which are those that were committed."""
        replicas = self._donors()
        if not replicas:
            raise MemberError(f"no replica serves version {decision.version}")
        self._turn += 1  # another one is asked the next time
        tensors = self._manifest.tensors
        rows = np.array([spec.num_rows for spec in tensors], np.int64)
        donors = replicas[self._turn % len(replicas)]
        fetch(donors, decision.version, np.zeros_like(rows), rows, spool.place, self._security)
        problems = [
            f"{spec.name}: fetched {found}, committed {wanted}"
            for index, (spec, wanted) in enumerate(zip(tensors, _digests(decision), strict=True))
            if (found := tensor_digest(spec, spool.rows(index))) != wanted
        ]
        raise_all(DigestError, f"version {decision.version}: a replica's bytes are not the committed ones", problems)

    def _record(self, decision: Decision) -> StoredVersion:
        return StoredVersion(
            version=decision.version,
            digest=decision.digest,
            digests=_digests(decision),
            fingerprint=self._store.fingerprint,
            created_s=decision.created_s,
            pushed_by=decision.pushed_by,
            step=decision.step,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """Where versions are kept, and how many: see `Store`."""

    directory: Path
    keep: int = 4
    keep_bytes: int | None = None


def keep_versions(shell: CoordinatorShell, config_dir: Path, config: StoreConfig) -> Keeper:
    """The keeper of what a coordinator commits, running. config_dir: of the model that is served."""

    def donors() -> list[list[pb.RankSpec]]:
        serving = shell.protocol.membership.serving()
        return [[each.spec for each in shell.members if each.id.replica == number] for number in serving]

    def told(kind: str, version: int, text: str) -> None:
        shell.notify(Notify(kind=kind, version=version, transaction=0, text=text))

    store = Store(
        config.directory,
        config_dir=config_dir,
        manifest=shell.manifest,
        keep=config.keep,
        keep_bytes=config.keep_bytes,
    )
    keeper = Keeper(
        store,
        shell.manifest,
        newest=shell.index.decision,
        donors=donors,
        told=told,
        durable=shell.index.set_durable,
        security=shell.roster.security,
    )
    keeper.start()
    return keeper


def _digests(decision: Decision) -> tuple[str, ...]:
    return tuple("".join(f"{lane:016x}" for lane in lanes) for lanes in decision.digests.tolist())
