"""A rank passes on what a trainer sends it: rows go to one replica, and from its rank to those of the others.

    trainer -> 0.0 -> 1.0 -> 2.0        a chain: each has one stream in and one out, chunks as the trainer made them

A chunk is acknowledged once the next rank has acknowledged it, so an acknowledged one is everywhere, and what a trainer
may have in flight bounds what any rank of the chain holds back.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from queue import SimpleQueue

from google.protobuf.message import DecodeError

from protos import transfuse_pb2 as pb
from weight_update.channels import Channels
from weight_update.chunks import Chunk, Packet, StageOpen
from weight_update.errors import TransferError
from weight_update.links import AUTO, Place, allowed_of, choose
from weight_update.rings import RING_BYTES
from weight_update.stream import StageStream
from weight_update.values import from_place_proto

RETRY_S = 45.0  # how long a broken connection to the next rank is retried


class Passing:
    """What came on one stream on its way to the next rank; it outlives the connection on which it came."""

    def __init__(self, stream: StageStream) -> None:
        self._stream = stream
        self._order = threading.Lock()  # an old connection may be at its last chunk when a new one brings it again
        self._queued = 0

    @classmethod
    def begin(
        cls, opening: StageOpen, channels: Channels, ours: Place, peers: Collection[str], ticket: bytes
    ) -> Passing:
        """To the first rank that the opening names, which is told the others. ticket: this rank's own. TransferError
        unless they all own the same rows."""
        try:
            following, *others = [pb.RankSpec.FromString(each) for each in opening.onward]
        except DecodeError as error:
            raise TransferError(f"stage: the ranks to pass on to cannot be read: {error}") from None
        strangers = [each.address for each in (following, *others) if each.address not in peers]
        if strangers:
            raise TransferError(
                f"stage: {', '.join(strangers)} cannot be passed on to, the ranks with the same rows are"
                f" {', '.join(sorted(peers)) or 'none'}; describe the service again"
            )
        return cls(
            StageStream(
                channels(following.address),
                target=following.address,
                transaction=opening.transaction,
                epoch=opening.epoch,
                trainer_rank=opening.trainer_rank,
                retry_s=RETRY_S,
                ticket=ticket,
                link=choose(ours, from_place_proto(following.place), allowed_of(AUTO), following.address),
                ring_bytes=RING_BYTES,
                onward=others,
            )
        )

    @property
    def acknowledged(self) -> int:
        """The last chunk that all ranks behind this one have."""
        return self._stream.acknowledged

    def through(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """The same chunks, each once the next rank has it; meanwhile the following ones are taken and passed on."""
        taken: SimpleQueue[Chunk | BaseException | None] = SimpleQueue()

        def take() -> None:
            try:
                for chunk in chunks:
                    self._pass_on(chunk)
                    taken.put(chunk)
                taken.put(None)
            except BaseException as error:  # raised where the other end of the queue is
                taken.put(error)

        threading.Thread(target=take, name="passing", daemon=True).start()
        while (chunk := taken.get()) is not None:
            if isinstance(chunk, BaseException):
                raise chunk
            self._stream.wait(chunk.sequence)
            yield chunk

    def _pass_on(self, chunk: Chunk) -> None:
        with self._order:
            if chunk.sequence > self._queued:
                self._stream.send(Packet(chunk.sequence, chunk.tensor, chunk.offset, chunk.length, [chunk.payload]))
                self._queued = chunk.sequence

    def end(self) -> int:
        """Close the stream: what is on its way still is given up. Returns the wire bytes."""
        if self.acknowledged == self._queued:
            self._stream.finish()
        self._stream.cancel()  # whoever comes later gets an error
        return self._stream.wire_bytes
