"""The way out of a trainer rank: encoded rows become chunks on the streams of the ranks that own them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from quant.formats import TensorSpec
from sharding.routes import Destination

from .chunks import Packet, Piece
from .gathering import Located, gathered
from .packing import Packer
from .stream import StageStream


class Door:
    """Chunks for one set of rows, built once and streamed to the rank of every replica that owns them."""

    def __init__(self, destination: Destination, streams: Sequence[StageStream]) -> None:
        self.destination = destination
        self._streams = streams
        self._packer = Packer(min(stream.chunk_bytes for stream in streams))
        self._gathering: Any = None  # stream of the device on which pieces are brought together

    def add(self, tensor: int, offset: int, data: Piece) -> None:
        """Queue bytes of a tensor; chunks leave as they fill."""
        self._send(self._packer.add(tensor, offset, data))

    def add_located(self, located: Located) -> None:
        """Queue pieces in a GPU's memory; all of them leave, in chunks of their own."""
        self.flush()
        if len(located.tensor):
            self._gathering = self._gathering or torch.cuda.Stream(located.device)  # type: ignore[no-untyped-call]
            self._send(gathered(located, self._packer.chunk_bytes, self._packer.number, self._gathering))

    def flush(self) -> None:
        """Send what is queued."""
        self._send(self._packer.flush())

    def _send(self, packets: Iterable[Packet]) -> None:
        for packet in packets:
            for stream in self._streams:
                stream.send(packet)


def route(door: Door, position: int, index: int, spec: TensorSpec, first: int, data: Tensor) -> None:
    """Give a door the part of these rows that its ranks own."""
    start = max(first, int(door.destination.row_start[index]))
    stop = min(first + data.shape[0], int(door.destination.row_stop[index]))
    if start < stop:
        rows = data[start - first : stop - first]
        flat = rows.reshape(-1)
        door.add(position, start * spec.row_bytes, flat if flat.is_cuda else flat.numpy().data)
