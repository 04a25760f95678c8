"""The coordinator's gRPC face: Control for trainers and operators, Generation through service.router."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import grpc

from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from weight_update.errors import BusyError, MemberError, VersionError
from weight_update.messages import Decision
from weight_update.transaction import Phase
from weight_update.transport import (
    CONTROL_MESSAGE_BYTES,
    from_digests_proto,
    from_spec_proto,
    to_manifest_proto,
)

from .coordinator import CoordinatorShell
from .router import GenerationRouter
from .text import TextCodec
from .wire import bind, make_server, refusing, refusing_stream, set_serving
from .witness import of_replica

SERVICES = ("Control", "Generation")


class ControlServer:
    """Serves Control and Generation on `listen` (host:port, port 0 for any) over a coordinator."""

    def __init__(self, shell: CoordinatorShell, *, listen: str, tokenizer_dir: Path) -> None:
        services = [pb.DESCRIPTOR.services_by_name[name] for name in SERVICES]
        self._server, self._checks = make_server(services, max_message_bytes=CONTROL_MESSAGE_BYTES)
        self._names = [service.full_name for service in services]
        codec = TextCodec(tokenizer_dir)
        pb_grpc.add_ControlServicer_to_server(ControlServicer(shell), self._server)
        pb_grpc.add_GenerationServicer_to_server(GenerationRouter(shell, codec), self._server)
        self.address = bind(self._server, listen)
        set_serving(self._checks, self._names, True)

    def stop(self) -> None:
        """End all calls."""
        set_serving(self._checks, self._names, False)
        self._server.stop(grace=0.5).wait()


def version_info(decision: Decision, pause_s: float) -> pb.VersionInfo:
    """A decision as clients see it."""
    return pb.VersionInfo(
        version=decision.version,
        base_version=decision.base_version,
        push_id=decision.push_id,
        digest=decision.digest,
        created_s=decision.created_s,
        wire_bytes=decision.wire_bytes,
        logical_bytes=decision.logical_bytes,
        num_tensors=decision.num_tensors,
        pushed_by=decision.pushed_by,
        state="committed",
        seconds=decision.seconds,
        pause_s=pause_s,
    )


class ControlServicer(pb_grpc.ControlServicer):
    """Translates calls to requests of the protocol, and their answers back."""

    def __init__(self, shell: CoordinatorShell) -> None:
        self._shell = shell
        self._manifest = to_manifest_proto(shell.manifest)

    @refusing
    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeReply:
        shell = self._shell
        ranks = []
        for member in shell.live_members():
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
        )

    @refusing
    def Begin(self, request: pb.BeginRequest, context: grpc.ServicerContext) -> pb.BeginReply:
        result = self._shell.request(
            "begin",
            push_id=request.push_id,
            base_version=request.base_version,
            fingerprint=request.fingerprint,
            tensors=[from_spec_proto(spec) for spec in request.tensors],
            pushed_by=request.pushed_by,
            logical_bytes=request.logical_bytes,
            lease_s=request.lease_s or 60.0,
            num_streams=request.num_streams or 1,
        )
        return pb.BeginReply(epoch=self._shell.index.epoch, **result)

    @refusing
    def Prepare(self, request: pb.PrepareRequest, context: grpc.ServicerContext) -> pb.PrepareReply:
        start_s = time.perf_counter()
        digests = from_digests_proto(request.digests)
        self._shell.request("prepare", transaction=request.transaction, digests=digests, wire_bytes=request.wire_bytes)
        return pb.PrepareReply(seconds=time.perf_counter() - start_s)

    @refusing
    def Install(self, request: pb.InstallRequest, context: grpc.ServicerContext) -> pb.InstallReply:
        start_s = time.perf_counter()
        self._shell.request("install", transaction=request.transaction)
        return pb.InstallReply(seconds=time.perf_counter() - start_s)

    @refusing
    def Decide(self, request: pb.DecideRequest, context: grpc.ServicerContext) -> pb.DecideReply:
        shell = self._shell
        result = shell.request("decide", transaction=request.transaction)
        timings: list[pb.RankTiming] = list(result["timings"].values())
        pause_s = max((timing.pause_stop_s - timing.pause_start_s for timing in timings), default=0.0)
        shell.index.set_pause(result["version"], pause_s)
        decision = shell.index.decision(result["version"])
        fenced = shell.protocol.fenced
        states = [
            f"{replica}: " + (f"fenced, {fenced[replica]}" if replica in fenced else f"version {decision.version}")
            for replica in sorted({member.id.replica for member in shell.members})
        ]
        return pb.DecideReply(
            version=version_info(decision, pause_s),
            timings=timings,
            digest_verified=result["digest_verified"],
            replicas=states,
        )

    @refusing
    def Abort(self, request: pb.AbortRequest, context: grpc.ServicerContext) -> pb.AbortReply:
        shell = self._shell
        transaction = request.transaction or (shell.protocol.transaction.id if shell.protocol.transaction else 0)
        if not transaction:
            return pb.AbortReply(aborted=False)
        try:
            shell.request("abort", transaction=transaction, reason=request.reason)
        except MemberError:
            return pb.AbortReply(aborted=True)  # the protocol answers an abort with the reason it was given
        except BusyError:
            return pb.AbortReply(aborted=False)  # it was over, or decided
        return pb.AbortReply(aborted=True)

    @refusing
    def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.StatusReply:
        shell, protocol = self._shell, self._shell.protocol
        open_ = protocol.transaction
        decision = shell.index.decision()
        return pb.StatusReply(
            version=decision.version,
            digest=decision.digest,
            epoch=shell.index.epoch,
            replicas=[self._replica(replica) for replica in sorted({m.id.replica for m in shell.members})],
            transaction_state=protocol.phase.value if protocol.phase is not Phase.IDLE else "",
            transaction=open_.id if open_ else 0,
            transaction_by=open_.pushed_by if open_ else "",
            transaction_since_s=open_.since_s if open_ else 0.0,
            uptime_s=time.time() - shell.started_s,
            model=shell.source,
        )

    def _replica(self, replica: int) -> pb.ReplicaStatus:
        shell = self._shell
        members = [member for member in shell.members if member.id.replica == replica]
        states = [shell.states[member.id] for member in members]
        reason = shell.protocol.fenced.get(replica, "")
        paused = any(state.paused for state in states)
        return pb.ReplicaStatus(
            replica=replica,
            state="fenced" if reason else "paused" if paused else "serving",
            version=min(state.version for state in states),
            layout=members[0].layout,
            format=members[0].format,
            num_sequences=states[0].num_sequences,
            reason=reason,
            pids=[state.pid for state in states],
            checkpoint=of_replica([state.checkpoint for state in states]),
        )

    @refusing
    def Versions(self, request: pb.VersionsRequest, context: grpc.ServicerContext) -> pb.VersionsReply:
        pauses = self._shell.index.pauses()
        return pb.VersionsReply(
            versions=[version_info(each, pauses[each.version]) for each in self._shell.index.decisions()]
        )

    @refusing
    def Verify(self, request: pb.VerifyRequest, context: grpc.ServicerContext) -> pb.VerifyReply:
        start_s = time.perf_counter()
        version, num_bytes, problems = self._shell.verify()
        return pb.VerifyReply(
            ok=not problems,
            version=version,
            bytes=num_bytes,
            seconds=time.perf_counter() - start_s,
            mismatches=problems,
        )

    @refusing
    def Rollback(self, request: pb.RollbackRequest, context: grpc.ServicerContext) -> pb.RollbackReply:
        held = self._shell.protocol.version
        raise VersionError(
            f"rollback to version {request.version}: no version but the current {held} is kept by this release;"
            " push the older weights again"
        )

    @refusing
    def Pause(self, request: pb.PauseRequest, context: grpc.ServicerContext) -> pb.PauseReply:
        self._shell.all_members("pause")
        return pb.PauseReply()

    @refusing
    def Resume(self, request: pb.ResumeRequest, context: grpc.ServicerContext) -> pb.ResumeReply:
        self._shell.all_members("resume")
        return pb.ResumeReply()

    @refusing_stream
    def Watch(self, request: pb.WatchRequest, context: grpc.ServicerContext) -> Iterator[pb.Event]:
        yield from self._shell.watch(context.is_active)
