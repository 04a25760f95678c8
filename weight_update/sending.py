"""One push on its way: streams to the ranks that own some of it, a door for every set of rows, and what goes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from quant.formats import TensorSpec
from sharding.routes import Destination, destinations

from .base import Changes, Whole
from .delta import BlobSize, Patch, RankDelta, cut, pack
from .door import Door
from .manifest import Manifest
from .stream import StageStream

Sent = Callable[[int], None]  # told the bytes that were queued since the last call
Packed = tuple[bytes, BlobSize]


def destinations_of(ranks: Sequence[Any]) -> list[Destination]:
    """The rows that actor ranks own (RankSpec messages); ranks that own the same ones are one destination."""
    starts = [np.array(rank.row_start, np.int64) for rank in ranks]
    stops = [np.array(rank.row_stop, np.int64) for rank in ranks]
    return destinations(starts, stops)


class Streams:
    """Open streams and their doors; leaving the block waits until every rank has all, or cancels on an error."""

    def __init__(self, streams: Sequence[StageStream], to: Sequence[Destination]) -> None:
        self._streams = streams
        self.doors = [Door(each, [streams[i] for i in each.ranks]) for each in to]

    def __enter__(self) -> Streams:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                for stream in self._streams:
                    stream.finish()
        except BaseException:
            self.cancel()
            raise
        if kind is not None:
            self.cancel()

    def cancel(self) -> None:
        """Drop all streams; whoever sends or waits gets an error."""
        for stream in self._streams:
            stream.cancel()

    @property
    def ways(self) -> list[str]:
        """How the bytes went to each rank for which there were some."""
        return [stream.way for stream in self._streams if stream.is_open]

    @property
    def wire_bytes(self) -> int:
        return sum(stream.wire_bytes for stream in self._streams)


def send_whole(whole: Whole, doors: Sequence[Door], sent: Sent) -> None:
    """Every row to the ranks that own it."""
    for block in whole.blocks():
        for door in doors:
            door.send(block, whole.plan.columns)
        sent(block.data.numel())
    for door in doors:
        door.flush()


def pack_for(changes: Changes, manifest: Manifest, to: Sequence[Destination]) -> list[Packed]:
    """One blob a destination, with the patches of its rows."""
    specs = changes.plan.specs
    indices = [manifest.index[spec.name] for spec in specs]
    return [pack(_cut_to(each, changes.patches, specs, indices)) for each in to]


def _cut_to(
    to: Destination, patches: Sequence[Patch], specs: Sequence[TensorSpec], indices: Sequence[int]
) -> list[Patch]:
    found = []
    for patch in patches:
        index, row_bytes = indices[patch.tensor], specs[patch.tensor].row_bytes
        part = cut(patch, int(to.row_start[index]) * row_bytes, int(to.row_stop[index]) * row_bytes)
        found += [part] if part is not None else []
    return found


def send_packed(packed: Sequence[Packed], trainer_rank: int, doors: Sequence[Door], sent: Sent) -> None:
    """Each destination's blob."""
    for door, (blob, _) in zip(doors, packed, strict=True):
        door.add(trainer_rank, 0, memoryview(blob))
        door.flush()
        sent(len(blob))


def announced(ranks: Sequence[Any], to: Sequence[Destination], sizes: Sequence[Sequence[BlobSize]]) -> list[RankDelta]:
    """What every actor rank gets; sizes: by trainer rank, then destination."""
    return [
        RankDelta(replica=ranks[i].replica, rank=ranks[i].rank, blobs=tuple(of_trainer[d] for of_trainer in sizes))
        for d, destination in enumerate(to)
        for i in destination.ranks
    ]
