"""The coordinator's shell: one thread feeds the protocol, and carries out its actions over gRPC, SQLite and clocks."""

from __future__ import annotations

import logging
import queue
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from protos import transfuse_pb2 as pb
from weight_update.channels import PLAINTEXT
from weight_update.digest import Digests
from weight_update.errors import BusyError, MemberError, TransferError, VersionError, WeightUpdateError
from weight_update.membership import key_of, shared
from weight_update.messages import (
    Action,
    Dismiss,
    Event,
    MemberId,
    MemberReply,
    Notify,
    Persist,
    Persisted,
    Reply,
    Request,
    Send,
    SetTimer,
    Tick,
    Timeout,
)
from weight_update.opening import loss, lost
from weight_update.protocol import Coordinator
from weight_update.security import Security
from weight_update.store import StoredVersion
from weight_update.transaction import Phase
from weight_update.values import from_manifest_proto
from weight_update.versions import VersionIndex

from .audit import Caller
from .faults import Faults
from .members import SENDERS, MemberSpec, state_of
from .roster import Roster, first_version, require_one_manifest, stored_version
from .watching import Watchers, event_of

log = logging.getLogger(__name__)

TICK_S = 1.0
READY_TIMEOUT_S = 15.0
# Steps that only go one way are tried again when a member cannot be reached; all steps are idempotent.
ATTEMPTS = {"publish": 3, "undo": 3, "abort": 3}
RETRY_DELAY_S = 1.0
INSTALLING = frozenset({Phase.INSTALLING, Phase.INSTALLED, Phase.CONFIRMING, Phase.PUBLISHING})


class CoordinatorShell:
    """Owns the event loop, the version index and the connections to the members.

    addresses: host:port of every rank; a restart finds those that came later in state_file, an SQLite file that
    outlives this process. source: what the members loaded; loaded: the version that this is, where it comes from a
    version store. min_replicas: replicas that a push needs, 0 for all. security: of the connections to the ranks.
    """

    def __init__(
        self,
        *,
        addresses: Sequence[str],
        state_file: Path,
        source: str,
        loaded: StoredVersion | None = None,
        min_replicas: int = 0,
        security: Security = PLAINTEXT,
    ) -> None:
        self.source = source
        self.started_s = time.time()
        self._clock_s = self.started_s - time.monotonic()  # Unix time that never jumps
        self.index = VersionIndex(state_file)
        self._pool = ThreadPoolExecutor(max(16, 4 * len(addresses)), thread_name_prefix="member")
        self.roster = Roster(self.index.epoch, security.as_service())
        self.faults = Faults()
        self._greeting: set[MemberId] = set()  # members whose answer to a greeting is still to come
        self._events: queue.SimpleQueue[Event | Callable[[], None] | None] = queue.SimpleQueue()
        self._futures: dict[int, Future[Any]] = {}
        self._timers: dict[str, threading.Timer] = {}
        self._next_request = 0
        self._guard = threading.Lock()  # guards _next_request, _futures, _greeting; nothing blocks under it
        self._stopped = threading.Event()
        self._watchers = Watchers(self._stopped)
        self.watch, self.listen = self._watchers.watch, self._watchers.listen
        self._thread = threading.Thread(target=self._run, name="coordinator", daemon=True)
        self._ticker = threading.Thread(target=self._tick, name="ticker", daemon=True)
        self._start(addresses, loaded, min_replicas)

    # -- start

    def _start(self, addresses: Sequence[str], loaded: StoredVersion | None, min_replicas: int) -> None:
        fleet = ",".join(sorted(addresses))
        is_new = not self.index.is_fleet(fleet)
        recorded = {} if is_new else self.index.members()
        replies = self.roster.meet(list(recorded.values()) or addresses, self._pool, all_of_them=is_new)
        self.manifest = from_manifest_proto(replies[0].manifest)
        if is_new:
            self.index.disband()
            self.index.enroll({member: spec.address for member, spec in self.roster.specs.items()})
            self._number(loaded)
            self.index.set_fleet(fleet)  # only now: a start that was cut short begins anew
        decisions = self.index.decisions()
        members = self.index.members()
        for member, address in members.items():
            self.roster.connect(member, address)
        self.protocol = Coordinator(
            members=list(members),
            manifest=self.manifest,
            version=decisions[-1].version,
            digests=decisions[-1].digests,
            epoch=self.index.epoch,
            now_s=self.now_s(),
            committed={each.push_id: each.version for each in decisions},
            decided={each.transaction: each.version for each in decisions if each.transaction},
            min_replicas=min_replicas,
            keys={member.replica: key_of(members, member.replica) for member in members},
            dismissed=self.index.dismissed(),
        )
        self._thread.start()
        self._ticker.start()
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while self.protocol.fenced and not lost(self.protocol) and time.monotonic() < deadline_s:
            time.sleep(0.02)

    def _number(self, loaded: StoredVersion | None) -> None:
        """Freshly loaded members become the next version. What a store says to be a version comes in under its old
        number, once its digests are compared."""
        roster = self.roster
        if any(state.version for state in roster.states.values()):
            return
        if loaded is not None:
            decision = stored_version(loaded, self.manifest)
            if decision.version > self.index.last_version():
                self.index.decide(decision, self.manifest.fingerprint)
            return
        found = self._pool.map(lambda member: roster.step(member, "digest"), roster.specs)
        digests = dict(zip(roster.specs, found, strict=True))
        decision = first_version(digests, self.manifest, self.source, self.index.last_version(), self.index.epoch)
        self.index.decide(decision, self.manifest.fingerprint)
        list(self._pool.map(lambda member: roster.step(member, "adopt", decision.version), roster.specs))

    def now_s(self) -> float:
        """Unix time at the start of this process, and monotonic since."""
        return self._clock_s + time.monotonic()

    @property
    def members(self) -> list[MemberSpec]:
        """Every member that was met."""
        return [spec for member, spec in self.roster.specs.items() if member in self.protocol.membership.contacts]

    # -- the loop

    def request(self, op: str, **args: Any) -> Any:
        """Feed one request to the protocol and wait for its answer."""
        future: Future[Any] = Future()
        with self._guard:
            id_ = self._next_request = self._next_request + 1
            self._futures[id_] = future
        self._events.put(Request(id=id_, op=op, now_s=self.now_s(), args=args))
        return future.result()

    def between_events(self, function: Callable[[], Any]) -> Any:
        """Run `function` in the loop's thread, between two events."""
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except WeightUpdateError as error:
                future.set_exception(error)

        self._events.put(run)
        return future.result()

    def _run(self) -> None:
        while (event := self._events.get()) is not None:
            try:
                if callable(event):
                    event()
                    continue
                self._do(self.protocol.handle(event))
            except VersionError as error:  # another coordinator took over; members refuse this one, too
                log.error("%s", error)
                self._stopped.set()
                return

    def _tick(self) -> None:
        while not self._stopped.is_set():
            self._events.put(self._tick_once)
            self._stopped.wait(TICK_S)

    def _tick_once(self) -> None:
        self.index.require_epoch()
        self._do(self.protocol.handle(Tick(now_s=self.now_s())))

    def _do(self, actions: Sequence[Action]) -> None:
        for action in actions:
            ACTIONS[type(action)](self, action)

    def _fence(self, member: MemberId, why: str) -> None:
        if member.replica in self.protocol.membership.serving():
            self._do(self.protocol.fence(member, why))

    def _send(self, send: Send) -> None:
        self.faults.reached(send.step)
        if send.step == "hello":
            with self._guard:
                if send.member in self._greeting:
                    return
                self._greeting.add(send.member)
        self._pool.submit(self._answered, send, self.roster.stub(send.member))

    def _answered(self, send: Send, stub: Any) -> None:
        token, result, error = float("-inf"), None, None
        for attempt in range(ATTEMPTS.get(send.step, 1)):
            time.sleep(RETRY_DELAY_S if attempt else 0.0)
            error = None
            try:
                answer = SENDERS[send.step](stub, send, self.roster.around(send))
                token, result = answer.token, answer.result
            except WeightUpdateError as failure:
                error = failure
            if not isinstance(error, TransferError):
                break
        if send.step == "hello":
            with self._guard:
                self._greeting.discard(send.member)
            if isinstance(result, pb.HelloReply):
                if result.damage:
                    self._events.put(partial(self._fence, send.member, result.damage))
                self.roster.states[send.member], result = result, state_of(result)
        self._events.put(
            MemberReply(
                member=send.member,
                step=send.step,
                round=send.round,
                now_s=self.now_s(),
                token=token,
                result=result,
                error=error,
            )
        )

    def _reply(self, reply: Reply) -> None:
        with self._guard:
            future = self._futures.pop(reply.id)
        if reply.error is not None:
            future.set_exception(reply.error)
        else:
            future.set_result(reply.result)

    def _persist(self, persist: Persist) -> None:
        """Write the decision. A write that failed is looked up: only a record that is not there may be aborted."""
        decision = persist.decision
        error: WeightUpdateError | None = None
        self.faults.reached("decide")
        try:
            self.index.decide(decision, self.manifest.fingerprint)
        except sqlite3.Error as failure:
            if self.index.last_version() >= decision.version:
                raise
            error = MemberError(f"the decision could not be made durable: {failure}; free the disk of the state file")
        self.faults.reached("decided")
        self._events.put(Persisted(transaction=decision.transaction, now_s=self.now_s(), error=error))

    def _set_timer(self, action: SetTimer) -> None:
        if (previous := self._timers.pop(action.name, None)) is not None:
            previous.cancel()

        def fire() -> None:
            self._events.put(Timeout(name=action.name, transaction=action.transaction, now_s=self.now_s()))

        timer = self._timers[action.name] = threading.Timer(action.delay_s, fire)
        timer.daemon = True
        timer.start()

    def notify(self, notify: Notify, caller: Caller = Caller()) -> None:  # noqa: B008 - it is frozen
        """Record an event and tell whoever watches. caller: whose call it was, if it was one."""
        record = self.index.record(notify, who=caller.who, peer=caller.peer)
        log.info("%s version=%d transaction=%d %s", notify.kind, notify.version, notify.transaction, notify.text)
        self._watchers.tell(event_of(record))

    # -- members that come and go

    def add(self, addresses: Sequence[str], *, dead: bool) -> int:
        """Ranks of a new replica, or the new processes of one; returns its number. They are let in by and by."""
        found = [self.roster.hello(address) for address in addresses]
        for each in found:
            if isinstance(each, WeightUpdateError):
                raise each
        replies = [reply for reply in found if isinstance(reply, pb.HelloReply)]
        if len({reply.spec.replica for reply in replies}) != 1:
            raise MemberError(f"{', '.join(addresses)}: expected all ranks of one replica; name them together")
        specs = [MemberSpec.of(address, reply) for address, reply in zip(addresses, replies, strict=True)]
        fingerprints = [self.manifest.fingerprint, *(reply.manifest.fingerprint for reply in replies)]
        require_one_manifest([self.members[0], *specs], fingerprints)

        def enroll() -> None:
            self.protocol.membership.require_open(specs[0].id.replica)
            self.index.enroll({spec.id: spec.address for spec in specs})
            for address, reply in zip(addresses, replies, strict=True):
                self.roster.learn(address, reply)

        self.between_events(enroll)
        members, replica = {spec.id: spec.address for spec in specs}, specs[0].id.replica
        self.request("add", members=list(members), key=key_of(members, replica), dead=dead)
        return replica

    # -- going back

    def restore(self, op: str, version: int, push_id: str = "", pushed_by: str = "") -> Any:
        """Make an older version's bytes the next version; op: rollback, or reset where the current ones are lost."""
        decision = self.index.decision(version)
        if self.index.fingerprint(version) != self.manifest.fingerprint:
            raise VersionError(f"{op}: version {version} is of another model, format or tensor list")
        return self.request(
            op,
            version=version,
            digests=decision.digests,
            push_id=push_id or f"{op}-{uuid.uuid4()}",
            pushed_by=pushed_by or f"{op} to version {version}",
        )

    def reachable(self) -> set[int]:
        """Versions that every serving rank said it keeps, a greeting ago."""
        kept = {m.id: self.roster.states[m.id].kept for m in self.live_members() if m.id in self.roster.states}
        return set(shared(kept))

    def lost(self) -> str:
        """What no replica holds any more, in words; "" while nothing is lost."""
        return loss(self.protocol, max(self.index.durable(), default=0))

    # -- what operators ask

    def committed(self, asked: str) -> tuple[int, Digests]:
        """The version that all serving ranks hold now, and its digests; BusyError while a commit is in progress."""

        def held() -> tuple[int, Digests]:
            if self.protocol.phase in INSTALLING:
                raise BusyError(f"{asked}: a commit is in progress; ask again")
            return self.protocol.version, self.protocol.digests

        found: tuple[int, Digests] = self.between_events(held)
        return found

    def beside(self, work: Callable[[], None]) -> None:
        """Run work that takes long in a thread of the members' calls."""
        self._pool.submit(work)

    def of_all(self, members: Sequence[MemberSpec], step: str) -> dict[MemberId, Any]:
        """The answers of these members to one step beside the protocol."""
        answers = self._pool.map(lambda member: self.roster.step(member.id, step), members)
        return dict(zip((member.id for member in members), answers, strict=True))

    def live_members(self) -> list[MemberSpec]:
        """Members of replicas that are not fenced."""
        return [member for member in self.members if member.id.replica not in self.protocol.fenced]

    def takers(self) -> list[MemberSpec]:
        """Members that take part in the next push."""
        protocol = self.protocol
        replicas = protocol.membership.stocked() if lost(protocol) else protocol.membership.serving()
        return [member for member in self.members if member.id.replica in replicas]

    def leader_addresses(self) -> dict[int, str]:
        """Replica -> address of the rank that answers Generate, serving replicas only."""
        leaders = [member for member in self.live_members() if member.id.rank == 0]
        return {each.id.replica: each.address for each in leaders if not self.roster.states[each.id].gauges.draining}

    def stop(self) -> None:
        """Stop the loop; the members go on serving."""
        self._stopped.set()
        self._events.put(None)
        self._thread.join(timeout=5)
        for timer in self._timers.values():
            timer.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.roster.close()
        self.index.close()


ACTIONS: Mapping[type, Callable[[CoordinatorShell, Any], None]] = {
    Send: CoordinatorShell._send,
    Reply: CoordinatorShell._reply,
    Persist: CoordinatorShell._persist,
    SetTimer: CoordinatorShell._set_timer,
    Notify: CoordinatorShell.notify,
    Dismiss: lambda shell, dismiss: shell.index.dismiss(dismiss.replica),
}
