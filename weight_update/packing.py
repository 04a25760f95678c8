"""Bytes of tensors become chunks: pieces are collected until a chunk is full."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .chunks import CHUNK_BYTES, Packet, Piece
from .digest import Ints

CHUNK_PIECES = 1 << 16  # a piece costs 16 bytes of index: a chunk of tiny pieces stays below the message limit


class Packer:
    """Chunks of one stream, numbered from 1. What is added is not copied here: it stays as it is until it was sent."""

    def __init__(self, chunk_bytes: int = 0) -> None:
        self.chunk_bytes = chunk_bytes or CHUNK_BYTES
        self._sequence = 0
        self._tensors: list[int] = []
        self._offsets: list[int] = []
        self._lengths: list[int] = []
        self._pieces: list[Piece] = []
        self._bytes = 0

    def add(self, tensor: int, offset: int, data: Piece) -> Iterator[Packet]:
        """Take bytes of a tensor; yields the chunks that are full."""
        while len(data):
            take = min(len(data), self.chunk_bytes - self._bytes)
            self._tensors.append(tensor)
            self._offsets.append(offset)
            self._lengths.append(take)
            self._pieces.append(data[:take])
            self._bytes += take
            offset, data = offset + take, data[take:]
            if self._bytes == self.chunk_bytes or len(self._tensors) == CHUNK_PIECES:
                yield from self.flush()

    def number(self) -> int:
        """Of the next chunk."""
        self._sequence += 1
        return self._sequence

    def add_many(self, tensors: Ints, offsets: Ints, lengths: Ints, starts: Ints, data: memoryview) -> Iterator[Packet]:
        """The same of many tensors: bytes [starts[i], starts[i] + lengths[i]) of `data` are tensors[i]'s. Starts
        increase; what lies side by side there is one piece."""
        while len(tensors):
            room = self.chunk_bytes - self._bytes
            fit = int(np.searchsorted(np.cumsum(lengths), room, "right"))
            fit = min(fit, CHUNK_PIECES - len(self._tensors))
            if not fit:  # the first one alone is more than there is room for
                at = int(starts[0])
                yield from self.add(int(tensors[0]), int(offsets[0]), data[at : at + int(lengths[0])])
                fit = 1
            else:
                self._take(tensors[:fit], offsets[:fit], lengths[:fit], starts[:fit], data)
            tensors, offsets, lengths, starts = tensors[fit:], offsets[fit:], lengths[fit:], starts[fit:]
            if self._bytes == self.chunk_bytes or len(self._tensors) == CHUNK_PIECES:
                yield from self.flush()

    def _take(self, tensors: Ints, offsets: Ints, lengths: Ints, starts: Ints, data: memoryview) -> None:
        self._tensors += tensors.tolist()
        self._offsets += offsets.tolist()
        self._lengths += lengths.tolist()
        self._bytes += int(lengths.sum())
        stops = starts + lengths
        cuts = np.flatnonzero(starts[1:] != stops[:-1])
        first, last = starts[np.append(0, cuts + 1)].tolist(), stops[np.append(cuts, -1)].tolist()
        self._pieces += [data[begin:end] for begin, end in zip(first, last, strict=True)]

    def flush(self) -> Iterator[Packet]:
        """The last chunk, where there is one."""
        if not self._pieces:
            return
        tensors, offsets = np.array(self._tensors, np.uint32), np.array(self._offsets, np.uint64)
        lengths = np.array(self._lengths, np.uint32)
        packet = Packet(self.number(), tensors, offsets, lengths, self._pieces)
        self._tensors, self._offsets, self._lengths, self._pieces, self._bytes = [], [], [], [], 0
        yield packet
