"""One push on its way: streams to the ranks that own some of it, a door for every set of rows, and what goes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sharding.routes import Destination, destinations

from .base import Changes, Whole
from .columns import Columns
from .delta import BlobSize, Patch, RankDelta, cut, pack, patches_of
from .device_base import FormChanges, FormWhole
from .door import Door
from .stream import StageStream

Sent = Callable[[int], None]  # told the bytes that were queued since the last call
Packed = tuple[bytes | Tensor, BlobSize]
Ints = npt.NDArray[np.int64]


def destinations_of(ranks: Sequence[Any]) -> list[Destination]:
    """The rows that actor ranks own (RankSpec messages); ranks that own the same ones are one destination."""
    starts = [np.array(rank.row_start, np.int64) for rank in ranks]
    stops = [np.array(rank.row_stop, np.int64) for rank in ranks]
    return destinations(starts, stops)


class Streams:
    """Open streams to each destination and its door; leaving the block waits until every rank has all, or cancels on
    an error."""

    def __init__(self, to: Sequence[Destination], streams: Sequence[Sequence[StageStream]]) -> None:
        self._streams = [stream for each in streams for stream in each]
        self.doors = [Door(each, opened) for each, opened in zip(to, streams, strict=True)]

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
    if isinstance(whole, FormWhole):
        send_form(whole, doors, sent)
        return
    for block in whole.blocks():
        for door in doors:
            door.send(block, whole.plan.columns)
        sent(block.data.numel())
    for door in doors:
        door.flush()


def send_form(whole: FormWhole, doors: Sequence[Door], sent: Sent) -> None:
    """The same of rows in a form: a step of many tensors at a time, while the next one is encoded."""
    parts = whole.form.plan.parts
    loads = [whole.form.loads(door.destination, door.chunk_bytes) for door in doors]
    sizes = parts.num_rows * parts.row_bytes
    for number, (chosen, ready) in enumerate(whole.steps()):
        for door, each in zip(doors, loads, strict=True):
            door.add_loads(each[number], ready)
        sent(int(sizes[chosen].sum()))


def pack_for(
    changes: Changes | FormChanges, to: Sequence[Destination], on_device: Sequence[bool]
) -> list[Packed]:
    """One blob a destination, with the patches of its rows; changes on a device stay there, unpacked, for destinations
    whose links go from device to device."""
    specs, columns = changes.plan.specs, changes.plan.columns
    if isinstance(changes, Changes):
        return [pack(_cut_to(each, changes.patches, columns)) for each in to]
    packed: list[Packed] = []
    for each, stays in zip(to, on_device, strict=True):
        device = changes.form.plan.device
        numbers = each.numbers(columns.index)
        rows = each.row_start[columns.index], each.row_stop[columns.index], columns.row_bytes, numbers
        owned = changes.delta.owned(*(torch.from_numpy(column).to(device) for column in rows))
        told = [specs[i] for i in np.flatnonzero(numbers >= 0).tolist()]
        packed.append(owned.blob() if stays else pack(patches_of(owned, told)))
    return packed


def _cut_to(to: Destination, patches: Sequence[Patch], columns: Columns) -> list[Patch]:
    found, numbers = [], to.numbers(columns.index)
    for patch in patches:
        index, row_bytes = columns.index[patch.tensor], int(columns.row_bytes[patch.tensor])
        part = cut(patch, int(to.row_start[index]) * row_bytes, int(to.row_stop[index]) * row_bytes)
        found += [replace(part, tensor=int(numbers[patch.tensor]))] if part is not None else []
    return found


def send_packed(packed: Sequence[Packed], trainer_rank: int, doors: Sequence[Door], sent: Sent) -> None:
    """Each destination's blob."""
    for door, (blob, _) in zip(doors, packed, strict=True):
        door.add(trainer_rank, 0, blob if isinstance(blob, Tensor) else memoryview(blob))
        door.flush()
        sent(len(blob))


def announced(ranks: Sequence[Any], to: Sequence[Destination], sizes: Sequence[Sequence[BlobSize]]) -> list[RankDelta]:
    """What every actor rank gets; sizes: by trainer rank, then destination."""
    return [
        RankDelta(replica=ranks[i].replica, rank=ranks[i].rank, blobs=tuple(of_trainer[d] for of_trainer in sizes))
        for d, destination in enumerate(to)
        for i in destination.ranks
    ]
