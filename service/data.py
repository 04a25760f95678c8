"""A rank's door for bytes: chunks in, rows out. Messages stay raw, so that a payload is copied once, into the staging
buffer; payloads in shared memory are read where the trainer put them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import grpc
import torch

from protos import transfuse_pb2 as pb
from weight_update.channels import Channels
from weight_update.chunks import Chunk, StageOpen, decode_request, encode_chunk
from weight_update.device_rings import DEVICE_RING_BYTES, DeviceRing
from weight_update.errors import BusyError, TransferError, VersionError, WeightUpdateError
from weight_update.rings import RING_BYTES, Ring

from .fetching import fetched
from .passing import Passing
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
        self._channels = Channels(rank.guard.security.as_service())
        self._passing: dict[Stream, Passing] = {}
        self.peers: frozenset[str] = frozenset()  # addresses to which chunks may be passed on

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
        ring, passing = self._ring(opening), self._passing_of(opening)
        window_bytes = WINDOW_BYTES if ring is None else max(WINDOW_BYTES, ring.num_bytes)
        with rank.gauges.stream(opening.trainer_rank, peer, window_bytes) as stream:
            key = (opening.transaction, opening.trainer_rank)
            chunks = self._staged(messages, key, ring)
            held = self._placed.get(key, 0) if passing is None else passing.acknowledged
            yield pb.StageReply(
                sequence=held,
                credit_bytes=stream.credit_bytes,
                staged_bytes=rank.receiver.staged_bytes,
                ring=None if ring is None else _said(ring),
            )
            for chunk in chunks if passing is None else passing.through(chunks):
                stream.received_bytes += len(chunk.payload)
                stream.credit_bytes = stream.received_bytes + window_bytes
                yield pb.StageReply(
                    sequence=chunk.sequence,
                    credit_bytes=stream.credit_bytes,
                    staged_bytes=rank.receiver.staged_bytes,
                )
        rank.timing.staged_bytes = rank.receiver.staged_bytes

    def _staged(self, messages: Iterator[bytes], key: Stream, ring: Ring | DeviceRing | None) -> Iterator[Chunk]:
        """Each chunk once its rows are staged."""
        rank, payloads = self._rank, None if ring is None else ring.payload
        for message in messages:
            chunk = decode_request(message, payloads)
            if not isinstance(chunk, Chunk):
                raise TransferError("stage: a second StageOpen on one stream; open another stream")
            rank.faults.reached("stage")
            if rank.recorder is not None:
                rank.recorder.chunk(*key, bytes(message) if ring is None else _whole(chunk))
            rank.receiver.stage(chunk, transaction=key[0])
            self._placed[key] = chunk.sequence
            rank.metrics.add("transfuse_received_bytes_total", len(chunk.payload))
            yield chunk

    def fetch(self, request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            if self._rank.member.version != request.version:
                raise VersionError(f"fetch of version {request.version}: this rank holds {self._rank.member.version}")
            yield from fetched(self._rank.receiver, request)
        except WeightUpdateError as error:
            refuse(context, error)

    # -- what a stream has besides its connection

    def end_streams(self) -> None:
        """No transaction takes chunks: what a stream still reads goes when it ends."""
        with self._lock:
            rings, self._rings = self._rings, {}
            passing, self._passing = self._passing, {}
        for each in passing.values():
            passed_bytes = each.end()
            self._rank.timing.passed_bytes += passed_bytes
            self._rank.metrics.add("transfuse_passed_bytes_total", passed_bytes)
        for ring in rings.values():
            ring.close()

    def close(self) -> None:
        """Close the connections to other ranks."""
        self.end_streams()
        self._channels.close()

    def _passing_of(self, opening: StageOpen) -> Passing | None:
        """The way on of a stream, the same one after it was connected anew; None at the end of a chain."""
        if not opening.onward:
            return None
        key, rank = (opening.transaction, opening.trainer_rank), self._rank
        with self._lock:
            if key not in self._passing:
                ticket = rank.guard.own_ticket(opening.transaction)
                place = replace(rank.place, gpu="")  # chunks are in host memory
                self._passing[key] = Passing.begin(opening, self._channels, place, self.peers, ticket)
            return self._passing[key]

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
