"""The coordinator's calls to the ranks: a table from a step of the protocol to the RPC that carries it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from protos import transfuse_pb2 as pb
from sharding.routes import held
from weight_update.delta import DeltaPlan
from weight_update.digest import Digests
from weight_update.errors import MemberError
from weight_update.messages import Donor, Kept, MemberId, MemberState, Send
from weight_update.transport import call
from weight_update.values import from_digests_proto, to_delta_proto

STEP_TIMEOUT_S = 120.0
PAUSING_TIMEOUT_S = 600.0  # of steps that may wait for running samples to end
FILL_TIMEOUT_S = 3600.0  # a prepare that waits for a donor's rows
HELLO_TIMEOUT_S = 5.0

Rows = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]  # first, and one past the last, by tensor of the manifest


@dataclass(frozen=True, kw_only=True)
class MemberSpec:
    """A member as the coordinator learned it: where it is and which rows it owns."""

    id: MemberId
    address: str
    spec: pb.RankSpec
    layout: str
    format: str

    @classmethod
    def of(cls, address: str, reply: pb.HelloReply) -> MemberSpec:
        """From its answer to a greeting."""
        spec = pb.RankSpec()
        spec.CopyFrom(reply.spec)
        spec.address = address
        member = MemberId(replica=spec.replica, rank=spec.rank)
        return cls(id=member, address=address, spec=spec, layout=reply.layout, format=reply.format)

    @cached_property
    def rows(self) -> Rows:
        """The rows that it owns."""
        return np.array(self.spec.row_start, np.int64), np.array(self.spec.row_stop, np.int64)

    @cached_property
    def rows_hash(self) -> bytes:
        """Alike where two ranks own the same rows."""
        return xxhash.xxh3_128_digest(b"".join(each.tobytes() for each in self.rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a member answered. token: its clock."""

    token: float
    result: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Around:
    """What a member is told beside its step. donors: the ranks of send.source, where it is a replica. coordinator:
    host:port of Control. peers: addresses of the ranks that own the same rows. rows: that it owns."""

    donors: Sequence[pb.RankSpec] = ()
    coordinator: str = ""
    peers: Sequence[str] = ()
    rows: Rows | None = None


def state_of(reply: pb.HelloReply) -> MemberState:
    """What a member says of itself, as the protocol takes it."""
    return MemberState(
        state=reply.state,
        transaction=reply.transaction,
        version=reply.version,
        serves=reply.serves,
        kept=tuple(reply.kept),
    )


def _request(send: Send) -> pb.MemberRequest:
    return pb.MemberRequest(
        epoch=send.epoch, transaction=send.transaction, version=send.version, round=send.round, token=send.token
    )


def _hello(stub: Any, send: Send, around: Around) -> Answer:
    request = pb.HelloRequest(
        epoch=send.epoch,
        round=send.round,
        version=send.version,
        token=send.token,
        brief=True,
        coordinator=around.coordinator,
    )
    reply: pb.HelloReply = call(stub.Hello, request, timeout_s=HELLO_TIMEOUT_S, where=str(send.member))
    return Answer(token=reply.token, result=reply)


def _told(send: Send, around: Around) -> np.ndarray:
    """Which of the tensors of a transaction a member is told of, by place: so what it plans, says and answers does not
    grow with what others hold."""
    assert send.tensors is not None and around.rows is not None
    return held(*around.rows, send.tensors)


def _open(stub: Any, send: Send, around: Around) -> Answer:
    assert send.tensors is not None
    request = pb.OpenRequest(
        epoch=send.epoch,
        transaction=send.transaction,
        version=send.version,
        base_version=send.base_version,
        tensors=send.tensors[_told(send, around)].tolist(),
        num_streams=send.num_streams,
        delta=to_delta_proto(send.source) if isinstance(send.source, DeltaPlan) else None,
        restores=send.source.version if isinstance(send.source, Kept) else 0,
        donors=around.donors,
        peers=around.peers,
    )
    reply = call(stub.Open, request, timeout_s=STEP_TIMEOUT_S, where=str(send.member))
    return Answer(token=reply.token, result=int(reply.planned_bytes))


def _reach(stub: Any, send: Send, around: Around) -> Answer:
    reply = call(stub.Reach, _request(send), timeout_s=STEP_TIMEOUT_S, where=str(send.member))
    return Answer(token=reply.token, result=tuple(reply.versions))


def _digests(name: str, timeout_s: float = STEP_TIMEOUT_S) -> Callable[[Any, Send, Around], Answer]:
    def step(stub: Any, send: Send, around: Around) -> Answer:
        allowed_s = FILL_TIMEOUT_S if isinstance(send.source, Donor) else timeout_s
        reply = call(getattr(stub, name), _request(send), timeout_s=allowed_s, where=str(send.member))
        return Answer(token=reply.token, result=_of_all(from_digests_proto(reply.digests), send, around))

    return step


def _of_all(digests: Digests, send: Send, around: Around) -> Digests:
    """By tensor of the transaction, zeros for those of which the member was not told; of another step, as they are."""
    if send.tensors is None:
        return digests
    told, found = _told(send, around), np.zeros((len(send.tensors), 2), np.uint64)
    if len(digests) != len(told):
        raise MemberError(f"{send.member}: {send.step}: {len(digests)} digests, it was told of {len(told)} tensors")
    found[told] = digests
    return found


def _plain(name: str, timeout_s: float = STEP_TIMEOUT_S) -> Callable[[Any, Send, Around], Answer]:
    def step(stub: Any, send: Send, around: Around) -> Answer:
        reply = call(getattr(stub, name), _request(send), timeout_s=timeout_s, where=str(send.member))
        return Answer(token=reply.token, result=reply.timing)

    return step


# step -> the call that carries it to a member
SENDERS: Mapping[str, Callable[[Any, Send, Around], Answer]] = {
    "hello": _hello,
    "open": _open,
    "reach": _reach,
    "prepare": _digests("Prepare"),
    "install": _digests("Install", PAUSING_TIMEOUT_S),
    "digest": _digests("Digest"),
    "confirm": _plain("Confirm"),
    "publish": _plain("Publish"),
    "adopt": _plain("Adopt"),
    "undo": _plain("Undo"),
    "abort": _plain("Abort"),
    "pause": _plain("Pause", PAUSING_TIMEOUT_S),
    "resume": _plain("Resume"),
    "drain": _plain("Drain"),
}
