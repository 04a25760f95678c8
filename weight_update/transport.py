"""What this folder says over gRPC: errors on the wire, unary calls, rows from a rank, the coordinator's calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import grpc

from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc

from .channels import CHANNEL_OPTIONS, CONTROL_MESSAGE_BYTES, PLAINTEXT, Channels, connect
from .errors import ERRORS, MemberError, TransferError, WeightUpdateError
from .security import Security

if TYPE_CHECKING:  # they load torch, which administrators' commands do without
    from quant.formats import TensorSpec

    from .digest import Digests

__all__ = ["CHANNEL_OPTIONS", "CONTROL_MESSAGE_BYTES", "Channels", "connect"]

RpcError = grpc.RpcError

STAGE = "/transfuse.v1.Data/Stage"
FETCH = "/transfuse.v1.Data/Fetch"
ERROR_CODE_KEY = "transfuse-error-code"
COORDINATOR_KEY = "transfuse-coordinator"  # in the answer of a rank: where Control is
USER_KEY = "transfuse-user"  # in a call: who makes it, for the record
RETRY_CODES = frozenset({grpc.StatusCode.UNAVAILABLE})
STREAM_RETRY_CODES = RETRY_CODES | {grpc.StatusCode.CANCELLED}  # by the rank: it drops streams that stay idle
RETRY_DELAY_S = 0.2


def error_of(error: grpc.RpcError, where: str = "") -> WeightUpdateError:
    """The error that the other end raised, or what went wrong on the way."""
    call: Any = error
    metadata = dict(call.trailing_metadata() or ())
    code = metadata.get(ERROR_CODE_KEY)
    if code in ERRORS:
        return ERRORS[code](call.details())
    at = f"{where}: " if where else ""
    if call.code() in RETRY_CODES:
        return TransferError(f"{at}no connection ({call.details()}); is the service up? try 'transfuse status'")
    if call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return TransferError(f"{at}{call.details()}; send smaller messages")
    return MemberError(f"{at}{call.code().name}: {call.details()}")


Message = TypeVar("Message")


def call(
    method: Callable[..., Message],
    request: Any,
    *,
    timeout_s: float | None = None,
    where: str = "",
    retry_s: float = 0.0,
) -> Message:
    """One unary call; raises the other end's error. retry_s: how long one that found no connection, or lost it, is made
    again; only for calls that may come twice."""
    deadline_s = time.monotonic() + retry_s
    while True:
        try:
            return method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            lost: Any = error
            if lost.code() not in RETRY_CODES or time.monotonic() >= deadline_s:
                raise error_of(error, where) from None
        time.sleep(RETRY_DELAY_S)


# ---------------------------------------------------------------- a rank's door


def fetch_stream(target: str, request: pb.FetchRequest, security: Security = PLAINTEXT) -> Iterator[bytes]:
    """The rows that a rank gives away, as serialized chunks; raises the other end's error."""
    with connect(target, security) as channel:
        fetching = channel.unary_stream(FETCH, request_serializer=None, response_deserializer=None)
        try:
            yield from fetching(request.SerializeToString())
        except grpc.RpcError as error:
            raise error_of(error, f"fetch from {target}") from None


# ---------------------------------------------------------------- the coordinator


class Said(NamedTuple):
    """Tensors of a push for the wire. Of those that the service was told for the push before, it is told the hash."""

    tensors: Sequence[TensorSpec]
    message: pb.BeginRequest
    hash: int = 0

    @classmethod
    def of(cls, tensors: Sequence[TensorSpec]) -> Said:
        """In the order of the push."""
        from .values import hash_of_specs, to_spec_proto

        message = pb.BeginRequest(tensors=[to_spec_proto(spec) for spec in tensors])
        return cls(tensors, message, hash_of_specs(message))


class ControlClient:
    """The coordinator as a trainer sees it: one method a step, errors raised as they were on the other end. Describe,
    Begin and Prepare may come twice: they take for how long a lost connection is tried again."""

    def __init__(self, target: str, security: Security = PLAINTEXT) -> None:
        self.target = target
        self._channels = Channels(security)
        self._said = Said((), pb.BeginRequest())
        self._stub  # noqa: B018 - what is wrong with the files or the address is said now

    @property
    def channel(self) -> grpc.Channel:
        """To the coordinator."""
        return self._channels(self.target)

    @property
    def _stub(self) -> Any:
        return self._channels.stub(self.target, pb_grpc.ControlStub)

    def wait_ready(self, timeout_s: float) -> None:
        """Return once the coordinator answers: other calls fail at once where the connection is away for a moment."""
        try:
            self._stub.Status(pb.StatusRequest(), timeout=max(1.0, timeout_s), wait_for_ready=True)
        except grpc.RpcError as error:
            raise TransferError(f"no answer for {timeout_s:.0f} s: {error_of(error, self.target)}") from None

    def describe(self, fingerprint: int = 0, *, retry_s: float = 0.0) -> pb.DescribeReply:
        """What the service holds and where; without the manifest where the caller's has this fingerprint."""
        request = pb.DescribeRequest(fingerprint=fingerprint)
        reply: pb.DescribeReply = call(
            self._stub.Describe, request, timeout_s=60, where=self.target, retry_s=retry_s
        )
        return reply

    def begin(self, *, retry_s: float = 0.0, **fields: Any) -> pb.BeginReply:
        """Open a transaction, or renew the lease of the one with this push id."""
        tensors: Sequence[TensorSpec] = fields.pop("tensors")
        if tensors and self._said.tensors is not tensors:
            self._said = Said.of(tensors)
        request = pb.BeginRequest(**fields, tensors_hash=self._said.hash if tensors else 0)
        reply: pb.BeginReply = call(self._stub.Begin, request, timeout_s=120, where=self.target, retry_s=retry_s)
        if reply.tensors_asked:
            request.MergeFrom(self._said.message)
            reply = call(self._stub.Begin, request, timeout_s=120, where=self.target, retry_s=retry_s)
        return reply

    def prepare(self, transaction: int, digests: Digests, wire_bytes: int, *, retry_s: float = 0.0) -> None:
        """All bytes are sent: every rank checks that they arrived as meant."""
        from .values import to_digests_proto

        request = pb.PrepareRequest(transaction=transaction, digests=to_digests_proto(digests), wire_bytes=wire_bytes)
        call(self._stub.Prepare, request, timeout_s=600, where=self.target, retry_s=retry_s)

    def install(self, transaction: int) -> None:
        """Pause, write in place, keep the undo. `decide` does this by itself where it was not called."""
        call(self._stub.Install, pb.InstallRequest(transaction=transaction), timeout_s=600, where=self.target)

    def decide(self, transaction: int, *, durable: bool = False) -> pb.DecideReply:
        """The commit point. durable: the version will be waited for, none may take its place before it is stored."""
        request = pb.DecideRequest(transaction=transaction, durable=durable)
        reply: pb.DecideReply = call(self._stub.Decide, request, timeout_s=600, where=self.target)
        return reply

    def wait_durable(self, version: int) -> None:
        """Return once a version is in the version store."""
        call(self._stub.WaitDurable, pb.WaitDurableRequest(version=version), where=self.target)

    def abort(self, transaction: int, reason: str) -> None:
        """Give up: every rank goes back to the old version."""
        request = pb.AbortRequest(transaction=transaction, reason=reason)
        call(self._stub.Abort, request, timeout_s=120, where=self.target)

    def status(self) -> pb.StatusReply:
        """What the service does now."""
        reply: pb.StatusReply = call(self._stub.Status, pb.StatusRequest(), timeout_s=60, where=self.target)
        return reply

    def versions(self) -> list[pb.VersionInfo]:
        """Committed versions, oldest first."""
        return list(call(self._stub.Versions, pb.VersionsRequest(), timeout_s=60, where=self.target).versions)

    def close(self) -> None:
        """Close the channel."""
        self._channels.close()
