"""Writes of one transaction, all together: those of a few bytes, of which a model may have tens of thousands, in one
call each of torch and of the digest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .digest import Digests, Ints, digest_many
from .live import BLOCK_BYTES, Copy, Write
from .staging import ALIGN_BYTES, StagingBuffer

SMALL_BYTES = 16 << 10  # a call of its own costs as much as a copy of so many bytes


class Writes:
    """Writes in the order of a transaction, and of each: its rows, bytes of a row, first row and key, [n]."""

    def __init__(self, writes: Sequence[Write]) -> None:
        self.all = writes
        self.num_rows = np.array([write.num_rows for write in writes], np.int64)
        self.row_bytes = np.array([write.placement.tensor.row_bytes for write in writes], np.int64)
        self.row0 = np.array([write.row0 for write in writes], np.int64)
        self.keys = np.array([write.key for write in writes], np.uint64)
        self.block_bytes = block_bytes(writes)
        is_small = [isinstance(write, Copy) and 0 < write.flat.numel() <= SMALL_BYTES for write in writes]
        self._large: list[int] = np.flatnonzero(np.logical_not(is_small)).tolist()
        self._small = np.flatnonzero(is_small)
        self._flats = [write.flat for write in writes if isinstance(write, Copy) and write.flat.numel() <= SMALL_BYTES]

    def apply(self, staging: StagingBuffer) -> None:
        """Write what was staged in place."""
        for i in self._large:
            self.all[i].apply(staging.rows(i))
        if self._flats:
            torch._foreach_copy_(self._flats, staging.pieces(self._small))

    def staged(self, staging: StagingBuffer) -> Digests:
        """Digests of what was staged, [n, 2]."""
        return digest_many(staging.memory, staging.at, self.num_rows, self.row_bytes, self.row0, self.keys)

    def read_back(self, scratch: Tensor) -> Digests:
        """Digests of the live rows, [n, 2]. scratch: uint8 [block_bytes] on their device."""
        found = np.zeros((len(self.all), 2), np.uint64)
        for i in self._large:
            found[i] = self.all[i].digest(scratch)
        sizes = (self.num_rows * self.row_bytes)[self._small]
        start, ends = 0, np.cumsum(sizes)
        while start < len(sizes):
            before = int(ends[start - 1]) if start else 0
            stop = int(np.searchsorted(ends, before + len(scratch), "right"))
            lying = scratch[: int(ends[stop - 1]) - before]
            torch.cat(self._flats[start:stop], out=lying)
            found[self._small[start:stop]] = self._digests(lying, self._small[start:stop], sizes[start:stop])
            start = stop
        return found

    def _digests(self, memory: Tensor, some: Ints, sizes: Ints) -> Digests:
        """Of these writes, whose rows lie one after the other."""
        num_rows, row_bytes, row0 = (each[some] for each in (self.num_rows, self.row_bytes, self.row0))
        return digest_many(memory, np.cumsum(sizes) - sizes, num_rows, row_bytes, row0, self.keys[some])


def block_bytes(writes: Sequence[Write]) -> int:
    """Scratch for one block of rows, in whole cache lines."""
    largest = max([BLOCK_BYTES, *(write.placement.tensor.row_bytes for write in writes)])
    return -(-largest // ALIGN_BYTES) * ALIGN_BYTES
