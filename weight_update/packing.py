"""Bytes of tensors become chunks: pieces are collected until a chunk is full."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .chunks import CHUNK_BYTES, Packet, Piece

CHUNK_PIECES = 1 << 16  # a piece costs 16 bytes of index: a chunk of tiny pieces stays below the message limit


class Packer:
    """Chunks of one stream, numbered from 1. What is added is not copied here: it stays as it is until it was sent."""

    def __init__(self, chunk_bytes: int = 0) -> None:
        self.chunk_bytes = chunk_bytes or CHUNK_BYTES
        self._sequence = 0
        self._tensors: list[int] = []
        self._offsets: list[int] = []
        self._pieces: list[Piece] = []
        self._bytes = 0

    def add(self, tensor: int, offset: int, data: Piece) -> Iterator[Packet]:
        """Take bytes of a tensor; yields the chunks that are full."""
        while len(data):
            take = min(len(data), self.chunk_bytes - self._bytes)
            self._tensors.append(tensor)
            self._offsets.append(offset)
            self._pieces.append(data[:take])
            self._bytes += take
            offset, data = offset + take, data[take:]
            if self._bytes == self.chunk_bytes or len(self._pieces) == CHUNK_PIECES:
                yield from self.flush()

    def number(self) -> int:
        """Of the next chunk."""
        self._sequence += 1
        return self._sequence

    def flush(self) -> Iterator[Packet]:
        """The last chunk, where there is one."""
        if not self._pieces:
            return
        lengths = np.array([len(piece) for piece in self._pieces], np.uint32)
        tensors, offsets = np.array(self._tensors, np.uint32), np.array(self._offsets, np.uint64)
        packet = Packet(self.number(), tensors, offsets, lengths, self._pieces)
        self._tensors, self._offsets, self._pieces, self._bytes = [], [], [], 0
        yield packet
