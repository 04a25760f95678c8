"""Who sends which rows to whom: the trainer's placement meets the actors', at row granularity.

Pure functions over row ranges. A tensor's rows are indices along dim 0; a 0-d tensor has one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from .fsdp import shard_range


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LowRank:
    """What is added to rows of a matrix: scaling * up @ down. up: [n, rank], its rows go with the matrix's; down:
    [rank, columns]."""

    up: Tensor
    down: Tensor
    scaling: float

    def of_rows(self, start: int, stop: int) -> LowRank:
        """The same for rows [start, stop)."""
        return replace(self, up=self.up[start:stop])


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRows:
    """The rows of one tensor that this rank holds.

    rows: [n, ...] local tensor, a view where the placement allows it. first: index of its first row in the whole.
    shape: of the whole tensor. sends: False on a rank whose rows another rank sends. updates: what is yet to be added.
    """

    rows: Tensor
    first: int
    shape: tuple[int, ...]
    sends: bool
    updates: tuple[LowRank, ...] = ()

    def cut(self, start: int, stop: int) -> tuple[Tensor, tuple[LowRank, ...]]:
        """Rows [start, stop) of those that are here, and what is to be added to them."""
        return self.rows[start:stop], tuple(each.of_rows(start, stop) for each in self.updates)

    def with_updates(self, updates: Sequence[LowRank]) -> LocalRows:
        """Updates of the whole tensor, cut to the rows that are here. A sharded `up` is sharded as the tensor is."""
        if not updates:
            return self
        stop = self.first + self.rows.shape[0]
        cut = [
            replace(each, up=each.up.to_local().detach())
            if isinstance(each.up, DTensor)
            else replace(each, up=each.up.detach()[self.first : stop])
            for each in updates
        ]
        return replace(self, updates=tuple(cut))


def local_rows(tensor: Tensor, *, is_first_rank: bool) -> LocalRows:
    """The local rows of a plain tensor, or of a DTensor that is replicated or sharded on dim 0.

    A plain tensor is taken to be the same on every rank; the first rank sends it. Of the ranks that replicate a DTensor
    (HSDP), those with coordinate 0 on the replicated axes send. Other placements raise ValueError.
    """
    if not isinstance(tensor, DTensor):
        return LocalRows(rows=tensor.detach(), first=0, shape=tuple(tensor.shape), sends=is_first_rank)
    for placement in tensor.placements:
        if not isinstance(placement, Replicate) and placement != Shard(0):
            raise ValueError(f"placement {tensor.placements}: expected Replicate() or Shard(0) on every mesh axis")
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return LocalRows(rows=tensor.to_local()[:0].detach(), first=0, shape=tuple(tensor.shape), sends=False)
    first = 0
    num_rows = tensor.shape[0] if tensor.ndim else 1
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            start, stop = shard_range(num_rows, coordinate[axis], tensor.device_mesh.size(axis))
            first, num_rows = first + start, stop - start
    sends = all(
        coordinate[axis] == 0 for axis, placement in enumerate(tensor.placements) if isinstance(placement, Replicate)
    )
    return LocalRows(rows=tensor.to_local().detach(), first=first, shape=tuple(tensor.shape), sends=sends)


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Ranks that own the same rows of every tensor (one of each replica): what is sent to one is sent to all.

    ranks: indices into the service's list of ranks. row_start, row_stop: int64 per tensor.
    """

    ranks: tuple[int, ...]
    row_start: np.ndarray
    row_stop: np.ndarray


def destinations(row_starts: list[np.ndarray], row_stops: list[np.ndarray]) -> list[Destination]:
    """Group the service's ranks by the rows that they own."""
    groups: dict[bytes, list[int]] = {}
    for rank, (start, stop) in enumerate(zip(row_starts, row_stops, strict=True)):
        groups.setdefault(start.tobytes() + stop.tobytes(), []).append(rank)
    return [
        Destination(ranks=tuple(ranks), row_start=row_starts[ranks[0]], row_stop=row_stops[ranks[0]])
        for ranks in groups.values()
    ]


def as_bytes(rows: Tensor) -> Tensor:
    """[n, ...] of any dtype to [n, row bytes] uint8, a view of contiguous memory; a 0-d tensor has one row."""
    flat = rows.detach().contiguous()
    flat = flat.reshape(1, 1) if flat.ndim == 0 else flat.reshape(flat.shape[0], -1) if flat.numel() else flat
    if flat.numel() == 0:
        return torch.empty(0, 0, dtype=torch.uint8)
    return flat.view(torch.uint8)
