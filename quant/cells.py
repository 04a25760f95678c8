"""Decode a few elements of a matrix again, where bytes of its tensors changed.

A cell is what can be decoded by itself: the rows and elements of a weight that share their bytes and block scales, 16
elements of a row in NVFP4. The touched cells of a matrix, one below the other, are a small matrix of the same format.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .formats import DTYPES, Component, Format, decode_unscaled
from .layouts import Placement, invert_bytes

Positions = NDArray[np.int64]
Changed = Mapping[str, Positions | None]  # tensor -> bytes of its checkpoint form that changed, None for any of them

PIECE_ELEMENTS = 1 << 18  # of cells decoded at a time
MAX_SHARE = 0.25  # of a matrix: above it, all of it is decoded in one pass


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


def decode_cells(
    fmt: Format, placements: Sequence[Placement], cells: Positions, bytes_of: Mapping[str, Tensor], out: Tensor
) -> None:
    """Decode these cells from the whole storages into `out`, BF16 of the shape of the weight."""
    rows, elements = cell_of(fmt, (out.shape[0], out.shape[1]))
    parts = list(zip(fmt.components, placements, strict=True))
    needed = {
        part.suffix: bytes_of[at.storage][at.origin : at.origin + at.tensor.num_bytes].view(torch.float32)
        for part, at in parts
        if part.suffix in fmt.needs
    }
    grid = out.unflatten(1, (-1, elements)).unflatten(0, (-1, rows))
    step = max(1, PIECE_ELEMENTS // (rows * elements))
    for start in range(0, len(cells), step):
        row, column = np.divmod(cells[start : start + step], grid.shape[2])
        tensors = {
            part.suffix: _bytes_of_cells(part, at, row, column, (rows, elements), bytes_of[at.storage])
            for part, at in parts
            if part.rows
        }
        decoded = torch.empty((len(row) * rows, elements), dtype=torch.bfloat16, device=out.device)
        decode_unscaled(fmt, {**tensors, **needed}, decoded)
        where = [torch.from_numpy(index).to(out.device) for index in (row, column)]
        grid[where[0], :, where[1], :] = decoded.view(len(row), rows, elements)


def _bytes_of_cells(
    part: Component, at: Placement, row: Positions, column: Positions, cell: tuple[int, int], storage: Tensor
) -> Tensor:
    """uint8 [cells * rows of this tensor in a cell, their bytes]."""
    num_rows, row_bytes = cell[0] // part.rows, at.tensor.row_bytes
    num_bytes = cell[1] // part.elements * DTYPES[part.dtype].itemsize if part.elements else row_bytes
    first = (row[:, None] * num_rows + np.arange(num_rows)) * row_bytes + column[:, None] * num_bytes
    positions = first[:, :, None] + np.arange(num_bytes)
    # Kernels are fed the low nibble first, whatever order their checkpoint had.
    values = invert_bytes(replace(at, swap_nibbles=False), positions.ravel(), storage, 0)
    return values.view(-1, num_bytes)
