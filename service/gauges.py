"""What a rank holds besides weights, as its coordinator and operators see it: streams, staging memory, digests."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from protos import transfuse_pb2 as pb
from weight_update.digest import Lanes

if TYPE_CHECKING:
    from .rank import RankServer


@dataclass(slots=True, kw_only=True)
class OpenStream:
    """One trainer rank's stream to this rank. Bytes are payload; one thread writes, others may read."""

    trainer_rank: int
    peer: str
    credit_bytes: int
    received_bytes: int = 0
    since_s: float = field(default_factory=time.monotonic)

    def status(self) -> pb.StreamStatus:
        """As others see it."""
        return pb.StreamStatus(
            trainer_rank=self.trainer_rank,
            received_bytes=self.received_bytes,
            credit_bytes=self.credit_bytes,
            seconds=time.monotonic() - self.since_s,
            peer=self.peer,
        )


class Gauges:
    """What changes while a rank takes a push. digest: of its rows as they were read back, None where some never were;
    it is looked up at a publish, since a look while bytes are written would wait for them."""

    def __init__(self) -> None:
        self._streams: dict[int, OpenStream] = {}
        self.digest: Lanes | None = None

    @contextmanager
    def stream(self, trainer_rank: int, peer: str, credit_bytes: int) -> Iterator[OpenStream]:
        """A stream that is open inside the block."""
        opened = OpenStream(trainer_rank=trainer_rank, peer=peer, credit_bytes=credit_bytes)
        self._streams[id(opened)] = opened
        try:
            yield opened
        finally:
            del self._streams[id(opened)]

    def streams(self) -> list[OpenStream]:
        """Those that are open now."""
        return list(self._streams.values())


def gauges_of(rank: RankServer) -> pb.RankGauges:
    """A rank's gauges; takes no lock that is held while bytes are written."""
    lanes = rank.gauges.digest
    is_open = rank.member.state != "idle"
    return pb.RankGauges(
        planned_bytes=rank.timing.planned_bytes if is_open else 0,
        staged_bytes=rank.receiver.staged_bytes,
        reserved_bytes=rank.receiver.reserved_bytes,
        streams=[each.status() for each in rank.gauges.streams()],
        draining=rank.draining,
        metrics="" if rank.pages is None else rank.pages.address,
        digest="" if lanes is None else "".join(f"{lane:016x}" for lane in lanes),
    )
