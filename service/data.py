"""A rank's door for bytes: chunks in, rows out. Messages stay raw, so that a payload is copied once, into the staging
buffer; payloads in shared memory are read where the trainer put them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import grpc

from protos import transfuse_pb2 as pb
from weight_update.channels import Channels
from weight_update.chunks import Chunk, StageOpen, decode_request, encode_chunk
from weight_update.device_rings import DEVICE_RING_BYTES, DeviceRing
from weight_update.errors import BusyError, TransferError, VersionError, WeightUpdateError
from weight_update.groups import Group, GroupRing
from weight_update.rings import RING_BYTES, Ring

from .fetching import fetched
from .passing import Passing
from .wire import refuse

if TYPE_CHECKING:
    from .rank import RankServer

log = logging.getLogger(__name__)

WINDOW_BYTES = 16 << 20  # payload that one stream may have in flight

Stream = tuple[int, int]  # transaction, trainer rank
AnyRing = Ring | DeviceRing | GroupRing


class Turn:
    """Which connection of a stream may stage: what another one still reads in a ring may be overwritten meanwhile.

    placed: the last chunk staged; a stream that broke goes on behind it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # of one chunk on its way into the staging buffer
        self.connection: object = None
        self.placed = 0


class DataServicer:
    """Stage and Fetch of one rank."""

    def __init__(self, rank: RankServer) -> None:
        self._rank = rank
        self._lock = threading.Lock()
        self._rings: dict[Stream, AnyRing] = {}
        self._groups: dict[int, tuple[bytes, Group]] = {}  # of each trainer rank, with its token
        self._turns: dict[Stream, Turn] = {}
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
        key = (opening.transaction, opening.trainer_rank)
        turn, connection = self._turn(key), object()
        with turn.lock:  # once the chunk is staged that an older connection is at
            turn.connection = connection
            ring, passing = self._ring(opening), self._passing_of(opening)
        window_bytes = WINDOW_BYTES if ring is None else max(WINDOW_BYTES, ring.num_bytes)
        with rank.gauges.stream(opening.trainer_rank, peer, window_bytes) as stream:
            chunks = self._staged(messages, key, ring, turn, connection)
            held = turn.placed if passing is None else passing.acknowledged
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

    def _staged(
        self, messages: Iterator[bytes], key: Stream, ring: AnyRing | None, turn: Turn, connection: object
    ) -> Iterator[Chunk]:
        """Each chunk once its rows are staged; no more of them once the stream was connected anew."""
        rank, payloads = self._rank, None if ring is None else ring.payload
        for message in messages:
            chunk = decode_request(message, payloads)
            if not isinstance(chunk, Chunk):
                raise TransferError("stage: a second StageOpen on one stream; open another stream")
            rank.faults.reached("stage")
            with turn.lock:
                if turn.connection is not connection:
                    return
                if isinstance(ring, GroupRing):
                    ring.bring(chunk)
                if rank.recorder is not None:
                    rank.recorder.chunk(*key, bytes(message) if ring is None else _whole(chunk))
                rank.receiver.stage(chunk, transaction=key[0])
                turn.placed = chunk.sequence
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

    def end_streams(self, *, whole: bool = False) -> None:
        """No transaction takes chunks: what a stream still reads goes when it ends. whole: all that was sent came."""
        with self._lock:
            rings, self._rings = self._rings, {}
            passing, self._passing = self._passing, {}
            for _, trainer_rank in rings if not whole else ():
                self._drop_group(trainer_rank)
        for each in passing.values():
            passed_bytes = each.end()
            self._rank.timing.passed_bytes += passed_bytes
            self._rank.metrics.add("transfuse_passed_bytes_total", passed_bytes)
        for ring in rings.values():
            ring.close()

    def close(self) -> None:
        """Close the connections to other ranks."""
        self.end_streams()
        with self._lock:
            for trainer_rank in [*self._groups]:
                self._drop_group(trainer_rank)
        self._channels.close()

    def _turn(self, key: Stream) -> Turn:
        with self._lock:
            self._turns = {each: turn for each, turn in self._turns.items() if each[0] == key[0]}
            return self._turns.setdefault(key, Turn())

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

    def _ring(self, opening: StageOpen) -> AnyRing | None:
        """The ring of a stream, the same one after it was connected anew; None where it wants none or none can be."""
        if not opening.ring_bytes or not self._rank.place.host:
            return None
        key = (opening.transaction, opening.trainer_rank)
        with self._lock:
            if key not in self._rings:
                try:
                    self._rings[key] = self._made(opening)
                except (OSError, RuntimeError) as error:  # no memory; no port
                    log.warning("no ring for trainer rank %d: %s", opening.trainer_rank, error)
                    return None
            return self._rings[key]

    def _made(self, opening: StageOpen) -> AnyRing:
        num_bytes, device = min(opening.ring_bytes, DEVICE_RING_BYTES), self._rank.receiver.device
        if opening.group:
            return GroupRing.create(num_bytes, device, *self._group(opening))
        if opening.on_device:
            return DeviceRing.create(num_bytes, device)
        return Ring.create(min(opening.ring_bytes, RING_BYTES))

    def _group(self, opening: StageOpen) -> tuple[Group, str]:
        """The group of a trainer rank, and where it is joined; "" where this rank and that one are in it."""
        token, group = self._groups.get(opening.trainer_rank, (b"", None))
        if group is not None and token == opening.group:
            return group, ""
        self._drop_group(opening.trainer_rank)
        group = Group.host(self._rank.address.rpartition(":")[0], self._rank.receiver.device)
        self._groups[opening.trainer_rank] = opening.group, group
        return group, group.address

    def _drop_group(self, trainer_rank: int) -> None:
        _, group = self._groups.pop(trainer_rank, (b"", None))
        if group is not None:
            group.abort()


def _said(ring: AnyRing) -> pb.Ring:
    if isinstance(ring, GroupRing):
        return pb.Ring(num_bytes=ring.num_bytes, token=ring.token, in_group=True, group=ring.address)
    if isinstance(ring, DeviceRing):
        return pb.Ring(num_bytes=ring.num_bytes, token=ring.token, device=pb.DeviceMemory(**ring.said()))
    return pb.Ring(pid=ring.pid, fd=ring.fd, num_bytes=ring.num_bytes, token=ring.token)


def _whole(chunk: Chunk) -> bytes:
    """A chunk with its payload, wherever that lies."""
    return encode_chunk(chunk.sequence, chunk.tensor, chunk.offset, chunk.length, [chunk.payload])
