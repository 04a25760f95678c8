"""Placements: where one checkpoint tensor lies in one storage, written and read by any subset of its rows.

    apply_rows(placement, rows, row0, local_bytes, base)
    invert_rows(placement, row0, n, local_bytes, base)

The first writes into a rank's shard, in place; the second reads the same rows back, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import kernels
from .formats import TensorSpec
from .steps import Located, Offsets, RowMajor, locate


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placement:
    """Where one tensor lies in one storage. `located` is shared between tensors that differ by `origin` only."""

    tensor: TensorSpec
    storage: str
    origin: int
    located: Located
    unit_bytes: int

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
                "shard this storage where whole runs of rows end"
            )
        return start, start + len(inside)


def place_row_major(tensor: TensorSpec, storage: str) -> Placement:
    """The tensor is the storage: row-major, a row a unit."""
    located = locate((), RowMajor(), tensor.num_rows, tensor.row_bytes)
    return Placement(tensor=tensor, storage=storage, origin=0, located=located, unit_bytes=tensor.row_bytes)


def apply_rows(placement: Placement, src: Tensor, row0: int, local: Tensor, base: int) -> None:
    """Write rows [row0, row0 + n) of a tensor, uint8 [n, row_bytes], into the bytes of a shard.

    local: 1-D uint8, the bytes of the rank's shard of the storage; base: where the shard starts in the whole storage.
    """
    _check_rows(placement, src, row0, local, base)
    kernels.scatter_rows(src.contiguous(), placement.located, row0, placement.origin - base, local)


def invert_rows(placement: Placement, row0: int, n: int, local: Tensor, base: int, out: Tensor | None = None) -> Tensor:
    """Read rows [row0, row0 + n) of a tensor back from the bytes of a shard: uint8 [n, row_bytes]."""
    if out is None:
        out = torch.empty((n, placement.tensor.row_bytes), dtype=torch.uint8, device=local.device)
    _check_rows(placement, out, row0, local, base)
    kernels.gather_rows(local, placement.located, row0, placement.origin - base, out)
    return out


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
