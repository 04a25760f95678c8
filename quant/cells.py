"""Decode a few elements of a model's matrices again, where bytes of their tensors changed.

A cell is what can be decoded by itself: the rows and elements of a weight that share their bytes and block scales, 16
elements of a row in NVFP4. Touched cells, one below the other, are a small matrix of the same format, so that those of
all matrices of a model are decoded in one call. Where they lie is found while the model still runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .formats import DTYPES, Component, Format, decode_unscaled
from .kernels import putter, taker
from .placements import Placement, locate_bytes

Positions = NDArray[np.int64]
Changed = Mapping[str, Positions | None]  # tensor -> bytes of its checkpoint form that changed, None for any of them

PIECE_ELEMENTS = 1 << 18  # of cells decoded at a time
MAX_SHARE = 0.25  # of a matrix: above it, all of it is decoded in one pass
ITEMS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def cell_of(fmt: Format, shape: tuple[int, int]) -> tuple[int, int]:
    """(rows, elements) of a cell of a weight of this shape."""
    per_item = [part.elements for part in fmt.row_components]
    return fmt.row_step, max(per_item) if all(per_item) else shape[1]


def touched_cells(
    fmt: Format, placements: Sequence[Placement], changed: Changed, shape: tuple[int, int]
) -> Positions | None:
    """Numbers of the cells, row by row, that hold changed bytes; None where the whole matrix is to be decoded."""
    rows, elements = cell_of(fmt, shape)
    if shape[0] % rows or shape[1] % elements:
        return None
    across = shape[1] // elements
    found = [np.empty(0, np.int64)]
    for part, placement in zip(fmt.components, placements, strict=True):
        name = placement.tensor.name
        if name not in changed or not (part.rows or part.suffix in fmt.needs):
            continue  # what has no rows and is not needed reaches the output another way
        positions = changed[name]
        if positions is None or not part.rows:
            return None
        row, byte = np.divmod(positions, placement.tensor.row_bytes)
        item = byte // DTYPES[part.dtype].itemsize
        found.append(row * part.rows // rows * across + item * part.elements // elements)
    cells = np.sort(np.concatenate(found), kind="stable")
    cells = cells[np.diff(cells, prepend=-1) != 0]
    return None if len(cells) * rows * elements > MAX_SHARE * math.prod(shape) else cells


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Source:
    """Where the bytes of some cells are in one storage: num_rows rows of num_bytes. take: writes them, flat."""

    take: Callable[[Tensor], object]
    num_rows: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Cells:
    """Some cells of one matrix. shape: of all of them, one below the other. sources: by suffix. put: writes their
    elements."""

    fmt: Format
    shape: tuple[int, int]
    device: torch.device
    sources: Mapping[str, _Source]
    needed: Mapping[str, Tensor]
    put: Callable[[Tensor], object]


class Refresh:
    """What is to be decoded once these bytes have changed: planned before, done by `run`."""

    def __init__(self, changed: Changed | None) -> None:
        self._changed = changed
        self._whole: list[Callable[[], None]] = []
        self._cells: dict[object, list[_Cells]] = {}

    def covers(self, changed: Changed) -> bool:
        """Whether this was planned for these very changes."""
        planned = self._changed
        return planned is not None and all(
            name in planned and planned[name] is positions for name, positions in changed.items()
        )

    def add_whole(self, decode: Callable[[], None]) -> None:
        """A whole matrix."""
        self._whole.append(decode)

    def add_cells(
        self,
        fmt: Format,
        placements: Sequence[Placement],
        cells: Positions,
        bytes_of: Mapping[str, Tensor],
        out: Tensor,
    ) -> None:
        """These cells of a matrix, from whole storages into `out`, BF16 of the shape of the weight."""
        shape = cell_of(fmt, (out.shape[0], out.shape[1]))
        step = max(1, PIECE_ELEMENTS // math.prod(shape))
        for start in range(0, len(cells), step):
            some = cells[start : start + step]
            row, column = np.divmod(some, out.shape[1] // shape[1])
            parts = list(zip(fmt.components, placements, strict=True))
            planned = _Cells(
                fmt=fmt,
                shape=(len(some) * shape[0], shape[1]),
                device=out.device,
                sources={
                    part.suffix: _source(part, at, row, column, shape, bytes_of[at.storage])
                    for part, at in parts
                    if part.rows
                },
                needed=needed_of(fmt, placements, bytes_of),
                put=_putter(shape, some, row, column, out),
            )
            # What a format needs besides rows differs from matrix to matrix, so those are not decoded together.
            key = (fmt.name, shape, out.device, len(self._cells) if planned.needed else 0)
            self._cells.setdefault(key, []).append(planned)

    def run(self) -> None:
        """Decode from the bytes as they are now."""
        for decode in self._whole:
            decode()
        for group in self._cells.values():
            for piece in _pieces(group):
                _decode(piece)


def _pieces(group: Sequence[_Cells]) -> Iterator[Sequence[_Cells]]:
    """Runs of at most PIECE_ELEMENTS and what is left over of the last one."""
    sizes = np.array([math.prod(cells.shape) for cells in group])
    cuts = np.flatnonzero(np.diff(np.cumsum(sizes) // PIECE_ELEMENTS)) + 1
    return (group[start:stop] for start, stop in pairwise([0, *cuts.tolist(), len(group)]))


def _decode(group: Sequence[_Cells]) -> None:
    """Gather, decode and put the cells of several matrices, whose formats are the same."""
    first = group[0]
    tensors = {suffix: _gathered([cells.sources[suffix] for cells in group], first.device) for suffix in first.sources}
    counts = [cells.shape[0] for cells in group]
    decoded = torch.empty((sum(counts), first.shape[1]), dtype=torch.bfloat16, device=first.device)
    decode_unscaled(first.fmt, {**tensors, **first.needed}, decoded)
    for cells, rows in zip(group, torch.split(decoded, counts), strict=True):
        cells.put(rows)


def _gathered(sources: Sequence[_Source], device: torch.device) -> Tensor:
    num_rows, num_bytes = sum(source.num_rows for source in sources), sources[0].num_bytes
    out = torch.empty(num_rows * num_bytes, dtype=torch.uint8, device=device)
    for source, part in zip(sources, torch.split(out, [each.num_rows * num_bytes for each in sources]), strict=True):
        source.take(part)
    return out.view(num_rows, num_bytes)


def needed_of(fmt: Format, placements: Sequence[Placement], bytes_of: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a format needs besides rows, from whole storages."""
    return {
        part.suffix: bytes_of[at.storage][at.origin : at.origin + at.tensor.num_bytes].view(torch.float32)
        for part, at in zip(fmt.components, placements, strict=True)
        if part.suffix in fmt.needs
    }


def _source(
    part: Component, at: Placement, row: Positions, column: Positions, cell: tuple[int, int], storage: Tensor
) -> _Source:
    num_rows, row_bytes = cell[0] // part.rows, at.tensor.row_bytes
    num_bytes = cell[1] // part.elements * DTYPES[part.dtype].itemsize if part.elements else row_bytes
    begins = ((row[:, None] * num_rows + np.arange(num_rows)) * row_bytes + column[:, None] * num_bytes).ravel()
    if at.run_bytes % num_bytes:
        width, found = 1, _located(at, (begins[:, None] + np.arange(num_bytes)).ravel(), storage)
    else:
        first = _located(at, begins, storage)
        # Items as wide as the bytes of a row of a cell and the memory allow.
        units = [num_bytes, storage.storage_offset(), storage.data_ptr()]
        width = next(width for width in ITEMS if not (any(unit % width for unit in units) or (first % width).any()))
        found = (first[:, None] // width + np.arange(num_bytes // width)).ravel()
    memory = storage[: len(storage) // width * width].view(ITEMS[width])
    index = torch.from_numpy(found).to(storage.device)
    return _Source(take=taker(memory, index), num_rows=len(begins), num_bytes=num_bytes)


def _putter(
    cell: tuple[int, int], cells: Positions, row: Positions, column: Positions, out: Tensor
) -> Callable[[Tensor], object]:
    rows, elements = cell
    if rows == 1 and out.is_contiguous():
        return putter(out.view(-1, elements), torch.from_numpy(cells).to(out.device))
    grid = out.view(len(out) // rows, rows, -1, elements)
    at = [torch.from_numpy(index).to(out.device) for index in (row, column)]

    def put(decoded: Tensor) -> None:
        grid[at[0], :, at[1], :] = decoded.view(-1, rows, elements)

    return put


def _located(at: Placement, positions: Positions, storage: Tensor) -> Positions:
    # Kernels are fed the low nibble first, whatever order their checkpoint had.
    found: Positions = locate_bytes(replace(at, swap_nibbles=False), positions, storage, 0).cpu().numpy()
    return found
