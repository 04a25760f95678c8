"""Bytes of tensors become chunks: pieces are collected until a chunk is full."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .chunks import CHUNK_BYTES, encode_chunk

CHUNK_PIECES = 1 << 16  # a piece costs 16 bytes of index: a chunk of tiny pieces stays below the message limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Framed:
    """One serialized chunk."""

    sequence: int
    message: bytes
    payload_bytes: int


class Packer:
    """Chunks of one stream, numbered from 1. What is added is not copied before its chunk is full."""

    def __init__(self) -> None:
        self._sequence = 0
        self._tensors: list[int] = []
        self._offsets: list[int] = []
        self._pieces: list[memoryview] = []
        self._bytes = 0

    def add(self, tensor: int, offset: int, data: memoryview) -> Iterator[Framed]:
        """Take bytes of a tensor; yields the chunks that are full."""
        while len(data):
            take = min(len(data), CHUNK_BYTES - self._bytes)
            self._tensors.append(tensor)
            self._offsets.append(offset)
            self._pieces.append(data[:take])
            self._bytes += take
            offset, data = offset + take, data[take:]
            if self._bytes == CHUNK_BYTES or len(self._pieces) == CHUNK_PIECES:
                yield from self.flush()

    def flush(self) -> Iterator[Framed]:
        """The last chunk, where there is one."""
        if not self._pieces:
            return
        self._sequence += 1
        lengths = np.array([len(piece) for piece in self._pieces], np.uint32)
        tensors, offsets = np.array(self._tensors, np.uint32), np.array(self._offsets, np.uint64)
        message = encode_chunk(self._sequence, tensors, offsets, lengths, self._pieces)
        packed = Framed(sequence=self._sequence, message=message, payload_bytes=self._bytes)
        self._tensors, self._offsets, self._pieces, self._bytes = [], [], [], 0
        yield packed
