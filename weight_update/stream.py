"""The stream of one trainer rank to one actor rank: chunks, credits, acknowledgements.

A stream survives its connection: chunks are kept until they are acknowledged. On a new connection the rank says first
what it holds, and the rest is sent; a chunk that comes twice is harmless. Credits bound what is in flight, so a slow
rank holds its sender back.
Payloads go in the chunks, or through a ring of memory that the rank offers, where both agree on one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from protos import transfuse_pb2 as pb

from .chunks import Packet
from .device_rings import DEVICE_CHUNK_BYTES, DeviceWriter
from .errors import TransferError, WeightUpdateError
from .groups import Groups, GroupWriter
from .links import CUDA_IPC, GRPC, NCCL, ON_DEVICE, SHARED_MEMORY, Link
from .rings import RING_CHUNK_BYTES, RingWriter
from .transport import STAGE, STREAM_RETRY_CODES, RpcError, error_of

log = logging.getLogger(__name__)

RETRY_DELAY_S = 0.2
AHEAD = 2  # chunks that are on their way into a ring, or there and not said yet
CHUNK_BYTES_OF = {  # payload; 0: as packed
    CUDA_IPC: DEVICE_CHUNK_BYTES,
    NCCL: DEVICE_CHUNK_BYTES,
    SHARED_MEMORY: RING_CHUNK_BYTES,
    GRPC: 0,
}


class StageStream:
    """target: the rank's host:port. name: its replica and number. retry_s: how long a broken connection is retried
    before the push fails. ticket: of the transaction, as Begin gave it. link: how payloads are to go. ring_bytes: room
    wanted where that is shared memory. onward: the ranks to which it passes on what it gets. device, groups: of what is
    sent from a GPU."""

    def __init__(
        self,
        channel: Any,
        *,
        target: str,
        name: str = "",
        transaction: int,
        epoch: int,
        trainer_rank: int,
        retry_s: float,
        ticket: bytes = b"",
        link: Link | None = None,
        ring_bytes: int = 0,
        onward: Sequence[pb.RankSpec] = (),
        device: torch.device | None = None,
        groups: Groups | None = None,
    ) -> None:
        self._stage = channel.stream_stream(STAGE, None, pb.StageReply.FromString)
        self._name = " on to ".join([name or target, *(f"{each.replica}.{each.rank}" for each in onward)])
        self.link = link or Link(transport=GRPC)
        wanted = 0 if self.link.transport == GRPC else ring_bytes
        opening = pb.StageOpen(
            transaction=transaction,
            epoch=epoch,
            trainer_rank=trainer_rank,
            ticket=ticket,
            ring_bytes=wanted,
            on_device=self.link.transport in ON_DEVICE,
            group=groups.token(target) if groups is not None and self.link.transport == NCCL else b"",
            onward=onward,
        )
        self._opening = pb.StageRequest(open=opening).SerializeToString()
        self._target, self._retry_s, self._device, self._groups = target, retry_s, device, groups
        self._framing = threading.Lock()  # one chunk finds its place at a time
        self._state = threading.Condition()  # guards all below; never held during a gRPC call or a copy
        self._agreed = not wanted  # how payloads go
        self._ring: RingWriter | None = None
        self._placed: dict[int, bytes] = {}  # sequence -> message, of payloads that lie in the ring
        self._unacked, self._unsent = deque[Packet](), deque[Packet]()
        self._greeted = False  # the rank said on this connection what it holds
        self._sent_bytes = self._credit_bytes = 0
        self.acknowledged = 0  # the last chunk that the rank has, and every one that it passes on to
        self._heard_s = 0.0  # when the rank last answered
        self._closing = False
        self._error: WeightUpdateError | None = None
        self._call: Any = None
        self.wire_bytes = 0
        self._thread = threading.Thread(target=self._run, name=f"stage-{target}", daemon=True)
        self.is_open = False  # nothing is said to a rank for which there is nothing

    @property
    def chunk_bytes(self) -> int:
        """Payload of a chunk that suits the transport."""
        return CHUNK_BYTES_OF[self.link.transport]

    def send(self, packet: Packet) -> None:
        """Queue one chunk, the first one opens the stream; blocks while the rank has granted no credit for it."""
        size = packet.payload_bytes
        if not self.is_open:
            self._thread.start()
            self.is_open = True
        with self._state:
            self._state.wait_for(
                lambda: self._error or self._sent_bytes + size <= self._credit_bytes or not self._unacked
            )
            self._raise()
            self._unacked.append(packet)
            if self._greeted:
                self._unsent.append(packet)
                self._sent_bytes += size
            self._state.notify_all()

    def wait(self, sequence: int) -> None:
        """Return once the rank has acknowledged this chunk."""
        with self._state:
            self._state.wait_for(lambda: self._error or self.acknowledged >= sequence)
            self._raise()

    def finish(self) -> None:
        """Wait until the rank has acknowledged everything."""
        with self._state:
            self._closing = True
            self._state.notify_all()
        self._join()
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
        self._join()

    def _join(self) -> None:
        if self.is_open:
            self._thread.join()

    @property
    def way(self) -> str:
        """To whom payloads went, and how."""
        return f"{self._name}: {self.link}"

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    # -- the connection

    def _run(self) -> None:
        broken_s = float("-inf")
        while not self._done():
            try:
                self._connect()
            except WeightUpdateError as error:
                self._fail(error)
            except RpcError as error:
                now_s = time.monotonic()
                if self._heard_s > broken_s:  # it had worked until now
                    broken_s = now_s
                if error.code() not in STREAM_RETRY_CODES or now_s > broken_s + self._retry_s:
                    self._fail(error_of(error, f"stream to {self._target}"))
                    break
                log.warning("stream to %s broke (%s), connecting again", self._target, error.details())
                time.sleep(RETRY_DELAY_S)
        self._ring = None
        if self._error is not None and self._groups is not None and self.link.transport == NCCL:
            self._groups.drop(self._target)  # what was sent and not said would be taken for the next push's

    def _connect(self) -> None:
        with self._state:
            self._unsent.clear()
            self._greeted, self._sent_bytes, self._credit_bytes = False, 0, 0
            connection = threading.Event()
        self._call = self._stage(self._requests(connection))
        try:
            for reply in self._call:
                self._agree(reply)
                self._acknowledge(reply)
        except BaseException:
            self._call.cancel()
            raise
        finally:
            connection.set()
            with self._state:
                self._state.notify_all()

    def _requests(self, connection: threading.Event) -> Iterator[bytes]:
        """What is said on a connection. A chunk goes into the ring while the one before is said, where there is room:
        to wait for it would be to wait for what is not said yet."""
        yield self._opening
        ahead: deque[tuple[Packet, list[bytes]]] = deque()
        while True:
            with self._state:
                self._state.wait_for(lambda: self._unsent or ahead or self._over() or connection.is_set())
                if connection.is_set() or not (self._unsent or ahead):
                    return
                packet = self._unsent[0] if self._unsent and len(ahead) < AHEAD else None
            messages = None if packet is None else self._framed(packet, connection, wait=not ahead)
            with self._state:
                if connection.is_set() or messages == []:
                    return
                if messages is not None:
                    ahead.append((self._unsent.popleft(), messages))
                    continue
            packet, messages = ahead.popleft()
            packet.arrive()
            yield from messages

    def _over(self) -> bool:
        return self._error is not None or (self._closing and not self._unacked)

    def _done(self) -> bool:
        with self._state:
            return self._over()

    def _acknowledge(self, reply: pb.StageReply) -> None:
        with self._state:
            self._heard_s = time.monotonic()
            self.acknowledged = max(self.acknowledged, reply.sequence)
            while self._unacked and self._unacked[0].sequence <= reply.sequence:
                packet = self._unacked.popleft()
                placed = self._placed.pop(packet.sequence, None)
                if placed is None:
                    self.wire_bytes += sum(map(len, packet.messages))
                else:
                    self.wire_bytes += len(placed) + packet.payload_bytes
                if placed is not None and self._ring is not None:
                    self._ring.free()
            if not self._greeted:
                self._greeted = True
                self._unsent.extend(self._unacked)
                self._sent_bytes = sum(packet.payload_bytes for packet in self._unacked)
            self._credit_bytes = max(self._credit_bytes, reply.credit_bytes)
            self._state.notify_all()

    def _fail(self, error: WeightUpdateError) -> None:
        with self._state:
            self._error = self._error or error
            self._state.notify_all()

    # -- payloads

    def _agree(self, reply: pb.StageReply) -> None:
        """Take the ring that the rank offers, the same one on every connection of a stream; do without one where it
        cannot be had and gRPC may be used."""
        if self._ring is not None and reply.HasField("ring") and reply.ring.token != self._ring.token:
            raise TransferError(f"{self._target}: the rank lost its ring of shared memory; push again")
        if self._agreed:
            return
        try:
            ring: RingWriter | None = self._opened(reply)
        except TransferError as error:
            if self.link.only:
                raise TransferError(f"{self._target}: {error}; allow transport 'grpc'") from None
            log.warning("stream to %s: payloads go over gRPC: %s", self._target, error)
            ring, self.link = None, replace(self.link, transport=GRPC, reasons=(*self.link.reasons, str(error)))
        with self._state:
            self._ring, self._agreed = ring, True
            self._state.notify_all()

    def _opened(self, reply: pb.StageReply) -> RingWriter:
        """The ring that a rank offers."""
        said = reply.ring
        if not reply.HasField("ring"):
            raise TransferError(f"{self.link.transport}: the rank offers none")
        if self.link.transport not in ON_DEVICE:
            return RingWriter.open(said.pid, said.fd, said.num_bytes, said.token)
        device = self._device or torch.device("cpu")
        if said.in_group and self._groups is not None:
            group = self._groups.of(self._target, said.group, device)
            return GroupWriter(said.num_bytes, said.token, group, device)
        return DeviceWriter.open_device(said.device, said.num_bytes, said.token, device)

    def _framed(self, packet: Packet, connection: threading.Event, *, wait: bool) -> list[bytes] | None:
        """The message of a chunk, its payload on its way into the ring where there is one; [] where the stream ends,
        None where there is no room now and one does not wait."""
        with self._framing:  # a connection that broke may be at this very chunk
            try:
                return [] if connection.is_set() else self._put(packet, connection, wait=wait)
            except WeightUpdateError as error:
                self._fail(error)
                return []

    def _put(self, packet: Packet, connection: threading.Event, *, wait: bool) -> list[bytes] | None:
        ring = self._ring
        if ring is None or packet.payload_bytes > ring.num_bytes // 2 or not packet.payload_bytes:
            return packet.messages
        with self._state:
            message = self._placed.get(packet.sequence)
            if message is not None:  # sent before, and the ring still holds it
                return [message]
            at = self._room(ring, packet.payload_bytes, connection) if wait else ring.take(packet.payload_bytes)
        if at is None:
            return [] if wait else None
        message = ring.put(packet, at)
        with self._state:
            self._placed[packet.sequence] = message
        return [message]

    def _room(self, ring: RingWriter, num_bytes: int, connection: threading.Event) -> int | None:
        """Where the payload goes, once acknowledgements have made room for it."""
        found: list[int] = []

        def taken() -> bool:
            at = ring.take(num_bytes)
            found.extend([] if at is None else [at])
            return bool(found)

        self._state.wait_for(lambda: self._error or connection.is_set() or taken())
        return found[0] if found else None


__all__ = ["StageStream"]
