"""The coordinator's side of a transaction, without I/O: message or timer in, actions out.

    IDLE -begin-> OPENING -> OPEN -prepare-> PREPARING -> PREPARED -install-> INSTALLING -> INSTALLED
         -decide-> DECIDING (Persist: the commit point) PUBLISHING -> IDLE
    any failure before the decision -> (UNDOING, once an install began) -> ABORTING -> IDLE

The coordinator owns the decision; `weight_update.member` is a rank's side, `weight_update.membership` says who takes
part, `weight_update.opening` how a transaction comes about. None of them knows gRPC, Ray, disk or clock: a shell feeds
them events and carries out their actions in order, which lets a simulator stand in for all four. No durable record
means abort.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from . import joining, opening
from .digest import Digests
from .errors import BusyError, ManifestError, MemberError, TransferError, WeightUpdateError
from .manifest import Manifest
from .membership import Membership
from .messages import (
    Action,
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
from .transaction import ALLOWED, LEASED, ONE_WAY, RETRY, ROUNDS, TOLD, Kind, Phase, Round, Transaction


class Coordinator:
    """Drives one transaction at a time over all members and owns the commit point.

    members: every rank. manifest: what the service holds. version, digests: the last committed version and its digests
    ([num_tensors, 2] uint64, sums over the ranks of one replica). epoch: grows with each start, fences older
    coordinators. committed: push ids already decided, with their versions. decided: the same by transaction.
    min_replicas: replicas that a push needs, 0 for all. keys: of the replicas' processes, see joining.add. formats: of
    the replicas. dismissed: numbers of those that were removed.
    """

    def __init__(
        self,
        *,
        members: Sequence[MemberId],
        manifest: Manifest,
        version: int,
        digests: Digests,
        epoch: int,
        now_s: float,
        committed: Mapping[str, int] | None = None,
        decided: Mapping[int, int] | None = None,
        min_replicas: int = 0,
        keys: Mapping[int, str] | None = None,
        formats: Mapping[int, str] | None = None,
        dismissed: Iterable[int] = (),
    ) -> None:
        self.membership = Membership(members, now_s, keys or {}, formats or {}, dismissed)
        self.manifest = manifest
        self.now_s = now_s  # of the last event
        self.version = version
        self.digests = digests
        self.epoch = epoch
        self.min_replicas = min_replicas
        self.committed = dict(committed or {})
        self.decided = dict(decided or {})
        self.phase = Phase.IDLE
        self.transaction: Transaction | None = None
        self.asked: tuple[object, Any] | None = None  # tensors of the last push, and where they are in the manifest
        self.waiting: list[Request] = []  # requests that wait for a join to end, or for enough replicas
        self._round: Round | None = None
        self._num_transactions = self._num_rounds = 0

    @property
    def fenced(self) -> dict[int, str]:
        """Replica -> why it does not serve."""
        return self.membership.fenced

    # -- events

    def handle(self, event: Event) -> list[Action]:
        """Take one event, return what is to be done, in order."""
        self.now_s = max(self.now_s, event.now_s)
        return EVENTS[type(event)](self, event)

    def handle_request(self, request: Request) -> list[Action]:
        try:
            if self.phase not in ALLOWED[request.op]:
                raise self._refusal(request.op)
            return REQUESTS[request.op](self, request)
        except WeightUpdateError as error:
            return [Reply(id=request.id, error=error)]

    def _refusal(self, op: str) -> WeightUpdateError:
        wanted = ", ".join(sorted(phase.value for phase in ALLOWED[op]))
        return BusyError(f"{op}: the transaction is {self.phase.value}, expected {wanted}; begin a new push")

    def _member_reply(self, reply: MemberReply) -> list[Action]:
        if reply.error is None:
            self.membership.heard(reply)
        elif reply.step == "hello":
            self.membership.missed(reply.member)
        current, open_ = self._round, self.transaction
        if current is None or open_ is None or reply.round != current.id or reply.member not in current.waiting:
            return []
        current.waiting.remove(reply.member)
        if reply.error is not None:
            current.failed[reply.member] = reply.error
        else:
            open_.results.setdefault(current.name, {})[reply.member] = reply.result
        if current.failed and current.name not in ONE_WAY:
            return self.abort(next(iter(current.failed.values())))
        if current.waiting:
            return []
        return self._completed(current.name)

    def _timeout(self, timeout: Timeout) -> list[Action]:
        open_ = self.transaction
        if open_ is None or timeout.transaction != open_.id:
            return []
        if timeout.name == "silence":
            return self._install_when_silent() if self.phase is Phase.WAITING else []
        if self.phase not in LEASED:
            return []
        reason = f"the lease of {open_.pushed_by} lapsed: no word from the trainer for {open_.lease_s:.0f} s"
        return self.abort(TransferError(f"push {open_.push_id}: {reason}; push again"))

    # -- requests of the one who began

    def _prepare(self, request: Request) -> list[Action]:
        open_ = self._named(request)
        digests = request.args["digests"]
        if not isinstance(digests, np.ndarray) or digests.shape != (len(open_.tensors), 2):
            raise ManifestError(f"prepare: expected one digest for each of {len(open_.tensors)} pushed tensors")
        if open_.digests is not None and not np.array_equal(digests, open_.digests):
            raise ManifestError(f"prepare: transaction {open_.id} was prepared with other digests; begin a new push")
        open_.digests = digests
        open_.wire_bytes = int(request.args["wire_bytes"])  # type: ignore[call-overload]
        open_.callers.append(request.id)
        if self.phase is Phase.PREPARING:  # asked again: the answer is still to come
            return []
        if self.phase is Phase.PREPARED:  # asked again: the answer got lost
            return self.answer({})
        return [self.notify("prepare", f"{open_.wire_bytes} wire bytes"), *self.start("prepare")]

    def _install(self, request: Request) -> list[Action]:
        self._named(request).callers = [request.id]
        return [self.notify("install", ""), *self._install_when_silent()]

    def _decide(self, request: Request) -> list[Action]:
        open_ = self._named(request)
        open_.callers, open_.decide = [request.id], True
        if self.phase is Phase.PREPARED:
            return self._install_when_silent()
        # A member may have failed since a separate Install: ask once more, there is no way back afterwards.
        return self.start("confirm")

    def _abort_request(self, request: Request) -> list[Action]:
        open_ = self._named(request)
        open_.callers.append(request.id)
        reason = str(request.args.get("reason") or "no reason given")
        return self.abort(MemberError(f"push {open_.push_id} aborted on request: {reason}"))

    def _named(self, request: Request) -> Transaction:
        open_ = self.open()
        if request.args["transaction"] != open_.id:
            raise BusyError(f"transaction {request.args['transaction']} is not open; the open one is {open_.id}")
        return open_

    def open(self) -> Transaction:
        """The open transaction."""
        assert self.transaction is not None
        return self.transaction

    def next_id(self) -> int:
        """A transaction that no epoch had."""
        self._num_transactions += 1
        return (self.epoch << 32) | self._num_transactions

    # -- rounds

    def start(self, name: str) -> list[Action]:
        """Ask every member of the open transaction for one step; those that were fenced only count until it is
        decided."""
        open_ = self.open()
        gone = [member for member in open_.members if not self.membership.follows(member)]
        if gone and name not in ONE_WAY:
            return self.abort(MemberError(f"{gone[0]} was lost during the {open_.kind.value}; {RETRY[open_.kind]}"))
        sends = [
            self.send(
                member,
                name,
                transaction=open_.id,
                version=open_.version,
                base_version=open_.base_version,
                tensors=open_.tensors if name in TOLD else None,
                num_streams=open_.num_streams,
                source=open_.source,
            )
            for member in open_.members
            if member not in gone
        ]
        return self.ask(name, sends)

    def send(self, member: MemberId, step: str, **fields: Any) -> Send:
        """One message to a member, of the round that `ask` begins."""
        token = self.membership.contacts[member].token
        return Send(member=member, step=step, epoch=self.epoch, round=self.next_round, token=token, **fields)

    @property
    def next_round(self) -> int:
        """Rounds only grow, over epochs as well."""
        return (self.epoch << 32) | self._num_rounds + 1

    def ask(self, name: str, sends: Sequence[Send]) -> list[Action]:
        """Begin a round: all of these are to be answered before the next."""
        open_ = self.open()
        self.phase = Phase.JOINING if open_.kind is Kind.JOIN else ROUNDS[name][0]
        open_.touched = open_.touched or name == "install"
        self._round = Round(name=name, id=self.next_round, waiting={send.member for send in sends})
        self._num_rounds += 1
        return list(sends) if sends else self._completed(name)

    def greet(self) -> list[Action]:
        """Say hello to every member; those of serving replicas may go on serving."""
        serving = set(self.membership.serving())
        sends = [
            self.send(member, "hello", transaction=0, version=self.version if member.replica in serving else 0)
            for member in self.membership.members
        ]
        self._num_rounds += 1
        return list(sends)

    def _completed(self, name: str) -> list[Action]:
        open_ = self.open()
        if open_.kind is not Kind.JOIN:
            self.phase = ROUNDS[name][1]
        return COMPLETED[open_.kind, name](self)

    def _opened(self) -> list[Action]:
        return self.answer(opening.begun(self))

    def _prepared(self) -> list[Action]:
        return self.checked("prepare", "staged") or self.answer({})

    def _prepared_by_itself(self) -> list[Action]:
        return self.checked("prepare", "staged") or self._install_when_silent()

    def _install_when_silent(self) -> list[Action]:
        """Install once no fenced replica can be serving the version that this transaction replaces."""
        open_ = self.open()
        wait_s = self.membership.silent_at() - self.now_s
        if wait_s <= 0:
            return self.start("install")
        self.phase = Phase.WAITING
        return [SetTimer(name="silence", transaction=open_.id, delay_s=wait_s)]

    def _installed(self) -> list[Action]:
        failed = self.checked("install", "installed")
        return failed or (self._commit() if self.open().decide else self.answer({}))

    def _commit(self) -> list[Action]:
        open_ = self.open()
        self.phase, self._round = Phase.DECIDING, None
        open_.decision = open_.decided(self.now_s)
        return [Persist(decision=open_.decision)]

    def _persisted(self, event: Persisted) -> list[Action]:
        open_ = self.open()
        decision = open_.decision
        assert decision is not None
        if event.error is not None:
            return self.abort(event.error)
        self.version, self.digests = decision.version, decision.digests
        self.committed[open_.push_id] = decision.version
        self.decided[open_.id] = decision.version
        return [self.notify("decide", decision.digest), *self.start("publish")]

    def _published(self) -> list[Action]:
        open_, fences = self.open(), self.let_serve()
        result = {"timings": open_.results.get("publish", {}), "version": open_.version, "digest_verified": True}
        return [*fences, *self.close(result)]

    def _undone(self) -> list[Action]:
        # A rank serves again only when all have their old bytes back: refreshing a sharded module reads its peers'
        # shards.
        return [*self._fence_failed(), *self.start("abort")]

    def _aborted(self) -> list[Action]:
        fences = self._fence_failed()
        failure = self.open().failure
        assert failure is not None  # `abort` has set it
        return [*fences, self.notify("abort", f"[{failure.code}] {failure}"), *self.close(None)]

    def let_serve(self) -> list[Action]:
        """The replicas of the transaction serve, but for those of which a rank did not answer the last round."""
        fences = self._fence_failed()
        for replica in self.open().replicas:
            self.membership.serve(replica)
        return fences

    def _fence_failed(self) -> list[Action]:
        assert self._round is not None
        return [each for member, error in self._round.failed.items() for each in self.fence(member, str(error))]

    def fence(self, member: MemberId, reason: str) -> list[Action]:
        """Take a replica out of service: one of its ranks cannot follow the decision."""
        fenced = self.membership.fence(member.replica, f"rank {member.rank}: {reason}", self.next_round)
        return [self.notify("fence", f"{member}: {reason}")] if fenced else []

    def abort(self, error: WeightUpdateError) -> list[Action]:
        """Give the open transaction up: every member goes back to what it held."""
        open_ = self.open()
        open_.failure = error
        return self.start("undo" if open_.touched else "abort")

    def answer(self, result: object) -> list[Action]:
        """Answer the callers and wait for the trainer's next step, for as long as its lease runs."""
        open_ = self.open()
        callers, open_.callers = open_.callers, []
        return [self.lease(), *(Reply(id=caller, result=result) for caller in callers)]

    def lease(self) -> SetTimer:
        """The open transaction ends unless its trainer is heard from again."""
        open_ = self.open()
        return SetTimer(name="lease", transaction=open_.id, delay_s=open_.lease_s)

    def close(self, result: object) -> list[Action]:
        """The transaction is over; whoever waited for the slot is next."""
        open_ = self.open()
        replies: list[Action] = [Reply(id=caller, result=result, error=open_.failure) for caller in open_.callers]
        for replica in open_.replicas:
            # Those that came in with a transaction which failed have nothing to serve.
            self.membership.turn_away(replica, str(open_.failure), self.next_round, self.now_s, open_.stock)
        self.transaction, self._round, self.phase = None, None, Phase.IDLE
        return [*replies, *joining.next_turn(self)]

    def notify(self, kind: str, text: str) -> Notify:
        """Tell operators."""
        open_ = self.transaction
        version = open_.version if open_ else self.version
        return Notify(kind=kind, version=version, transaction=open_.id if open_ else 0, text=text)

    def checked(self, name: str, what: str) -> list[Action]:
        """Compare each replica's summed digests with what was meant; abort and name the tensors that differ."""
        error = self.open().mismatch(name, what, self.manifest, self.membership.held)
        return self.abort(error) if error is not None else []


Handler = Callable[[Coordinator, Any], list[Action]]
EVENTS: Mapping[type, Handler] = {
    Request: Coordinator.handle_request,
    MemberReply: Coordinator._member_reply,
    Timeout: Coordinator._timeout,
    Persisted: Coordinator._persisted,
    Tick: joining.tick,
}
REQUESTS: Mapping[str, Handler] = {
    "begin": opening.begin,
    "rollback": opening.rollback,
    "reset": opening.rollback,
    "add": joining.add,
    "remove": joining.remove,
    "prepare": Coordinator._prepare,
    "install": Coordinator._install,
    "decide": Coordinator._decide,
    "abort": Coordinator._abort_request,
}
# what a completed round leads to
COMPLETED: Mapping[tuple[Kind, str], Callable[[Coordinator], list[Action]]] = {
    (Kind.PUSH, "open"): Coordinator._opened,
    (Kind.PUSH, "prepare"): Coordinator._prepared,
    (Kind.PUSH, "confirm"): Coordinator._commit,
    (Kind.ROLLBACK, "reach"): opening.reached,
    (Kind.ROLLBACK, "prepare"): Coordinator._prepared_by_itself,
    (Kind.JOIN, "resolve"): joining.resolved,
    (Kind.JOIN, "settle"): joining.settled,
    (Kind.JOIN, "digest"): joining.compared,
    **{(kind, "open"): lambda coordinator: coordinator.start("prepare") for kind in (Kind.ROLLBACK, Kind.JOIN)},
    (Kind.JOIN, "prepare"): joining.prepared,
    (Kind.JOIN, "install"): joining.installed,
    **{(kind, "install"): Coordinator._installed for kind in (Kind.PUSH, Kind.ROLLBACK)},
    **{(kind, "publish"): Coordinator._published for kind in (Kind.PUSH, Kind.ROLLBACK)},
    (Kind.JOIN, "publish"): joining.joined,
    (Kind.JOIN, "adopt"): joining.joined,
    **{(kind, "undo"): Coordinator._undone for kind in Kind},
    **{(kind, "abort"): Coordinator._aborted for kind in Kind},
}
