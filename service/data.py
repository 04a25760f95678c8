"""A rank's door for bytes: chunks in, rows out. Messages stay raw, so that a payload is copied once, into the staging
buffer; payloads in shared memory are read where the trainer put them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import grpc
import torch

from protos import transfuse_pb2 as pb
from weight_update.chunks import Chunk, StageOpen, decode_request, encode_chunk
from weight_update.device_rings import DEVICE_RING_BYTES, DeviceRing
from weight_update.errors import BusyError, TransferError, VersionError, WeightUpdateError
from weight_update.rings import RING_BYTES, Ring

from .fetching import fetched
from .gauges import OpenStream
from .wire import refuse

if TYPE_CHECKING:
    from .rank import RankServer

log = logging.getLogger(__name__)

WINDOW_BYTES = 16 << 20  # payload that one stream may have in flight

Stream = tuple[int, int]  # transaction, trainer rank


class DataServicer:
    """Stage and Fetch of one rank."""

    def __init__(self, rank: RankServer) -> None:
        self._rank = rank
        self._lock = threading.Lock()
        self._rings: dict[Stream, Ring | DeviceRing] = {}
        self._placed: dict[Stream, int] = {}  # the last chunk staged: a stream that broke goes on behind it

    def handler(self) -> grpc.GenericRpcHandler:
        """What a server adds."""
        stage = grpc.stream_stream_rpc_method_handler(
            self.stage, request_deserializer=None, response_serializer=pb.StageReply.SerializeToString
        )
        fetch = grpc.unary_stream_rpc_method_handler(
            self.fetch, request_deserializer=pb.FetchRequest.FromString, response_serializer=None
        )
        return grpc.method_handlers_generic_handler("transfuse.v1.Data", {"Stage": stage, "Fetch": fetch})

    def stage(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[pb.StageReply]:
        try:
            yield from self._stage(messages, context.peer())
        except WeightUpdateError as error:
            refuse(context, error)

    def _stage(self, messages: Iterator[bytes], peer: str) -> Iterator[pb.StageReply]:
        rank = self._rank
        opening = decode_request(next(messages, b""))
        if not isinstance(opening, StageOpen):
            raise TransferError("stage: the first message must be StageOpen; open the stream first")
        rank.guard.require_ticket(opening.ticket, opening.transaction)
        member = rank.member
        if (member.state, member.transaction) != ("open", opening.transaction):
            raise BusyError(
                f"stage: this rank is {member.state} in transaction {member.transaction}, the stream is for"
                f" {opening.transaction}; begin again"
            )
        self._placed = {each: placed for each, placed in self._placed.items() if each[0] == opening.transaction}
        ring = self._ring(opening)
        window_bytes = WINDOW_BYTES if ring is None else max(WINDOW_BYTES, ring.num_bytes)
        with rank.gauges.stream(opening.trainer_rank, peer, window_bytes) as stream:
            yield from self._take(messages, opening, stream, ring)
        rank.timing.staged_bytes = rank.receiver.staged_bytes

    def _take(
        self, messages: Iterator[bytes], opening: StageOpen, stream: OpenStream, ring: Ring | DeviceRing | None
    ) -> Iterator[pb.StageReply]:
        rank, key, window_bytes = self._rank, (opening.transaction, opening.trainer_rank), stream.credit_bytes
        payloads, said = (None, None) if ring is None else (ring.payload, _said(ring))
        yield pb.StageReply(
            sequence=self._placed.get(key, 0),
            credit_bytes=stream.credit_bytes,
            staged_bytes=rank.receiver.staged_bytes,
            ring=said,
        )
        for message in messages:
            chunk = decode_request(message, payloads)
            if not isinstance(chunk, Chunk):
                raise TransferError("stage: a second StageOpen on one stream; open another stream")
            rank.faults.reached("stage")
            if rank.recorder is not None:
                rank.recorder.chunk(*key, bytes(message) if ring is None else _whole(chunk))
            staged_bytes = rank.receiver.stage(chunk, transaction=opening.transaction)
            self._placed[key] = chunk.sequence
            stream.received_bytes += len(chunk.payload)
            rank.metrics.add("transfuse_received_bytes_total", len(chunk.payload))
            stream.credit_bytes = stream.received_bytes + window_bytes
            yield pb.StageReply(
                sequence=chunk.sequence, credit_bytes=stream.credit_bytes, staged_bytes=staged_bytes
            )

    def fetch(self, request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            if self._rank.member.version != request.version:
                raise VersionError(f"fetch of version {request.version}: this rank holds {self._rank.member.version}")
            yield from fetched(self._rank.receiver, request)
        except WeightUpdateError as error:
            refuse(context, error)

    # -- shared memory

    def drop_rings(self) -> None:
        """No transaction takes chunks: what a stream still reads goes when it ends."""
        with self._lock:
            rings, self._rings = self._rings, {}
        for ring in rings.values():
            ring.close()

    def _ring(self, opening: StageOpen) -> Ring | DeviceRing | None:
        """The ring of a stream, the same one after it was connected anew; None where it wants none or none can be."""
        if not opening.ring_bytes or not self._rank.place.host:
            return None
        key = (opening.transaction, opening.trainer_rank)
        with self._lock:
            if key not in self._rings:
                try:
                    self._rings[key] = self._made(opening)
                except (OSError, torch.OutOfMemoryError) as error:
                    log.warning("no ring for trainer rank %d: %s", opening.trainer_rank, error)
                    return None
            return self._rings[key]

    def _made(self, opening: StageOpen) -> Ring | DeviceRing:
        if opening.on_device:
            return DeviceRing.create(min(opening.ring_bytes, DEVICE_RING_BYTES), self._rank.receiver.device)
        return Ring.create(min(opening.ring_bytes, RING_BYTES))


def _said(ring: Ring | DeviceRing) -> pb.Ring:
    if isinstance(ring, DeviceRing):
        return pb.Ring(num_bytes=ring.num_bytes, token=ring.token, device=pb.DeviceMemory(**ring.said()))
    return pb.Ring(pid=ring.pid, fd=ring.fd, num_bytes=ring.num_bytes, token=ring.token)


def _whole(chunk: Chunk) -> bytes:
    """A chunk with its payload, wherever that lies."""
    return encode_chunk(chunk.sequence, chunk.tensor, chunk.offset, chunk.length, [chunk.payload])
