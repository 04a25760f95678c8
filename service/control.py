"""The coordinator's gRPC face: Control for trainers and operators, Generation through service.router."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import grpc

from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from weight_update.errors import BusyError, MemberError, PlanError, StoreError, VersionError
from weight_update.flight import Recorder
from weight_update.transaction import Phase
from weight_update.transport import CONTROL_MESSAGE_BYTES
from weight_update.values import Specs, from_delta_proto, from_digests_proto, to_manifest_proto, to_maps_proto

from .answers import rank_status, replica_status, version_info
from .audit import recorded
from .coordinator import CoordinatorShell
from .experts import CommittedMaps, digest_of_maps
from .guard import Guard
from .keeper import Keeper
from .operators import Operators
from .owners import Owners
from .status_page import render
from .watching import event_of
from .wire import refusing, refusing_stream

MAX_STREAMS, MAX_ID = 65_536, 1024
MAX_LEASE_S = 3600.0  # for which a push may be silent, whatever its trainer asks for
COMMITS, SHOWN = 8, 60  # pushes and versions on the status page
DRAIN_S = 300.0  # for running sequences to end, where nobody says otherwise
EVENTS, MAX_EVENTS, MAX_KINDS = 100, 10_000, 32


class ControlServicer(pb_grpc.ControlServicer):
    """Translates calls to requests of the protocol, and their answers back."""

    def __init__(self, shell: CoordinatorShell, keeper: Keeper | None, guard: Guard) -> None:
        self._shell = shell
        self._guard = guard
        self._owners = Owners()
        self._keeper = keeper
        self._operators = Operators(shell)
        self._maps = CommittedMaps(shell)
        self.recorder: Recorder | None = None
        self._commits: deque[pb.DecideReply] = deque(maxlen=COMMITS)
        self._manifest = to_manifest_proto(shell.manifest)
        self._specs = Specs()

    @refusing
    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeReply:
        shell = self._shell
        ranks = []
        for member in shell.takers():
            spec = pb.RankSpec()
            spec.CopyFrom(member.spec)
            spec.address = member.address
            ranks.append(spec)
        decision = shell.index.decision()
        return pb.DescribeReply(
            manifest=None if request.fingerprint == shell.manifest.fingerprint else self._manifest,
            fingerprint=shell.manifest.fingerprint,
            ranks=ranks,
            version=decision.version,
            digest=decision.digest,
            epoch=shell.index.epoch,
            max_message_bytes=CONTROL_MESSAGE_BYTES,
            stores=self._keeper is not None,
            expert_maps=to_maps_proto(self._maps.of(decision.version)),
        )

    @refusing
    def Begin(self, request: pb.BeginRequest, context: grpc.ServicerContext) -> pb.BeginReply:
        if request.num_streams > MAX_STREAMS or len(request.push_id) > MAX_ID or len(request.pushed_by) > MAX_ID:
            raise PlanError(f"begin: at most {MAX_STREAMS} trainer ranks, and {MAX_ID} characters of push id and name")
        tensors = self._specs.of(request)
        if tensors is None:
            return pb.BeginReply(epoch=self._shell.index.epoch, tensors_asked=True)
        self._owners.claim(request.push_id)
        said = f"push {request.push_id} by {request.pushed_by}, {len(tensors)} tensors"
        with nullcontext() if self._is_known(request.push_id) else self._recorded("push", context, said):
            self._admit(request.push_id)
            result = self._shell.request(
                "begin",
                push_id=request.push_id,
                base_version=request.base_version,
                fingerprint=request.fingerprint,
                tensors=tensors,
                pushed_by=request.pushed_by,
                logical_bytes=request.logical_bytes,
                lease_s=min(request.lease_s or 60.0, MAX_LEASE_S),
                num_streams=request.num_streams or 1,
                delta=from_delta_proto(request.delta) if request.HasField("delta") else None,
                step=request.step,
                keys=list(request.keys),
            )
        transaction = result.get("transaction", 0)
        self._owners.begun(request.push_id, transaction)
        return pb.BeginReply(epoch=self._shell.index.epoch, ticket=self._guard.ticket(transaction), **result)

    def _recorded(
        self, kind: str, context: grpc.ServicerContext, text: str = "", version: int = 0
    ) -> AbstractContextManager[None]:
        """Around a call that changes something. version: the one it is about, the current one where none is named."""
        return recorded(self._shell.notify, context, kind, version or self._shell.protocol.version, text)

    def _is_known(self, push_id: str) -> bool:
        """Whether a push only asks how its transaction stands."""
        protocol = self._shell.protocol
        open_ = protocol.transaction
        return push_id in protocol.committed or (open_ is not None and open_.push_id == push_id)

    def _admit(self, push_id: str) -> None:
        """Let a new transaction begin, once the store is ready for it."""
        if self._keeper is not None and not self._is_known(push_id):
            self._keeper.admit()

    def _names(self) -> list[str]:
        """Of the tensors that the open transaction brings, in their order."""
        protocol = self._shell.protocol
        open_ = protocol.transaction
        return [] if open_ is None else [protocol.manifest.tensors[i].name for i in open_.tensors.tolist()]

    @refusing
    def Prepare(self, request: pb.PrepareRequest, context: grpc.ServicerContext) -> pb.PrepareReply:
        self._owners.require(request.transaction)
        start_s = time.perf_counter()
        digests = from_digests_proto(request.digests)
        if self.recorder is not None:
            facts = {"transaction": request.transaction, "tensors": self._names()}
            self.recorder.begin(request.transaction, facts)
            self.recorder.digests(request.transaction, "meant", digests)
            self.recorder.end(request.transaction, {"wire_bytes": request.wire_bytes})
        self._shell.request("prepare", transaction=request.transaction, digests=digests, wire_bytes=request.wire_bytes)
        return pb.PrepareReply(seconds=time.perf_counter() - start_s)

    @refusing
    def Install(self, request: pb.InstallRequest, context: grpc.ServicerContext) -> pb.InstallReply:
        self._owners.require(request.transaction)
        start_s = time.perf_counter()
        self._shell.request("install", transaction=request.transaction)
        return pb.InstallReply(seconds=time.perf_counter() - start_s)

    @refusing
    def Decide(self, request: pb.DecideRequest, context: grpc.ServicerContext) -> pb.DecideReply:
        self._owners.require(request.transaction)
        shell = self._shell
        result = self._durably(request) if request.durable else shell.request("decide", transaction=request.transaction)
        timings: list[pb.RankTiming] = list(result["timings"].values())
        pause_s = max((timing.pause_stop_s - timing.pause_start_s for timing in timings), default=0.0)
        shell.index.set_pause(result["version"], pause_s)
        decision = shell.index.decision(result["version"])
        fenced = shell.protocol.fenced
        states = [
            f"{replica}: " + (f"fenced, {fenced[replica]}" if replica in fenced else f"version {decision.version}")
            for replica in sorted({member.id.replica for member in shell.members})
        ]
        reply = pb.DecideReply(
            version=version_info(decision, pause_s),
            timings=timings,
            digest_verified=result["digest_verified"],
            replicas=states,
        )
        self._commits.append(reply)
        return reply

    def _durably(self, request: pb.DecideRequest) -> Any:
        """A commit that its trainer will see stored before it is replaced."""
        with self._kept().deciding():
            result = self._shell.request("decide", transaction=request.transaction)
            self._kept().want(result["version"])
        return result

    def _kept(self) -> Keeper:
        if self._keeper is None:
            raise StoreError("this service has no version store; start it with --store DIR")
        return self._keeper

    @refusing
    def WaitDurable(self, request: pb.WaitDurableRequest, context: grpc.ServicerContext) -> pb.WaitDurableReply:
        self._kept().wait(request.version, context.is_active)
        return pb.WaitDurableReply()

    @refusing
    def Abort(self, request: pb.AbortRequest, context: grpc.ServicerContext) -> pb.AbortReply:
        shell = self._shell
        transaction = request.transaction or (shell.protocol.transaction.id if shell.protocol.transaction else 0)
        if not transaction:
            return pb.AbortReply(aborted=False)
        try:
            with self._recorded("give up", context, f"transaction {transaction}: {request.reason}"):
                shell.request("abort", transaction=transaction, reason=request.reason)
        except MemberError:
            return pb.AbortReply(aborted=True)  # the protocol answers an abort with the reason it was given
        except BusyError:
            return pb.AbortReply(aborted=False)  # it was over, or decided
        return pb.AbortReply(aborted=True)

    @refusing
    def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.StatusReply:
        return self.status()

    def page(self) -> tuple[str, bytes]:
        """The status page."""
        html = render(self.status(), self.versions(SHOWN), list(self._commits))
        return "text/html; charset=utf-8", html.encode()

    def targets(self) -> tuple[str, bytes]:
        """The ranks' metrics, as Prometheus' HTTP service discovery wants them."""
        found = [
            {"targets": [rank.gauges.metrics], "labels": {"replica": str(rank.replica), "rank": str(rank.rank)}}
            for rank in self.status().ranks
            if rank.gauges.metrics
        ]
        return "application/json", json.dumps(found).encode()

    def status(self) -> pb.StatusReply:
        """What the service does now."""
        shell, protocol = self._shell, self._shell.protocol
        open_ = protocol.transaction
        decision = shell.index.decision()
        return pb.StatusReply(
            version=decision.version,
            digest=decision.digest,
            epoch=shell.index.epoch,
            replicas=[
                *(replica_status(shell, replica) for replica in sorted(protocol.membership.replicas)),
                *(pb.ReplicaStatus(replica=replica, state="starting") for replica in sorted(shell.roster.asked)),
            ],
            transaction_state=protocol.phase.value if protocol.phase is not Phase.IDLE else "",
            transaction=open_.id if open_ else 0,
            transaction_by=open_.pushed_by if open_ else "",
            transaction_since_s=open_.since_s if open_ else 0.0,
            uptime_s=time.time() - shell.started_s,
            model=shell.source,
            lost=shell.lost(),
            durable_version=max(shell.index.durable(), default=0),
            min_replicas=protocol.min_replicas,
            store="" if self._keeper is None else self._keeper.status(),
            expert_map_digest=digest_of_maps(shell.manifest, decision.digests),
            store_dir="" if self._keeper is None else str(self._keeper.directory.resolve()),
            ranks=[rank_status(shell, member) for member in shell.members],
        )

    @refusing
    def Versions(self, request: pb.VersionsRequest, context: grpc.ServicerContext) -> pb.VersionsReply:
        return pb.VersionsReply(versions=self.versions(request.last))

    def versions(self, last: int = 0) -> list[pb.VersionInfo]:
        """The newest committed versions, 0 for all of them, oldest first."""
        index, reachable = self._shell.index, self._shell.reachable()
        pauses, durable = index.pauses(), set(index.durable())
        return [
            version_info(
                each, pauses[each.version], reachable=each.version in reachable, durable=each.version in durable
            )
            for each in index.decisions(last=last)
        ]

    @refusing
    def Verify(self, request: pb.VerifyRequest, context: grpc.ServicerContext) -> pb.VerifyReply:
        return self._operators.verify()

    @refusing_stream
    def Reread(self, request: pb.RereadRequest, context: grpc.ServicerContext) -> Iterator[pb.RereadProgress]:
        yield from self._operators.reread(request.share, context.is_active)

    @refusing
    def Rollback(self, request: pb.RollbackRequest, context: grpc.ServicerContext) -> pb.RollbackReply:
        return self._restored("rollback", request.version, request, context)

    @refusing
    def Reset(self, request: pb.ResetRequest, context: grpc.ServicerContext) -> pb.RollbackReply:
        version = request.version or max(self._shell.index.durable(), default=0)
        if not version:
            raise VersionError("reset: no version is durable; push in full")
        return self._restored("reset", version, request, context)

    def _restored(self, op: str, version: int, request: Any, context: grpc.ServicerContext) -> pb.RollbackReply:
        with self._recorded(op, context, f"to version {version}", version):
            self._admit(request.push_id)
            result = self._shell.restore(op, version, request.push_id, request.pushed_by)
        return pb.RollbackReply(version=version_info(self._shell.index.decision(result["version"]), 0.0))

    @refusing
    def ReplicaAdd(self, request: pb.ReplicaAddRequest, context: grpc.ServicerContext) -> pb.ReplicaAddReply:
        shell = self._shell
        with self._recorded("add replica", context, ", ".join(request.addresses)):
            if not request.addresses:  # whoever runs the ranks sees it in the status, and names them
                return pb.ReplicaAddReply(replica=shell.roster.ask(shell.protocol.membership.taken()))
            return pb.ReplicaAddReply(replica=shell.add(request.addresses, dead=request.dead))

    @refusing
    def ReplicaRemove(self, request: pb.ReplicaRemoveRequest, context: grpc.ServicerContext) -> pb.ReplicaRemoveReply:
        with self._recorded("remove replica", context, f"replica {request.replica}"):
            self._shell.request("remove", replica=request.replica)
        return pb.ReplicaRemoveReply()

    @refusing
    def Pause(self, request: pb.PauseRequest, context: grpc.ServicerContext) -> pb.PauseReply:
        with self._recorded("pause", context, request.reason):
            self._operators.every("pause")
        return pb.PauseReply()

    @refusing
    def Resume(self, request: pb.ResumeRequest, context: grpc.ServicerContext) -> pb.ResumeReply:
        with self._recorded("resume", context):
            self._operators.every("resume")
        return pb.ResumeReply()

    @refusing
    def Drain(self, request: pb.DrainRequest, context: grpc.ServicerContext) -> pb.DrainReply:
        replicas = list(request.replicas)
        with self._recorded("drain", context, f"replica {', '.join(map(str, replicas)) or 'all'}"):
            return self._operators.drain(replicas, request.timeout_s or DRAIN_S, context.is_active)

    @refusing
    def Events(self, request: pb.EventsRequest, context: grpc.ServicerContext) -> pb.EventsReply:
        limit = min(request.limit or EVENTS, MAX_EVENTS)
        found = self._shell.index.events(after=request.after, limit=limit, kinds=list(request.kinds)[:MAX_KINDS])
        return pb.EventsReply(events=[event_of(record) for record in found])

    @refusing_stream
    def Watch(self, request: pb.WatchRequest, context: grpc.ServicerContext) -> Iterator[pb.Event]:
        yield from self._shell.watch(context.is_active)
