"""The coordinator's calls to the ranks: a table from a step of the protocol to the RPC that carries it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from protos import transfuse_pb2 as pb
from weight_update.delta import DeltaPlan
from weight_update.digest import Digests
from weight_update.messages import MemberId, Send
from weight_update.transport import call, from_digests_proto, to_delta_proto

STEP_TIMEOUT_S = 120.0
PAUSING_TIMEOUT_S = 600.0  # of steps that may wait for running samples to end


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberSpec:
    """A member as the coordinator learned it: where it is and which rows it owns."""

    id: MemberId
    address: str
    spec: pb.RankSpec
    layout: str
    format: str


def _send_open(stub: Any, send: Send, epoch: int) -> int:
    tensors = [] if send.tensors is None else send.tensors.tolist()
    request = pb.OpenRequest(
        epoch=epoch,
        transaction=send.transaction,
        version=send.version,
        base_version=send.base_version,
        tensors=tensors,
        num_streams=send.num_streams,
        delta=to_delta_proto(send.source) if isinstance(send.source, DeltaPlan) else None,
    )
    return int(call(stub.Open, request, timeout_s=STEP_TIMEOUT_S, where=str(send.member)).planned_bytes)


def _send_digests(name: str, timeout_s: float = STEP_TIMEOUT_S) -> Callable[[Any, Send, int], Digests]:
    def send_step(stub: Any, send: Send, epoch: int) -> Digests:
        request = pb.MemberRequest(epoch=epoch, transaction=send.transaction, version=send.version)
        reply = call(getattr(stub, name), request, timeout_s=timeout_s, where=str(send.member))
        return from_digests_proto(reply.digests)

    return send_step


def _send_plain(name: str, timeout_s: float = STEP_TIMEOUT_S) -> Callable[[Any, Send, int], pb.RankTiming]:
    def send_step(stub: Any, send: Send, epoch: int) -> pb.RankTiming:
        request = pb.MemberRequest(epoch=epoch, transaction=send.transaction, version=send.version)
        reply: pb.MemberReply = call(getattr(stub, name), request, timeout_s=timeout_s, where=str(send.member))
        return reply.timing

    return send_step


# step -> the call that carries it to a member
SENDERS: Mapping[str, Callable[[Any, Send, int], Any]] = {
    "open": _send_open,
    "prepare": _send_digests("Prepare"),
    "install": _send_digests("Install", PAUSING_TIMEOUT_S),
    "confirm": _send_plain("Confirm"),
    "publish": _send_plain("Publish"),
    "undo": _send_plain("Undo"),
    "abort": _send_plain("Abort"),
    "digest": _send_digests("Digest"),
    "pause": _send_plain("Pause", PAUSING_TIMEOUT_S),
    "resume": _send_plain("Resume"),
}
