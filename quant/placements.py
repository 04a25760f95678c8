"""Placements: where one checkpoint tensor lies in one storage, written and read by any subset of its rows.

    apply_rows(placement, rows, row0, local_bytes, base)
    invert_rows(placement, row0, n, local_bytes, base)
    apply_bytes(placement, positions, values, local_bytes, base)

The first writes into a rank's shard, in place; the second reads the same rows back, exactly; the third writes single
bytes. None of them reads or touches any other byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import kernels
from .formats import TensorSpec
from .steps import Located, Offsets, RowMajor, locate

SCRATCH_ROWS = 128  # a tile: what is held of rows whose bytes change, or turn, on the way
PIECE_WORDS = 1 << 14  # read at a time by the twin, whose index takes 64 bytes a word
MAX_JUMPS = 8  # rows of more experts than this in one tile are moved byte by byte


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placement:
    """Where one tensor lies in one storage. `located` is shared between tensors that differ by `origin` only.

    swap_nibbles: the two codes of a byte change places on the way, both ways.
    """

    tensor: TensorSpec
    storage: str
    origin: int
    located: Located
    unit_bytes: int
    swap_nibbles: bool = False

    @property
    def row_offsets(self) -> Offsets:
        """First byte of every row in the whole storage."""
        return self.located.rows + self.origin

    @property
    def run_offsets(self) -> Offsets:
        return self.located.runs

    @property
    def run_bytes(self) -> int:
        return self.located.run_bytes

    def rows_of_units(self, unit_start: int, unit_stop: int) -> tuple[int, int]:
        """The rows [start, stop) that lie in units [unit_start, unit_stop) of the storage."""
        units = self.row_offsets // self.unit_bytes
        inside = np.flatnonzero((units >= unit_start) & (units < unit_stop))
        start = int(inside[0]) if len(inside) else int(np.count_nonzero(units < unit_start))
        if len(inside) and inside[-1] - start + 1 != len(inside):
            raise ValueError(
                f"{self.tensor.name}: rows in units [{unit_start}, {unit_stop}) of {self.storage} are not contiguous; "
                f"shard this storage where whole runs of rows end: {self._cuts()}"
            )
        return start, start + len(inside)

    def _cuts(self) -> str:
        """The units before which lie the first rows of the tensor and no others."""
        units = self.row_offsets // self.unit_bytes
        before, after = np.maximum.accumulate(units)[:-1], np.minimum.accumulate(units[::-1])[::-1][1:]
        cuts = np.unique(after[before < after]).tolist()
        shown = ", ".join(map(str, cuts[:8])) + (", ..." if len(cuts) > 8 else "")
        return f"before units {shown}" if cuts else "nowhere, so keep it whole on one rank"


def place_row_major(tensor: TensorSpec, storage: str) -> Placement:
    """The tensor is the storage: row-major, a row a unit."""
    located = locate((), RowMajor(), tensor.num_rows, tensor.row_bytes)
    return Placement(tensor=tensor, storage=storage, origin=0, located=located, unit_bytes=tensor.row_bytes)


def stack(name: str, placements: Sequence[Placement]) -> Placement:
    """Tensors of one storage as one, stacked along rows: every expert's rows in one call, whole layers at a time."""
    first = placements[0]
    origins = np.array([placement.origin for placement in placements], np.int64)
    if any(p.storage != first.storage or p.located is not first.located for p in placements):
        raise ValueError(f"{name}: tensors of several storages or shapes do not stack; stack each alike ones alone")
    rows = (origins[:, None] + first.located.rows).ravel()
    shape = (len(rows), *first.tensor.shape[1:])
    low, high = int(origins.min()), int(origins.max())
    located = replace(
        first.located,
        rows=rows,
        words=first.located.words and not (origins % 4).any(),
        first=first.located.first + low,
        last=first.located.last + high,
    )
    return replace(first, tensor=replace(first.tensor, name=name, shape=shape), origin=0, located=located)


def apply_rows(placement: Placement, src: Tensor, row0: int, local: Tensor, base: int) -> None:
    """Write rows [row0, row0 + n) of a tensor, uint8 [n, row_bytes], into the bytes of a shard.

    local: 1-D uint8, the bytes of the rank's shard of the storage; base: where the shard starts in the whole storage.
    """
    _check_rows(placement, src, row0, local, base)
    src, shift = src.contiguous(), placement.origin - base
    if not placement.swap_nibbles and not placement.located.column_pitch:
        kernels.scatter_rows(src, placement.located, row0, shift, local)
        return
    for start, stop in _pieces(placement, row0, len(src)):
        piece = swapped(src[start:stop]) if placement.swap_nibbles else src[start:stop]
        columns = _columns(placement, row0 + start, stop - start, shift, local)
        if columns is None:
            kernels.scatter_rows(piece, placement.located, row0 + start, shift, local)
        else:
            columns.copy_(_turned(piece, placement.run_bytes))


def invert_rows(placement: Placement, row0: int, n: int, local: Tensor, base: int, out: Tensor | None = None) -> Tensor:
    """Read rows [row0, row0 + n) of a tensor back from the bytes of a shard: uint8 [n, row_bytes]."""
    if out is None:
        out = torch.empty((n, placement.tensor.row_bytes), dtype=torch.uint8, device=local.device)
    _check_rows(placement, out, row0, local, base)
    located, shift = placement.located, placement.origin - base
    if not placement.swap_nibbles and not located.column_pitch:
        kernels.gather_rows(local, located, row0, shift, out)
        return out
    for start, stop in _pieces(placement, row0, n):
        piece, columns = out[start:stop], _columns(placement, row0 + start, stop - start, shift, local)
        if columns is None:
            kernels.gather_rows(local, located, row0 + start, shift, piece)
        else:
            items = columns.contiguous().view(len(columns), -1, placement.run_bytes)
            piece.view(len(piece), -1, placement.run_bytes).copy_(items.transpose(0, 1))
        if placement.swap_nibbles:
            piece.copy_(swapped(piece))
    return out


def apply_bytes(placement: Placement, positions: Offsets, values: Tensor, local: Tensor, base: int) -> None:
    """Write single bytes of a tensor: `values`, uint8 [n], at `positions` of its row-major bytes."""
    at = locate_bytes(placement, positions, local, base)
    local[at] = swapped(values) if placement.swap_nibbles else values


def invert_bytes(placement: Placement, positions: Offsets, local: Tensor, base: int) -> Tensor:
    """Read single bytes of a tensor, uint8 [n], at `positions` of its row-major bytes."""
    values = local[locate_bytes(placement, positions, local, base)]
    return swapped(values) if placement.swap_nibbles else values


class Words:
    """Words of 8 bytes of a tensor, little-endian, found once and read any number of times.

    numbers: word i of row r has the number r * words a row + i. The last word of a row is filled up with zeros. Rows
    are in the shard; nothing but the words is read.
    """

    def __init__(self, placement: Placement, numbers: Offsets, local: Tensor, base: int) -> None:
        _check_words(placement, numbers, local, placement.origin - base)
        self._placement, self._numbers, self._local, self._base = placement, numbers, local, base
        self._view: NDArray[np.uint64] | None = None
        if placement.tensor.row_bytes % 8 == 0 and placement.run_bytes % 8 == 0:
            at = kernels.locate_bytes(
                placement.located, placement.tensor.row_bytes, placement.origin - base, numbers * 8
            )
            self._view, self._at = kernels.word_view(local, at), at // 8

    @property
    def direct(self) -> tuple[NDArray[np.uint64], Offsets] | None:
        """Memory and places in it, where the words lie in it just as they are."""
        return None if self._view is None or self._placement.swap_nibbles else (self._view, self._at)

    def read(self) -> NDArray[np.uint64]:
        """The words as they are now."""
        placement, local, numbers = self._placement, self._local, self._numbers
        if self._view is not None:
            words = kernels.take_words(self._view, self._at)
            return _swapped_words(words) if placement.swap_nibbles else words
        row_bytes, shift = placement.tensor.row_bytes, placement.origin - self._base
        found = kernels.gather_words(local, placement.located, row_bytes, shift, numbers, placement.swap_nibbles)
        if found is not None:
            return found
        pieces = [
            _words_twin(placement, numbers[start : start + PIECE_WORDS], local, self._base)
            for start in range(0, len(numbers), PIECE_WORDS)
        ]
        return np.concatenate([np.empty(0, np.uint64), *pieces])


def _swapped_words(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    high = words & np.uint64(0xF0F0F0F0F0F0F0F0)
    return (high >> np.uint64(4)) | ((words ^ high) << np.uint64(4))


def _words_twin(placement: Placement, words: Offsets, local: Tensor, base: int) -> NDArray[np.uint64]:
    row_bytes = placement.tensor.row_bytes
    row, word = np.divmod(words, -(-row_bytes // 8))
    column = word[:, None] * 8 + np.arange(8)
    inside = column < row_bytes
    out = np.zeros(column.shape, np.uint8)
    positions = (row[:, None] * row_bytes + column)[inside]
    out[inside] = invert_bytes(placement, positions, local, base).cpu().numpy()
    return out.view("<u8").astype(np.uint64).ravel()


def _check_words(placement: Placement, words: Offsets, local: Tensor, shift: int) -> None:
    """Words are in the tensor, their rows in the shard; the loop that reads them checks no bounds."""
    spec, located = placement.tensor, placement.located
    per_row = -(-spec.row_bytes // 8)
    if not len(words):
        return
    low, high = int(words.min()), int(words.max())
    if not 0 <= low <= high < spec.num_rows * per_row:
        raise ValueError(f"{spec.name}: words {low}..{high} lie outside [0, {spec.num_rows * per_row})")
    first, last = located.first, located.last
    if first + shift < 0 or last + shift > local.numel():
        rows = located.rows[np.unique(words // per_row)]
        first, last = int(rows.min()), int(rows.max() + located.runs.max()) + located.run_bytes
    if first + shift < 0 or last + shift > local.numel():
        raise ValueError(
            f"{spec.name} in {placement.storage}: bytes [{first + shift}, {last + shift}) lie outside the shard's "
            f"[0, {local.numel()}); check row_start and shards"
        )


def swapped(packed: Tensor) -> Tensor:
    """Both codes of every byte in the other order; twice is the same bytes again."""
    low = packed << 4
    return low.bitwise_or_(packed >> 4)


def _pieces(placement: Placement, row0: int, n: int) -> Iterator[tuple[int, int]]:
    """Runs of at most a tile of rows [start, stop) from row0, half a tile where both halves of bytes are held; rows of
    a piece lie side by side where they do in their tile."""
    step = SCRATCH_ROWS // 2 if placement.swap_nibbles else SCRATCH_ROWS
    for start in range(0, n, step):
        stop = min(start + step, n)
        jumps = np.flatnonzero(np.diff(placement.located.rows[row0 + start : row0 + stop]) != placement.run_bytes) + 1
        few = placement.located.column_pitch and len(jumps) < MAX_JUMPS
        yield from pairwise([start, *(start + jumps if few else ()), stop])


def _columns(placement: Placement, row0: int, n: int, shift: int, local: Tensor) -> Tensor | None:
    """Where these rows lie as columns [items, n * item bytes], a view; None where they do not lie side by side."""
    located, item = placement.located, placement.run_bytes
    rows = located.rows[row0 : row0 + n]
    if not located.column_pitch or int(rows[-1] - rows[0]) != (n - 1) * item or (np.diff(rows) != item).any():
        return None
    first = local.storage_offset() + int(rows[0]) + shift
    return local.as_strided((len(located.runs), n * item), (located.column_pitch, 1), first)


def _turned(rows: Tensor, item: int) -> Tensor:
    """[n, row bytes] of items as [items, n * item bytes]."""
    if item == 1:
        return rows.t().contiguous()
    return rows.view(len(rows), -1, item).transpose(0, 1).contiguous().view(-1, len(rows) * item)


def locate_bytes(placement: Placement, positions: Offsets, local: Tensor, base: int) -> Tensor:
    """Where single bytes of a tensor lie in the shard: int64 [n]; what lies outside raises."""
    spec = placement.tensor
    positions = np.asarray(positions, np.int64)
    if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < spec.num_bytes:
        low, high = int(positions.min()), int(positions.max())
        raise ValueError(f"{spec.name}: bytes {low}..{high} lie outside [0, {spec.num_bytes}); check the positions")
    at = kernels.locate_bytes(placement.located, spec.row_bytes, placement.origin - base, positions)
    if len(at) and not 0 <= int(at.min()) <= int(at.max()) < local.numel():
        low, high = int(at.min()), int(at.max())
        raise ValueError(
            f"{spec.name} in {placement.storage}: bytes {low}..{high} lie outside the shard's [0, {local.numel()}); "
            "check row_start and shards"
        )
    return torch.from_numpy(at).to(local.device)


def _check_rows(placement: Placement, rows: Tensor, row0: int, local: Tensor, base: int) -> None:
    spec, located, row1 = placement.tensor, placement.located, row0 + len(rows)
    problems = []
    if rows.dtype != torch.uint8 or rows.ndim != 2 or rows.shape[1] != spec.row_bytes:
        problems.append(f"rows are {rows.dtype} {tuple(rows.shape)}, expected torch.uint8 [n, {spec.row_bytes}]")
    if local.dtype != torch.uint8 or local.ndim != 1 or not local.is_contiguous():
        problems.append(f"shard is {local.dtype} {tuple(local.shape)}, expected contiguous torch.uint8 [bytes]")
    if not 0 <= row0 <= row1 <= spec.num_rows:
        problems.append(f"rows [{row0}, {row1}) lie outside [0, {spec.num_rows})")
    elif row0 < row1:
        shift, size = placement.origin - base, local.numel()
        first, last = located.first, located.last
        if first + shift < 0 or last + shift > size:  # not all of the tensor is in this shard
            first, last = located.span(row0, row1)
        if first + shift < 0 or last + shift > size:
            problems.append(f"bytes [{first + shift}, {last + shift}) lie outside the shard's [0, {size})")
    if problems:
        raise ValueError(f"{spec.name} in {placement.storage}: {'; '.join(problems)}; check row_start and shards")
