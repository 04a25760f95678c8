"""What the coordinator says of versions, replicas and ranks."""

from __future__ import annotations

from protos import transfuse_pb2 as pb
from weight_update.digest import total
from weight_update.messages import Decision
from weight_update.transaction import of_held

from .coordinator import CoordinatorShell
from .members import MemberSpec
from .witness import of_replica


def version_info(
    decision: Decision, pause_s: float, *, reachable: bool = False, durable: bool = False
) -> pb.VersionInfo:
    """A decision as clients see it. reachable: a rollback can go there. durable: it is in the version store."""
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
        state="durable" if durable else "committed",
        seconds=decision.seconds,
        pause_s=pause_s,
        step=decision.step,
        reachable=reachable,
        durable=durable,
        restores=decision.restores,
    )


def rank_status(shell: CoordinatorShell, member: MemberSpec) -> pb.RankStatus:
    """One rank as it was a greeting ago."""
    state = shell.roster.states[member.id]
    return pb.RankStatus(
        replica=member.id.replica,
        rank=member.id.rank,
        address=member.address,
        version=state.version,
        state=state.state,
        pid=state.pid,
        gauges=state.gauges,
    )


def replica_status(shell: CoordinatorShell, replica: int) -> pb.ReplicaStatus:
    """One replica as it was a greeting ago."""
    protocol = shell.protocol
    members = [member for member in shell.members if member.id.replica == replica]
    states = [shell.roster.states[member.id] for member in members]
    reason = shell.protocol.fenced.get(replica, "")
    if not states:  # not met since this coordinator started
        return pb.ReplicaStatus(replica=replica, state="fenced", reason=reason)
    stands = "paused" if any(state.paused for state in states) else ""
    stands = stands or ("draining" if any(state.gauges.draining for state in states) else "serving")
    return pb.ReplicaStatus(
        replica=replica,
        state="joining" if reason == "joining" else "fenced" if reason else stands,
        version=min(state.version for state in states),
        layout=members[0].layout,
        format=members[0].format,
        digest="" if reason else total(of_held(protocol.digests, protocol.membership.held(replica, protocol.manifest))),
        num_sequences=states[0].num_sequences,
        reason=reason,
        pids=[state.pid for state in states],
        checkpoint=of_replica([state.checkpoint for state in states]),
    )
