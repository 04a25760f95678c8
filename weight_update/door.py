"""The way out of a trainer rank: encoded rows become chunks on the streams of the ranks that own them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from quant.formats import TensorSpec
from sharding.routes import Destination

from .chunks import CHUNK_BYTES, encode_chunk
from .transport import StageStream

CHUNK_PIECES = 1 << 16  # a piece costs 16 bytes of index: a chunk of tiny pieces stays below the message limit


class Door:
    """Chunks for one set of rows, built once and streamed to the rank of every replica that owns them."""

    def __init__(self, destination: Destination, streams: Sequence[StageStream]) -> None:
        self.destination = destination
        self._streams = streams
        self._sequence = 0
        self._tensors: list[int] = []
        self._offsets: list[int] = []
        self._pieces: list[memoryview] = []
        self._bytes = 0

    def add(self, tensor: int, offset: int, data: memoryview) -> None:
        """Queue bytes of a tensor; chunks leave as they fill."""
        while len(data):
            take = min(len(data), CHUNK_BYTES - self._bytes)
            self._tensors.append(tensor)
            self._offsets.append(offset)
            self._pieces.append(data[:take])
            self._bytes += take
            offset, data = offset + take, data[take:]
            if self._bytes == CHUNK_BYTES or len(self._pieces) == CHUNK_PIECES:
                self.flush()

    def flush(self) -> None:
        """Send what is queued."""
        if not self._pieces:
            return
        self._sequence += 1
        lengths = np.array([len(piece) for piece in self._pieces], np.uint32)
        tensors, offsets = np.array(self._tensors, np.uint32), np.array(self._offsets, np.uint64)
        message = encode_chunk(self._sequence, tensors, offsets, lengths, self._pieces)
        for stream in self._streams:
            stream.send(self._sequence, message, self._bytes)
        self._tensors, self._offsets, self._pieces, self._bytes = [], [], [], 0


def route(door: Door, position: int, index: int, spec: TensorSpec, first: int, data: Tensor) -> None:
    """Give a door the part of these rows that its ranks own."""
    start = max(first, int(door.destination.row_start[index]))
    stop = min(first + data.shape[0], int(door.destination.row_stop[index]))
    if start < stop:
        rows = data[start - first : stop - first]
        door.add(position, start * spec.row_bytes, rows.reshape(-1).numpy().data)
