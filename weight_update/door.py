"""The way out of a trainer rank: encoded rows become chunks on the streams of the ranks that own them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

from quant.formats import TensorSpec
from sharding.routes import Destination

from .chunks import Packet, Piece
from .columns import Block, Columns
from .packing import Packer
from .stream import StageStream


class Door:
    """Chunks for one set of rows, built once and streamed to the rank of every replica that owns them."""

    def __init__(self, destination: Destination, streams: Sequence[StageStream]) -> None:
        self.destination = destination
        self._streams = streams
        self._packer = Packer(min(stream.chunk_bytes for stream in streams))

    def add(self, tensor: int, offset: int, data: Piece) -> None:
        """Queue bytes of a tensor; chunks leave as they fill."""
        self._send(self._packer.add(tensor, offset, data))

    def send(self, block: Block, columns: Columns) -> None:
        """Queue the rows of a block that the ranks own."""
        index, row_bytes = columns.index[block.position], columns.row_bytes[block.position]
        start = np.maximum(block.first, self.destination.row_start[index])
        stop = np.minimum(block.first + block.num_rows, self.destination.row_stop[index])
        sizes = block.num_rows * row_bytes
        begin = np.cumsum(sizes) - sizes + (start - block.first) * row_bytes
        some = (start < stop) & (row_bytes > 0)
        numbers = (block.position, start * row_bytes, (stop - start) * row_bytes, begin)
        tensors, offsets, lengths, starts = (each[some] for each in numbers)
        self._send(self._packer.add_many(tensors, offsets, lengths, starts, block.data.numpy().data))

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
