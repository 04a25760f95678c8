"""Steps of a layout: row maps, and the byte order that ends them.

A row map says where row r of a checkpoint tensor goes among the rows of the kernel's matrix. A byte order says where a
row of that matrix and a run of its bytes lie in storage. Their composition stays a sum, so that any row or byte is
located, written and read back without touching another:

    byte (r, c) of the tensor -> row_offsets[r] + run_offsets[c // run_bytes] + c % run_bytes of the storage
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Offsets = NDArray[np.int64]


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


class RowMap(Protocol):
    """Bijection of the rows of a matrix, padding aside."""

    def num_rows(self, num_rows: int) -> int:
        """Rows after the step, of a matrix with `num_rows` before it."""

    def place(self, rows: Offsets, num_rows: int) -> Offsets:
        """Where the step moves `rows` of a matrix with `num_rows` rows."""


@dataclass(frozen=True, slots=True)
class Part:
    """The tensor is part `index` of `count` equal ones, stacked: 0 of 2 is the first half of a gated pair."""

    index: int
    count: int = 2

    def num_rows(self, num_rows: int) -> int:
        return num_rows * self.count

    def place(self, rows: Offsets, num_rows: int) -> Offsets:
        return rows + self.index * num_rows


@dataclass(frozen=True, slots=True)
class PadRows:
    """Zero rows at the end, up to a multiple."""

    multiple: int

    def num_rows(self, num_rows: int) -> int:
        return round_up(num_rows, self.multiple)

    def place(self, rows: Offsets, num_rows: int) -> Offsets:
        return rows


@dataclass(frozen=True, slots=True)
class GatedInterleave:
    """Chunks of both halves in turn. chunk 1: first, second, first, ... as the TRT-LLM gated GEMM wants them."""

    chunk: int = 1

    def num_rows(self, num_rows: int) -> int:
        return num_rows

    def place(self, rows: Offsets, num_rows: int) -> Offsets:
        half, row = np.divmod(rows, num_rows // 2)
        index, within = np.divmod(row, self.chunk)
        return (2 * index + half) * self.chunk + within


@dataclass(frozen=True, slots=True)
class SwapHalves:
    """The second half first: [gate; up] fused in one checkpoint tensor, for a kernel that wants up first."""

    def num_rows(self, num_rows: int) -> int:
        return num_rows

    def place(self, rows: Offsets, num_rows: int) -> Offsets:
        return (rows + num_rows // 2) % max(1, num_rows)


@dataclass(frozen=True, slots=True)
class ShuffleRows:
    """flashinfer's shuffle_matrix_a: rows dealt round inside blocks of 32 (or 16).

    The library states the gather, out[32b + 8i + j] = in[32b + 4j + i]; here is where a row goes.
    """

    epilogue_tile_m: int = 128

    def num_rows(self, num_rows: int) -> int:
        return num_rows

    def place(self, rows: Offsets, num_rows: int) -> Offsets:
        block = 32 if self.epilogue_tile_m % 128 == 0 else 16
        base, within = rows // block * block, rows % block
        deal = block // 8
        return base + 8 * (within % deal) + within // deal


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """Where the rows of a tensor and the runs of a row start, and the bytes of the padded matrix they are part of.

    dims: the padded matrix as its order lays it out, the last dim in bytes. column_pitch: bytes from one column to the
    next where the order puts the rows of a column side by side, 0 elsewhere. `locate` fills in the rest:
    words: every run is one word of 4 bytes at a multiple of 4; first, last: the tensor lies in bytes [first, last).
    """

    rows: Offsets
    runs: Offsets
    run_bytes: int
    dims: tuple[int, ...]
    column_pitch: int = 0

    words: bool = False
    first: int = 0
    last: int = 0

    @property
    def num_bytes(self) -> int:
        return math.prod(self.dims)

    def span(self, row0: int, row1: int) -> tuple[int, int]:
        """The bytes [first, last) that hold rows [row0, row1), at least one."""
        rows = self.rows[row0:row1]
        return int(rows.min()), int(rows.max() + self.runs.max()) + self.run_bytes


class Order(Protocol):
    """How a matrix of rows becomes bytes."""

    def __hash__(self) -> int: ...

    def locate(self, rows: Offsets, num_rows: int, row_bytes: int) -> Located:
        """Where `rows` of a matrix of num_rows x row_bytes lie."""


@dataclass(frozen=True, slots=True)
class RowMajor:
    """One row after the other, each padded with zeros to a multiple of bytes."""

    multiple: int = 1

    def locate(self, rows: Offsets, num_rows: int, row_bytes: int) -> Located:
        pitch = round_up(row_bytes, self.multiple)
        runs = np.zeros(1, np.int64)
        return Located(rows=rows * pitch, runs=runs, run_bytes=row_bytes, dims=(num_rows, pitch))


@dataclass(frozen=True, slots=True)
class Swizzle128x4:
    """cuBLAS' block scaling factor layout: atoms of 128 rows x 4 columns; row r at 16 (r % 32) + 4 (r // 32).

    Rows are padded to 128 and columns to 4, with zeros.
    """

    def locate(self, rows: Offsets, num_rows: int, row_bytes: int) -> Located:
        pitch = round_up(row_bytes, 4)
        run_bytes = math.gcd(row_bytes, 4)
        column = np.arange(0, row_bytes, run_bytes, dtype=np.int64)
        return Located(
            rows=rows // 128 * (128 * pitch) + rows % 32 * 16 + rows % 128 // 32 * 4,
            runs=column // 4 * 512 + column % 4,
            run_bytes=run_bytes,
            dims=(round_up(num_rows, 128), pitch),
        )


@dataclass(frozen=True, slots=True)
class Swizzle8x4:
    """The scale layout of low-latency activations: atoms of 8 rows x 4 columns, padded with zeros like 128x4."""

    def locate(self, rows: Offsets, num_rows: int, row_bytes: int) -> Located:
        pitch = round_up(row_bytes, 4)
        run_bytes = math.gcd(row_bytes, 4)
        column = np.arange(0, row_bytes, run_bytes, dtype=np.int64)
        return Located(
            rows=rows // 8 * (8 * pitch) + rows % 8 * 4,
            runs=column // 4 * 32 + column % 4,
            run_bytes=run_bytes,
            dims=(round_up(num_rows, 8), pitch),
        )


@dataclass(frozen=True, slots=True)
class BlockMajor:
    """Blocks of columns one after the other, each holding its bytes of every row: [row bytes / block, rows, block].

    flashinfer's BlockMajorK. Every row must be whole blocks.
    """

    block_bytes: int = 128

    def locate(self, rows: Offsets, num_rows: int, row_bytes: int) -> Located:
        num_blocks = row_bytes // self.block_bytes
        return Located(
            rows=rows * self.block_bytes,
            runs=np.arange(num_blocks, dtype=np.int64) * (num_rows * self.block_bytes),
            run_bytes=self.block_bytes,
            dims=(num_blocks, num_rows, self.block_bytes),
        )


@dataclass(frozen=True, slots=True)
class Transposed:
    """Columns become rows, in memory: [columns, rows] of items of `item_bytes`."""

    item_bytes: int = 1

    def locate(self, rows: Offsets, num_rows: int, row_bytes: int) -> Located:
        num_items = row_bytes // self.item_bytes
        return Located(
            rows=rows * self.item_bytes,
            runs=np.arange(num_items, dtype=np.int64) * (num_rows * self.item_bytes),
            run_bytes=self.item_bytes,
            dims=(num_items, num_rows * self.item_bytes),
            column_pitch=num_rows * self.item_bytes,
        )


@lru_cache(maxsize=1024)
def locate(maps: tuple[RowMap, ...], order: Order, num_rows: int, row_bytes: int) -> Located:
    """Where the rows of a tensor lie after the row maps, in an order. Shared, hence read-only."""
    rows, total = np.arange(num_rows, dtype=np.int64), num_rows
    for step in maps:
        rows, total = step.place(rows, total), step.num_rows(total)
    located = order.locate(rows, total, row_bytes)
    for offsets in (located.rows, located.runs):
        offsets.setflags(write=False)
    words = located.run_bytes == 4 and not (located.rows % 4).any() and not (located.runs % 4).any()
    first, last = located.span(0, num_rows) if num_rows else (0, 0)
    return replace(located, words=words, first=first, last=last)
