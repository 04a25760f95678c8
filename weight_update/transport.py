"""The one module of this folder that speaks gRPC: channels, errors and values on the wire, the coordinator's client."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import grpc
import numpy as np

from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from quant.formats import TensorSpec
from quant.parameters import ParameterRow

from .delta import BlobSize, DeltaPlan, RankDelta
from .digest import Digests
from .errors import ERRORS, MemberError, TransferError, WeightUpdateError
from .links import Place
from .manifest import Manifest

RpcError = grpc.RpcError

STAGE = "/transfuse.v1.Data/Stage"
FETCH = "/transfuse.v1.Data/Fetch"
ERROR_CODE_KEY = "transfuse-error-code"
RETRY_CODES = frozenset({grpc.StatusCode.UNAVAILABLE})
CONTROL_MESSAGE_BYTES = 256 << 20  # a manifest of a million tensors is about 100 MiB

# An error that lists fifty tensors is longer than gRPC's default of 8 KiB of metadata.
CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", CONTROL_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 256 << 10),
    ("grpc.absolute_max_metadata_size", 512 << 10),
    ("grpc.http2.max_frame_size", (1 << 24) - 1),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


def connect(target: str) -> grpc.Channel:
    """A channel to `host:port`; it connects at the first call."""
    options = [*CHANNEL_OPTIONS, ("grpc.max_receive_message_length", CONTROL_MESSAGE_BYTES)]
    return grpc.insecure_channel(target, options=options)


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


# ---------------------------------------------------------------- values on the wire


def to_spec_proto(spec: TensorSpec) -> pb.TensorSpec:
    """One tensor of a manifest, for the wire."""
    return pb.TensorSpec(name=spec.name, dtype=spec.dtype, shape=spec.shape)


def from_spec_proto(spec: pb.TensorSpec) -> TensorSpec:
    """One tensor of a manifest, from the wire."""
    return TensorSpec(name=spec.name, dtype=spec.dtype, shape=tuple(spec.shape))


def to_manifest_proto(manifest: Manifest) -> pb.Manifest:
    """A manifest for the wire."""
    parameters = [
        pb.ParameterSpec(
            name=row.name,
            shape=row.shape,
            format=row.format,
            group=row.group,
            tensors=[manifest.index[spec.name] for spec in manifest.tensors_of(row)],
            aliases=row.aliases,
        )
        for row in manifest.parameters
    ]
    tensors = [to_spec_proto(spec) for spec in manifest.tensors]
    return pb.Manifest(tensors=tensors, parameters=parameters, fingerprint=manifest.fingerprint)


def from_manifest_proto(message: pb.Manifest) -> Manifest:
    """A manifest from the wire; a fingerprint that does not fit means that the two ends' versions differ."""
    manifest = Manifest(
        tensors=tuple(from_spec_proto(spec) for spec in message.tensors),
        parameters=tuple(
            ParameterRow(
                name=row.name, shape=tuple(row.shape), format=row.format, group=row.group, aliases=tuple(row.aliases)
            )
            for row in message.parameters
        ),
    )
    if manifest.fingerprint != message.fingerprint:
        raise TransferError(
            f"manifest fingerprint: service says {message.fingerprint:016x}, computed {manifest.fingerprint:016x};"
            " install the same release of transfuse on both ends"
        )
    return manifest


def to_place_proto(place: Place) -> pb.Place:
    """Where a process is, for the wire."""
    return pb.Place(host=place.host, processes=place.processes, user=place.user, gpu=place.gpu)


def from_place_proto(message: pb.Place) -> Place:
    """Where a process is, from the wire."""
    return Place(host=message.host, processes=message.processes, user=message.user, gpu=message.gpu)


def to_digests_proto(digests: Digests) -> pb.Digests:
    """[n, 2] uint64 to its message."""
    return pb.Digests(lane0=digests[:, 0].tolist(), lane1=digests[:, 1].tolist())


def from_digests_proto(message: pb.Digests) -> Digests:
    """A message to [n, 2] uint64."""
    if len(message.lane0) != len(message.lane1):
        raise TransferError(f"digests: {len(message.lane0)} first lanes, {len(message.lane1)} second lanes")
    return np.stack([np.array(message.lane0, np.uint64), np.array(message.lane1, np.uint64)], axis=1)


def to_delta_proto(plan: DeltaPlan) -> pb.Delta:
    """What a delta push brings, for the wire."""
    ranks = [
        pb.RankDelta(
            replica=each.replica,
            rank=each.rank,
            blobs=[
                pb.BlobSize(**{field.name: getattr(blob, field.name) for field in pb.BlobSize.DESCRIPTOR.fields})
                for blob in each.blobs
            ],
        )
        for each in plan.ranks
    ]
    return pb.Delta(base_version=plan.base_version, base_digest=plan.base_digest, changed=plan.changed, ranks=ranks)


def from_delta_proto(message: pb.Delta) -> DeltaPlan:
    """What a delta push brings, from the wire."""
    ranks = tuple(
        RankDelta(
            replica=each.replica,
            rank=each.rank,
            blobs=tuple(
                BlobSize(**{field.name: getattr(blob, field.name) for field in pb.BlobSize.DESCRIPTOR.fields})
                for blob in each.blobs
            ),
        )
        for each in message.ranks
    )
    return DeltaPlan(
        base_version=message.base_version,
        base_digest=message.base_digest,
        changed=tuple(message.changed),
        ranks=ranks,
    )


# ---------------------------------------------------------------- a rank's door


def fetch_stream(target: str, request: pb.FetchRequest) -> Iterator[bytes]:
    """The rows that a rank gives away, as serialized chunks; raises the other end's error."""
    with connect(target) as channel:
        fetching = channel.unary_stream(FETCH, request_serializer=None, response_deserializer=None)
        try:
            yield from fetching(request.SerializeToString())
        except grpc.RpcError as error:
            raise error_of(error, f"fetch from {target}") from None


# ---------------------------------------------------------------- the coordinator


class ControlClient:
    """The coordinator as a trainer sees it: one method a step, errors raised as they were on the other end."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.channel = connect(target)
        self._stub = pb_grpc.ControlStub(self.channel)

    def describe(self, fingerprint: int = 0) -> pb.DescribeReply:
        """What the service holds and where; without the manifest where the caller's has this fingerprint."""
        request = pb.DescribeRequest(fingerprint=fingerprint)
        reply: pb.DescribeReply = call(self._stub.Describe, request, timeout_s=60, where=self.target)
        return reply

    def begin(self, **fields: Any) -> pb.BeginReply:
        """Open a transaction, or renew the lease of the one with this push id."""
        tensors: Sequence[TensorSpec] = fields.pop("tensors")
        request = pb.BeginRequest(tensors=[to_spec_proto(spec) for spec in tensors], **fields)
        reply: pb.BeginReply = call(self._stub.Begin, request, timeout_s=120, where=self.target)
        return reply

    def prepare(self, transaction: int, digests: Digests, wire_bytes: int) -> None:
        """All bytes are sent: every rank checks that they arrived as meant."""
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
        self.channel.close()
