"""The way out of a trainer rank: encoded rows become chunks on the streams of the ranks that own them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from sharding.routes import Destination

from .chunks import Packet, Piece
from .columns import Block, Columns
from .gathering import Gathered, Load
from .packing import Packer
from .stream import StageStream


class Door:
    """Chunks for one set of rows, built once and streamed to the rank of every replica that owns them."""

    def __init__(self, destination: Destination, streams: Sequence[StageStream]) -> None:
        self.destination = destination
        self._streams = streams
        self._packer = Packer(min(stream.chunk_bytes for stream in streams))
        self._numbers: tuple[Columns, Any] | None = None  # of the tensors of a push, for these ranks
        self._side: Any = None  # stream of the device on which pieces are brought together

    def add(self, tensor: int, offset: int, data: Piece) -> None:
        """Queue bytes of a tensor; chunks leave as they fill."""
        self._send(self._packer.add(tensor, offset, data))

    @property
    def chunk_bytes(self) -> int:
        """Payload of a chunk that suits the streams."""
        return self._packer.chunk_bytes

    def add_loads(self, loads: Sequence[Load], ready: Any) -> None:
        """Queue chunks that lie in a GPU's memory, as they are. ready: an event after which they are there."""
        self.flush()
        for load in loads:
            self._side = self._side or torch.cuda.Stream(load.device)  # type: ignore[no-untyped-call]
            self._send([Gathered(self._packer.number(), load, ready, self._side)])

    def send(self, block: Block, columns: Columns) -> None:
        """Queue the rows of a block that the ranks own."""
        index, row_bytes = columns.index[block.position], columns.row_bytes[block.position]
        start = np.maximum(block.first, self.destination.row_start[index])
        stop = np.minimum(block.first + block.num_rows, self.destination.row_stop[index])
        sizes = block.num_rows * row_bytes
        begin = np.cumsum(sizes) - sizes + (start - block.first) * row_bytes
        some = (start < stop) & (row_bytes > 0)
        entries = (self._numbered(columns)[block.position], start * row_bytes, (stop - start) * row_bytes, begin)
        tensors, offsets, lengths, starts = (each[some] for each in entries)
        self._send(self._packer.add_many(tensors, offsets, lengths, starts, block.data.numpy().data))

    def _numbered(self, columns: Columns) -> Any:
        if self._numbers is None or self._numbers[0] is not columns:
            self._numbers = columns, self.destination.numbers(columns.index)
        return self._numbers[1]

    def flush(self) -> None:
        """Send what is queued."""
        self._send(self._packer.flush())

    def _send(self, packets: Iterable[Packet]) -> None:
        for packet in packets:
            for stream in self._streams:
                stream.send(packet)
