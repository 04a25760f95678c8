"""The coordinator's side of the transaction, without I/O: message or timer in, actions out.

    IDLE -begin-> OPENING -> OPEN -prepare-> PREPARING -> PREPARED -install-> INSTALLING -> INSTALLED
         -decide-> DECIDING (Persist: the commit point) PUBLISHING -> IDLE
    any failure before the decision -> (UNDOING, once an install began) -> ABORTING -> IDLE

The coordinator owns the decision; `weight_update.member` is a rank's side. Neither knows gRPC, Ray, disk or clock: a
shell feeds them events and carries out their actions in order, which lets a simulator stand in for all four. No
durable record means abort.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .digest import Digests, total
from .errors import BusyError, DigestError, ManifestError, MemberError, TransferError, VersionError, WeightUpdateError
from .manifest import Manifest, check_push
from .messages import (
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
from .transaction import ALLOWED, LEASED, ROUNDS, Phase, Round, Transaction, replica_sums

MAX_PROBLEMS = 20  # mismatching tensors named in one digest error


class Coordinator:
    """Drives one transaction at a time over all members and owns the commit point.

    members: every rank. manifest: what the service holds. version, digests: the last committed version and its digests
    ([num_tensors, 2] uint64, sums over the ranks of one replica). epoch: grows with each start, fences older
    coordinators. committed: push ids already decided, with their versions.
    """

    def __init__(
        self,
        *,
        members: Sequence[MemberId],
        manifest: Manifest,
        version: int,
        digests: Digests,
        epoch: int,
        committed: Mapping[str, int] | None = None,
        decided: Mapping[int, int] | None = None,
    ) -> None:
        self.members = tuple(members)
        self.manifest = manifest
        self.version = version
        self.digests = digests
        self.epoch = epoch
        self.committed = dict(committed or {})
        self.decided = dict(decided or {})  # transaction -> version
        self.fenced: dict[int, str] = {}  # replica -> reason
        self.phase = Phase.IDLE
        self.transaction: Transaction | None = None
        self._round: Round | None = None
        self._num_transactions = 0

    # -- events

    def handle(self, event: Event) -> list[Action]:
        """Take one event, return what is to be done, in order."""
        handlers: Mapping[type, Callable[..., list[Action]]] = {
            Request: self._request,
            MemberReply: self._member_reply,
            Timeout: self._timeout,
            Persisted: self._persisted,
        }
        return handlers[type(event)](event)

    def _request(self, request: Request) -> list[Action]:
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
        current, open_ = self._round, self.transaction
        if current is None or reply.step != current.step or reply.member not in current.waiting:
            return []
        if open_ is not None and reply.transaction != open_.id:
            return []
        failed = dict(current.failed)
        if reply.error is not None:
            failed[reply.member] = reply.error
        elif open_ is not None:
            open_.results.setdefault(reply.step, {})[reply.member] = reply.result
        self._round = Round(step=current.step, waiting=current.waiting - {reply.member}, failed=failed)
        if failed and reply.step in ("open", "prepare", "install", "confirm"):
            return self._abort(next(iter(failed.values())))
        if self._round.waiting:
            return []
        self.phase = ROUNDS[reply.step][1]
        return COMPLETED[reply.step](self, reply.now_s)

    def _timeout(self, timeout: Timeout) -> list[Action]:
        open_ = self.transaction
        if open_ is None or timeout.transaction != open_.id or self.phase not in LEASED:
            return []
        reason = f"the lease of {open_.pushed_by} lapsed: no word from the trainer for {open_.lease_s:.0f} s"
        return self._abort(TransferError(f"push {open_.push_id}: {reason}; push again"))

    # -- requests

    def _begin(self, request: Request) -> list[Action]:
        args = request.args
        push_id, open_ = str(args["push_id"]), self.transaction
        if push_id in self.committed:
            return [Reply(id=request.id, result={"already_committed": True, "version": self.committed[push_id]})]
        if open_ is not None and open_.push_id == push_id and self.phase not in (Phase.UNDOING, Phase.ABORTING):
            if self.phase is Phase.OPENING:  # answered with the first caller
                open_.callers.append(request.id)
                return []
            return [self._lease(), Reply(id=request.id, result=self._begun())]
        if open_ is not None:
            age_s = request.now_s - open_.since_s
            raise BusyError(
                f"a push of {open_.pushed_by} is {self.phase.value} since {age_s:.1f} s (transaction {open_.id});"
                " wait for it, or abort it with 'transfuse abort'"
            )
        self._check_begin(args)
        tensors = check_push(self.manifest, args["tensors"])  # type: ignore[arg-type]
        self._num_transactions += 1
        self.transaction = open_ = Transaction(
            id=(self.epoch << 32) | self._num_transactions,
            version=self.version + 1,
            base_version=self.version,
            push_id=push_id,
            pushed_by=str(args["pushed_by"]),
            since_s=request.now_s,
            lease_s=float(args["lease_s"]),  # type: ignore[arg-type]
            logical_bytes=int(args["logical_bytes"]),  # type: ignore[call-overload]
            tensors=tensors,
            num_streams=int(args.get("num_streams", 1)),  # type: ignore[call-overload]
            callers=[request.id],
        )
        text = f"{open_.pushed_by}: {len(tensors)} tensors"
        return [self._notify("begin", text), *self._start("open", tensors=tensors)]

    def _check_begin(self, args: Mapping[str, object]) -> None:
        if args["fingerprint"] != self.manifest.fingerprint:
            raise ManifestError("the push was planned for another manifest than this service holds; describe again")
        base = int(args["base_version"])  # type: ignore[call-overload]
        if base not in (0, self.version):
            raise VersionError(f"base version: current is {self.version}, the push names {base}; push in full")
        if self.fenced:
            reasons = "; ".join(f"replica {replica}: {reason}" for replica, reason in sorted(self.fenced.items()))
            raise MemberError(f"not all replicas can take a push: {reasons}; restart the service, or the replica")

    def _begun(self) -> dict[str, object]:
        open_ = self._open()
        planned = [int(value) for value in open_.results["open"].values()]  # type: ignore[call-overload]
        return {
            "transaction": open_.id,
            "version": open_.version,
            "planned_bytes": max(planned, default=0),
            "already_committed": False,
        }

    def _prepare(self, request: Request) -> list[Action]:
        open_ = self._named(request)
        digests = request.args["digests"]
        if not isinstance(digests, np.ndarray) or digests.shape != (len(open_.tensors), 2):
            raise ManifestError(f"prepare: expected one digest for each of {len(open_.tensors)} pushed tensors")
        open_.digests = digests
        open_.wire_bytes = int(request.args["wire_bytes"])  # type: ignore[call-overload]
        open_.callers = [request.id]
        return [self._notify("prepare", f"{open_.wire_bytes} wire bytes"), *self._start("prepare")]

    def _install(self, request: Request) -> list[Action]:
        open_ = self._named(request)
        open_.callers = [request.id]
        return [self._notify("install", ""), *self._start("install")]

    def _decide(self, request: Request) -> list[Action]:
        open_ = self._named(request)
        open_.callers, open_.decide = [request.id], True
        # A member may have failed since a separate Install: ask once more, there is no way back afterwards.
        return self._start("install" if self.phase is Phase.PREPARED else "confirm")

    def _abort_request(self, request: Request) -> list[Action]:
        open_ = self._named(request)
        open_.callers.append(request.id)
        reason = str(request.args.get("reason") or "no reason given")
        return self._abort(MemberError(f"push {open_.push_id} aborted on request: {reason}"))

    def _named(self, request: Request) -> Transaction:
        open_ = self._open()
        if request.args["transaction"] != open_.id:
            raise BusyError(f"transaction {request.args['transaction']} is not open; the open one is {open_.id}")
        return open_

    def _open(self) -> Transaction:
        assert self.transaction is not None
        return self.transaction

    # -- rounds

    def _start(self, step: str, tensors: np.ndarray | None = None) -> list[Action]:
        open_ = self._open()
        members = [member for member in self.members if member.replica not in self.fenced]
        self.phase = ROUNDS[step][0]
        open_.touched = open_.touched or step == "install"
        self._round = Round(step=step, waiting=frozenset(members), failed={})
        return [
            Send(
                member=member,
                step=step,
                transaction=open_.id,
                version=open_.version,
                base_version=open_.base_version,
                tensors=tensors,
                num_streams=open_.num_streams,
            )
            for member in members
        ]

    def _opened(self, now_s: float) -> list[Action]:
        return self._answer(self._begun())

    def _prepared(self, now_s: float) -> list[Action]:
        return self._checked("prepare", "staged") or self._answer({})

    def _installed(self, now_s: float) -> list[Action]:
        open_ = self._open()
        failed = self._checked("install", "installed")
        if failed:
            return failed
        return self._commit(now_s) if open_.decide else self._answer({})

    def _commit(self, now_s: float) -> list[Action]:
        open_ = self._open()
        assert open_.digests is not None
        digests = self.digests.copy()
        digests[open_.tensors] = open_.digests
        decision = Decision(
            version=open_.version,
            base_version=open_.base_version,
            transaction=open_.id,
            push_id=open_.push_id,
            pushed_by=open_.pushed_by,
            created_s=now_s,
            digest=total(digests),
            digests=digests,
            num_tensors=len(open_.tensors),
            wire_bytes=open_.wire_bytes,
            logical_bytes=open_.logical_bytes,
            seconds=now_s - open_.since_s,
        )
        self.phase, self._round = Phase.DECIDING, None
        open_.decision = decision
        return [Persist(decision=decision)]

    def _persisted(self, event: Persisted) -> list[Action]:
        open_ = self._open()
        decision = open_.decision
        assert decision is not None
        if event.error is not None:
            return self._abort(event.error)
        self.version, self.digests = decision.version, decision.digests
        self.committed[open_.push_id] = decision.version
        self.decided[open_.id] = decision.version
        return [self._notify("decide", decision.digest), *self._start("publish")]

    def _published(self, now_s: float) -> list[Action]:
        open_ = self._open()
        fences = self._fence_failed()
        result = {"timings": open_.results.get("publish", {}), "version": open_.version, "digest_verified": True}
        return [*fences, *self._close(result)]

    def _undone(self, now_s: float) -> list[Action]:
        # A rank serves again only when all have their old bytes back: refreshing a sharded module reads its peers'
        # shards.
        return [*self._fence_failed(), *self._start("abort")]

    def _aborted(self, now_s: float) -> list[Action]:
        open_ = self._open()
        return [*self._fence_failed(), self._notify("abort", str(open_.failure)), *self._close(None)]

    def _fence_failed(self) -> list[Action]:
        assert self._round is not None
        actions: list[Action] = []
        for member, error in self._round.failed.items():
            actions += self.fence(member, str(error))
        return actions

    def fence(self, member: MemberId, reason: str) -> list[Action]:
        """Take a replica out of service: one of its ranks cannot follow the decision."""
        if member.replica in self.fenced:
            return []
        self.fenced[member.replica] = f"rank {member.rank}: {reason}"
        return [self._notify("fence", f"{member}: {reason}")]

    def _abort(self, error: WeightUpdateError) -> list[Action]:
        open_ = self._open()
        open_.failure = error
        return self._start("undo" if open_.touched else "abort")

    def _answer(self, result: object) -> list[Action]:
        """Answer the callers and wait for the trainer's next step, for as long as its lease runs."""
        open_ = self._open()
        callers, open_.callers = open_.callers, []
        return [self._lease(), *(Reply(id=caller, result=result) for caller in callers)]

    def _lease(self) -> SetTimer:
        open_ = self._open()
        return SetTimer(name="lease", transaction=open_.id, delay_s=open_.lease_s)

    def _close(self, result: object) -> list[Action]:
        open_ = self._open()
        self.transaction, self._round = None, None
        return [Reply(id=caller, result=result, error=open_.failure) for caller in open_.callers]

    def _notify(self, kind: str, text: str) -> Notify:
        open_ = self.transaction
        version = open_.version if open_ else self.version
        return Notify(kind=kind, version=version, transaction=open_.id if open_ else 0, text=text)

    # -- digests

    def _checked(self, step: str, what: str) -> list[Action]:
        """Compare each replica's summed digests with the trainer's; abort and name the tensors that differ."""
        open_ = self._open()
        assert open_.digests is not None
        names = [self.manifest.tensors[i].name for i in open_.tensors]
        problems = []
        for replica, digests in replica_sums(open_.results[step]).items():
            differs = np.flatnonzero((digests != open_.digests).any(axis=1))
            problems += [f"replica {replica}: {names[i]}" for i in differs[:MAX_PROBLEMS]]
        if not problems:
            return []
        listed = "\n".join(f"  - {problem}" for problem in problems)
        told = f"the {what} bytes are not what the trainer meant to send:\n{listed}\n  nothing was changed; push again"
        return self._abort(DigestError(told))

    # -- recovery

    def recover(self, states: Mapping[MemberId, Mapping[str, object] | WeightUpdateError]) -> list[Action]:
        """Resolve members that an earlier coordinator left behind: publish what was decided, abort what was not.

        states: each member's answer to hello ({"state", "transaction", "version"}), or the error of one that is gone.
        """
        actions: list[Action] = []
        aborts: list[Action] = []  # after every undo
        for member, state in states.items():
            if isinstance(state, WeightUpdateError):
                actions += self.fence(member, str(state))
                continue
            transaction, held = int(state["transaction"]), int(state["version"])  # type: ignore[call-overload]
            decided = self.decided.get(transaction)
            if transaction and decided is not None:
                actions.append(Send(member=member, step="publish", transaction=transaction, version=decided))
            elif transaction:
                actions.append(Send(member=member, step="undo", transaction=transaction, version=held))
                aborts.append(Send(member=member, step="abort", transaction=transaction, version=held))
            elif held != self.version:
                actions += self.fence(member, f"holds version {held}, committed is {self.version}")
        return actions + aborts


REQUESTS: Mapping[str, Callable[[Coordinator, Request], list[Action]]] = {
    "begin": Coordinator._begin,
    "prepare": Coordinator._prepare,
    "install": Coordinator._install,
    "decide": Coordinator._decide,
    "abort": Coordinator._abort_request,
}
COMPLETED: Mapping[str, Callable[[Coordinator, float], list[Action]]] = {
    "open": Coordinator._opened,
    "prepare": Coordinator._prepared,
    "install": Coordinator._installed,
    "confirm": Coordinator._commit,
    "publish": Coordinator._published,
    "undo": Coordinator._undone,
    "abort": Coordinator._aborted,
}
