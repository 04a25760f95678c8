"""The coordinator's shell: one thread that feeds the protocol and carries out its actions over gRPC, SQLite and
clocks."""

from __future__ import annotations

import logging
import math
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from weight_update.digest import Digests, total
from weight_update.errors import BusyError, DigestError, MemberError, TransferError, WeightUpdateError, raise_all
from weight_update.manifest import Manifest
from weight_update.messages import (
    Action,
    Decision,
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
    Timeout,
)
from weight_update.protocol import Coordinator
from weight_update.transaction import Phase, replica_sums
from weight_update.transport import call, connect, from_manifest_proto
from weight_update.versions import VersionIndex

from .members import SENDERS, STEP_TIMEOUT_S, MemberSpec

log = logging.getLogger(__name__)

PROBE_PERIOD_S = 1.0
PROBE_TIMEOUT_S = 5.0
PROBE_FAILURES = 3  # probes in a row that a rank may miss before its replica is fenced
# Steps that only go one way are tried again when a member cannot be reached; all steps are idempotent.
ATTEMPTS = {"publish": 3, "undo": 3, "abort": 3}
RETRY_DELAY_S = 1.0
INSTALLING = frozenset({Phase.INSTALLING, Phase.INSTALLED, Phase.CONFIRMING, Phase.PUBLISHING})


class CoordinatorShell:
    """Owns the event loop, the version index and the connections to the members.

    addresses: host:port of every rank. state_file: SQLite file that outlives this process. source: what the members
    loaded.
    """

    def __init__(self, *, addresses: Sequence[str], state_file: Path, source: str) -> None:
        self.source = source
        self.started_s = time.time()
        self.index = VersionIndex(state_file)
        self._pool = ThreadPoolExecutor(max(8, 4 * len(addresses)), thread_name_prefix="member")
        self._stubs: dict[MemberId, Any] = {}
        self._channels = {address: connect(address) for address in addresses}
        self._events: queue.SimpleQueue[Event | Callable[[], None] | None] = queue.SimpleQueue()
        self._futures: dict[int, Future[Any]] = {}
        self._timers: dict[str, threading.Timer] = {}
        self._watchers: set[queue.SimpleQueue[pb.Event | None]] = set()
        self._next_request = 0
        self._guard = threading.Lock()  # guards _next_request, _futures and _watchers; nothing blocks under it
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="coordinator", daemon=True)
        self.states: dict[MemberId, pb.HelloReply] = {}
        self.operator_paused = False
        self.members, self.manifest = self._meet()
        self.protocol = self._restore()
        self._thread.start()
        self._prober = threading.Thread(target=self._probe, name="prober", daemon=True)
        self._prober.start()

    # -- start

    def _meet(self) -> tuple[list[MemberSpec], Manifest]:
        """Say hello to every member; all must hold the same manifest."""
        replies = self._pool.map(self._hello, self._channels)
        members: list[MemberSpec] = []
        manifest: Manifest | None = None
        problems: list[str] = []
        for (address, channel), reply in zip(self._channels.items(), replies, strict=True):
            member = MemberId(replica=reply.spec.replica, rank=reply.spec.rank)
            members.append(
                MemberSpec(id=member, address=address, spec=reply.spec, layout=reply.layout, format=reply.format)
            )
            self._stubs[member] = pb_grpc.MemberStub(channel)
            self.states[member] = reply
            if manifest is None:
                manifest = from_manifest_proto(reply.manifest)
            elif manifest.fingerprint != reply.manifest.fingerprint:
                problems.append(f"{member} holds another manifest than {members[0].id}")
        raise_all(MemberError, "the ranks do not serve one model", problems)
        assert manifest is not None
        return members, manifest

    def _hello(self, address: str) -> pb.HelloReply:
        stub = pb_grpc.MemberStub(self._channels[address])
        request = pb.HelloRequest(epoch=self.index.epoch)
        reply: pb.HelloReply = call(stub.Hello, request, timeout_s=STEP_TIMEOUT_S, where=address)
        return reply

    def _restore(self) -> Coordinator:
        """A protocol at the last decision; freshly loaded members become the next version."""
        decisions = self.index.decisions()
        fresh = all(reply.version == 0 for reply in self.states.values())
        if fresh:
            decisions.append(self._first_version(self.index.last_version()))
        last = decisions[-1]
        protocol = Coordinator(
            members=[member.id for member in self.members],
            manifest=self.manifest,
            version=last.version,
            digests=last.digests,
            epoch=self.index.epoch,
            committed={each.push_id: each.version for each in decisions},
            decided={each.transaction: each.version for each in decisions},
        )
        self.protocol = protocol
        if fresh:
            for _ in self._pool.map(lambda member: self._step(member.id, "publish", 0, last.version), self.members):
                pass
            return protocol
        states = {
            member: {"state": reply.state, "transaction": reply.transaction, "version": reply.version}
            for member, reply in self.states.items()
        }
        for action in protocol.recover(states):
            self._recover_one(action)
        return protocol

    def _recover_one(self, action: Action) -> None:
        """Recovery is carried out before any request is taken, in this thread."""
        if isinstance(action, Send):
            try:
                self._step(action.member, action.step, action.transaction, action.version)
            except WeightUpdateError as error:
                self.protocol.fence(action.member, str(error))
        elif isinstance(action, Notify):
            self._notify(action)

    def _first_version(self, last_version: int) -> Decision:
        """Number what the members loaded, once all replicas agree on its digests."""
        replies = self._pool.map(lambda member: self._step(member.id, "digest", 0, 0), self.members)
        sums = replica_sums(dict(zip((member.id for member in self.members), replies, strict=True)))
        (first, digests), *others = sums.items()
        problems = [
            f"{self.manifest.tensors[i].name}: replica {replica} differs from replica {first}"
            for replica, each in others
            for i in np.flatnonzero((each != digests).any(axis=1))
        ]
        raise_all(DigestError, f"the replicas loaded different bytes of {self.source}", problems)
        decision = Decision(
            version=last_version + 1,
            base_version=0,
            transaction=0,
            push_id=f"load-{self.index.epoch}",
            pushed_by=f"loaded from {self.source}",
            created_s=time.time(),
            digest=total(digests),
            digests=digests,
            num_tensors=len(self.manifest.tensors),
            wire_bytes=0,
            logical_bytes=sum(2 * math.prod(row.shape) for row in self.manifest.parameters),
            seconds=0.0,
        )
        self.index.decide(decision, self.manifest.fingerprint)
        return decision

    # -- the loop

    def request(self, op: str, **args: Any) -> Any:
        """Feed one request to the protocol and wait for its answer."""
        future: Future[Any] = Future()
        with self._guard:
            self._next_request += 1
            id_ = self._next_request
            self._futures[id_] = future
        self._events.put(Request(id=id_, op=op, now_s=time.time(), args=args))
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
            if callable(event):
                event()
                continue
            for action in self.protocol.handle(event):
                ACTIONS[type(action)](self, action)

    def _send(self, send: Send) -> None:
        self._pool.submit(self._answered, send)

    def _answered(self, send: Send) -> None:
        result: Any = None
        error: WeightUpdateError | None = None
        for attempt in range(ATTEMPTS.get(send.step, 1)):
            time.sleep(RETRY_DELAY_S if attempt else 0.0)
            result = error = None
            try:
                result = SENDERS[send.step](self._stubs[send.member], send, self.index.epoch)
            except WeightUpdateError as failure:
                error = failure
            if not isinstance(error, TransferError):
                break
        self._events.put(
            MemberReply(
                member=send.member,
                step=send.step,
                transaction=send.transaction,
                now_s=time.time(),
                result=result,
                error=error,
            )
        )

    def _step(self, member: MemberId, step: str, transaction: int, version: int) -> Any:
        send = Send(member=member, step=step, transaction=transaction, version=version)
        return SENDERS[step](self._stubs[member], send, self.index.epoch)

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
        try:
            self.index.decide(decision, self.manifest.fingerprint)
        except sqlite3.Error as failure:
            if self.index.last_version() >= decision.version:
                raise
            error = MemberError(f"the decision could not be made durable: {failure}; free the disk of the state file")
        self._events.put(Persisted(transaction=decision.transaction, now_s=time.time(), error=error))

    def _set_timer(self, action: SetTimer) -> None:
        previous = self._timers.pop(action.name, None)
        if previous is not None:
            previous.cancel()

        def fire() -> None:
            self._events.put(Timeout(name=action.name, transaction=action.transaction, now_s=time.time()))

        timer = threading.Timer(action.delay_s, fire)
        timer.daemon = True
        self._timers[action.name] = timer
        timer.start()

    def _notify(self, notify: Notify) -> None:
        now_s = self.index.record(notify.kind, notify.version, notify.transaction, notify.text)
        log.info("%s version=%d transaction=%d %s", notify.kind, notify.version, notify.transaction, notify.text)
        event = pb.Event(
            time_s=now_s, kind=notify.kind, version=notify.version, transaction=notify.transaction, text=notify.text
        )
        with self._guard:
            for watcher in self._watchers:
                watcher.put(event)
        if notify.kind == "fence":
            self._silence()

    def _silence(self) -> None:
        """Ranks of fenced replicas that still live must not serve on; those that cannot be reached are dead or
        partitioned."""
        for member in self.members:
            if member.id.replica in self.protocol.fenced:
                self._pool.submit(self._try_pause, member.id)

    def _try_pause(self, member: MemberId) -> None:
        try:
            self._step(member, "pause", 0, self.protocol.version)
        except WeightUpdateError as error:
            log.info("fenced %s was not told to pause: %s", member, error)

    def _probe(self) -> None:
        """Notice ranks that died between two pushes, so that status says so before the next push does."""
        missed: dict[MemberId, int] = {}
        while not self._stopped.wait(PROBE_PERIOD_S):
            for member in self.members:
                try:
                    stub = self._stubs[member.id]
                    self.states[member.id] = call(stub.Hello, pb.HelloRequest(), timeout_s=PROBE_TIMEOUT_S)
                    missed[member.id] = 0
                except WeightUpdateError as error:
                    missed[member.id] = missed.get(member.id, 0) + 1
                    if missed[member.id] == PROBE_FAILURES:
                        self._fence_later(member.id, str(error))

    def _fence_later(self, member: MemberId, reason: str) -> None:
        def fence() -> None:
            for action in self.protocol.fence(member, reason):
                ACTIONS[type(action)](self, action)

        self._events.put(fence)

    # -- what operators ask

    def verify(self) -> tuple[int, int, list[str]]:
        """Re-read all installed bytes on all ranks: (version, bytes read, names that differ from the committed
        digest)."""

        def expected() -> tuple[int, Digests]:
            if self.protocol.phase in INSTALLING:
                raise BusyError("verify: a commit is in progress; ask again")
            return self.protocol.version, self.protocol.digests

        version, digests = self.between_events(expected)
        live = self.live_members()
        replies = self._pool.map(lambda member: self._step(member.id, "digest", 0, version), live)
        sums = replica_sums(dict(zip((member.id for member in live), replies, strict=True)))
        problems = [
            f"replica {replica}: {self.manifest.tensors[i].name}"
            for replica, each in sums.items()
            for i in np.flatnonzero((each != digests).any(axis=1))
        ]
        num_bytes = len(sums) * sum(spec.num_bytes for spec in self.manifest.tensors)
        return version, num_bytes, problems

    def all_members(self, step: str) -> None:
        """One plain step on every live member."""
        for _ in self._pool.map(
            lambda member: self._step(member.id, step, 0, self.protocol.version), self.live_members()
        ):
            pass

    def live_members(self) -> list[MemberSpec]:
        """Members of replicas that are not fenced."""
        return [member for member in self.members if member.id.replica not in self.protocol.fenced]

    def leader_addresses(self) -> dict[int, str]:
        """Replica -> address of the rank that answers Generate, serving replicas only."""
        return {member.id.replica: member.address for member in self.live_members() if member.id.rank == 0}

    def watch(self, alive: Callable[[], bool]) -> Iterator[pb.Event]:
        """Events from now on, while the watcher is there."""
        events: queue.SimpleQueue[pb.Event | None] = queue.SimpleQueue()
        with self._guard:
            self._watchers.add(events)
        try:
            while alive() and not self._stopped.is_set():
                try:
                    event = events.get(timeout=0.5)
                except queue.Empty:
                    continue
                if event is not None:
                    yield event
        finally:
            with self._guard:
                self._watchers.discard(events)

    def stop(self) -> None:
        """Stop the loop; the members go on serving."""
        self._stopped.set()
        self._events.put(None)
        self._thread.join(timeout=5)
        for timer in self._timers.values():
            timer.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for channel in self._channels.values():
            channel.close()
        self.index.close()


ACTIONS: Mapping[type, Callable[[CoordinatorShell, Any], None]] = {
    Send: CoordinatorShell._send,
    Reply: CoordinatorShell._reply,
    Persist: CoordinatorShell._persist,
    SetTimer: CoordinatorShell._set_timer,
    Notify: CoordinatorShell._notify,
}
