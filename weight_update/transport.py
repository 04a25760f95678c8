"""What this folder says over gRPC: errors on the wire, values, the stream to one rank, the coordinator's calls.

A stream survives its connection: chunks are kept until they are acknowledged. On a new connection the rank says first
what it holds, and the rest is sent; a chunk that comes twice is harmless. Credits bound what is in flight, so a slow
rank holds its sender back.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

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

log = logging.getLogger(__name__)

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


def call(method: Callable[..., Message], request: Any, *, timeout_s: float | None = None, where: str = "") -> Message:
    """One unary call; raises the other end's error."""
    try:
        return method(request, timeout=timeout_s)
    except grpc.RpcError as error:
        raise error_of(error, where) from None


# ---------------------------------------------------------------- one rank's stream


class StageStream:
    """The stream of one trainer rank to one actor rank.

    target: the rank's host:port. retry_s: how long a broken connection is retried before the push fails. ticket: of
    the transaction, from its Begin.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        *,
        target: str,
        transaction: int,
        epoch: int,
        trainer_rank: int,
        retry_s: float,
        ticket: bytes = b"",
    ) -> None:
        self._stage = channel.stream_stream(
            STAGE, request_serializer=None, response_deserializer=pb.StageReply.FromString
        )
        opening = pb.StageOpen(transaction=transaction, epoch=epoch, trainer_rank=trainer_rank, ticket=ticket)
        self._opening = pb.StageRequest(open=opening).SerializeToString()
        self._target = target
        self._retry_s = retry_s
        self._state = threading.Condition()  # guards all below; never held during a gRPC call
        self._unacked: deque[tuple[int, int, bytes]] = deque()  # sequence, payload bytes, message
        self._unsent: deque[bytes] = deque()
        self._greeted = False  # the rank said on this connection what it holds
        self._sent_bytes = 0
        self._credit_bytes = 0
        self._heard_s = 0.0  # when the rank last answered
        self._closing = False
        self._error: WeightUpdateError | None = None
        self._call: Any = None
        self.wire_bytes = 0
        self._thread = threading.Thread(target=self._run, name=f"stage-{target}", daemon=True)
        self._thread.start()

    def send(self, sequence: int, message: bytes, payload_bytes: int) -> None:
        """Queue one chunk; blocks while the rank has granted no credit for it."""
        with self._state:
            self._state.wait_for(
                lambda: self._error or self._sent_bytes + payload_bytes <= self._credit_bytes or not self._unacked
            )
            self._raise()
            self._unacked.append((sequence, payload_bytes, message))
            if self._greeted:
                self._unsent.append(message)
                self._sent_bytes += payload_bytes
            self.wire_bytes += len(message)
            self._state.notify_all()

    def finish(self) -> None:
        """Wait until the rank has acknowledged everything."""
        with self._state:
            self._closing = True
            self._state.notify_all()
        self._thread.join()
        with self._state:
            self._raise()

    def cancel(self) -> None:
        """Drop the stream; what was staged stays until the transaction is aborted."""
        with self._state:
            self._error = self._error or TransferError(f"{self._target}: the push was cancelled")
            call = self._call
            self._state.notify_all()
        if call is not None:
            call.cancel()
        self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        broken_s = float("-inf")
        while not self._done():
            try:
                self._connect()
            except grpc.RpcError as error:
                now_s = time.monotonic()
                if self._heard_s > broken_s:  # it had worked until now
                    broken_s = now_s
                if error.code() not in STREAM_RETRY_CODES or now_s > broken_s + self._retry_s:
                    self._fail(error_of(error, f"stream to {self._target}"))
                    return
                log.warning("stream to %s broke (%s), connecting again", self._target, error.details())
                time.sleep(RETRY_DELAY_S)

    def _connect(self) -> None:
        with self._state:
            self._unsent.clear()
            self._greeted, self._sent_bytes, self._credit_bytes = False, 0, 0
            connection = threading.Event()
        self._call = self._stage(self._requests(connection))
        try:
            for reply in self._call:
                self._acknowledge(reply)
        finally:
            connection.set()
            with self._state:
                self._state.notify_all()

    def _requests(self, connection: threading.Event) -> Iterator[bytes]:
        yield self._opening
        while True:
            with self._state:
                self._state.wait_for(lambda: self._unsent or self._over() or connection.is_set())
                if connection.is_set() or (not self._unsent and self._over()):
                    return
                message = self._unsent.popleft()
            yield message

    def _over(self) -> bool:
        return self._error is not None or (self._closing and not self._unacked)

    def _done(self) -> bool:
        with self._state:
            return self._over()

    def _acknowledge(self, reply: pb.StageReply) -> None:
        with self._state:
            self._heard_s = time.monotonic()
            while self._unacked and self._unacked[0][0] <= reply.sequence:
                self._unacked.popleft()
            if not self._greeted:
                self._greeted = True
                self._unsent.extend(message for _, _, message in self._unacked)
                self._sent_bytes = sum(payload for _, payload, _ in self._unacked)
            self._credit_bytes = max(self._credit_bytes, reply.credit_bytes)
            self._state.notify_all()

    def _fail(self, error: WeightUpdateError) -> None:
        with self._state:
            self._error = self._error or error
            self._state.notify_all()


def fetch_stream(target: str, request: pb.FetchRequest, security: Security = PLAINTEXT) -> Iterator[bytes]:
    """The rows that a rank gives away, as serialized chunks; raises the other end's error."""
    with connect(target, security) as channel:
        fetching = channel.unary_stream(FETCH, request_serializer=None, response_deserializer=None)
        try:
            yield from fetching(request.SerializeToString())
        except grpc.RpcError as error:
            raise error_of(error, f"fetch from {target}") from None


# ---------------------------------------------------------------- the coordinator


class ControlClient:
    """The coordinator as a trainer sees it: one method a step, errors raised as they were on the other end."""

    def __init__(self, target: str, security: Security = PLAINTEXT) -> None:
        self.target = target
        self._channels = Channels(security)
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

    def describe(self, fingerprint: int = 0) -> pb.DescribeReply:
        """What the service holds and where; without the manifest where the caller's has this fingerprint."""
        request = pb.DescribeRequest(fingerprint=fingerprint)
        reply: pb.DescribeReply = call(self._stub.Describe, request, timeout_s=60, where=self.target)
        return reply

    def begin(self, **fields: Any) -> pb.BeginReply:
        """Open a transaction, or renew the lease of the one with this push id."""
        from .values import to_spec_proto

        tensors: Sequence[TensorSpec] = fields.pop("tensors")
        request = pb.BeginRequest(tensors=[to_spec_proto(spec) for spec in tensors], **fields)
        reply: pb.BeginReply = call(self._stub.Begin, request, timeout_s=120, where=self.target)
        return reply

    def prepare(self, transaction: int, digests: Digests, wire_bytes: int) -> None:
        """All bytes are sent: every rank checks that they arrived as meant."""
        from .values import to_digests_proto

        request = pb.PrepareRequest(transaction=transaction, digests=to_digests_proto(digests), wire_bytes=wire_bytes)
        call(self._stub.Prepare, request, timeout_s=600, where=self.target)

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
