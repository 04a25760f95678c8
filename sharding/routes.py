"""The rows that this trainer rank holds of a tensor, and the actor ranks that own rows.

Pure functions over row ranges. A tensor's rows are indices along dim 0; a 0-d tensor has one row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from .fsdp import shard_range

Runs = tuple[tuple[int, int], ...]  # [start, stop), none of them empty, in the order in which a rank keeps them


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LowRank:
    """What is added to rows of a matrix: scaling * up @ down. up: [n, rank], its rows go with the matrix's; down:
    [rank, columns]."""

    up: Tensor
    down: Tensor
    scaling: float

    def of_rows(self, start: int, stop: int) -> LowRank:
        """The same for rows [start, stop) of those that are here."""
        return replace(self, up=self.up[start:stop])


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRows:
    """The rows of one tensor that this rank holds.

    rows: [n, ...] local tensor, a view where the placement allows it. runs: which rows of the whole they are.
    shape: of the whole tensor. updates: what is yet to be added.
    """

    rows: Tensor
    runs: Runs
    shape: tuple[int, ...]
    updates: tuple[LowRank, ...] = ()

    @property
    def first(self) -> int:
        """Index of the first row; 0 where there is none."""
        return self.runs[0][0] if self.runs else 0

    def cut(self, start: int, stop: int) -> LocalRows:
        """Rows [start, stop) as a tensor of their own: views, unless other rows lie between them."""
        kept: list[tuple[int, int]] = []
        runs: list[tuple[int, int]] = []
        at = 0
        for first, last in self.runs:
            begin, end = max(first, start), min(last, stop)
            if begin < end:
                kept.append((at + begin - first, at + end - first))
                runs.append((begin - start, end - start))
            at += last - first
        updates = tuple(replace(each, up=_taken(each.up, kept)) for each in self.updates)
        shape = (stop - start, *self.shape[1:])
        return LocalRows(rows=_taken(self.rows, kept), runs=tuple(runs), shape=shape, updates=updates)

    def within(self, num_rows: int, offset: int) -> LocalRows:
        """The same rows, from row `offset` on of a tensor of num_rows."""
        runs = tuple((start + offset, stop + offset) for start, stop in self.runs)
        return replace(self, runs=runs, shape=(num_rows, *self.shape[1:]))

    def with_updates(self, updates: Sequence[LowRank]) -> LocalRows:
        """Updates of the whole tensor, cut to the rows that are here. A sharded `up` is sharded as the tensor is."""
        cut = [
            replace(each, up=each.up.to_local().detach())
            if isinstance(each.up, DTensor)
            else replace(each, up=_taken(each.up.detach(), self.runs))
            for each in updates
        ]
        return replace(self, updates=tuple(cut))


def _taken(rows: Tensor, kept: Sequence[tuple[int, int]]) -> Tensor:
    if not kept:
        return rows[:0] if rows.ndim else rows.new_empty(0)
    begin, end = kept[0][0], kept[-1][1]
    if end - begin == sum(stop - start for start, stop in kept):
        return rows[begin:end] if rows.ndim else rows
    return torch.cat([rows[start:stop] for start, stop in kept])


def local_rows(tensor: Tensor, *, lead: int = 1) -> LocalRows:
    """The local rows of a plain tensor, or of a DTensor whose mesh axes replicate it or shard its leading dims.

    Any number of axes may shard a dim, FSDP2's strided order included; shards may be uneven or empty. lead: with 2, of
    stacked experts [E, R, ...], the rows are those of [E * R, ...], so that both dims may be sharded. Other placements
    raise ValueError.
    """
    shape = tuple(tensor.shape)
    whole = (math.prod(shape[:lead]), *shape[lead:]) if tensor.ndim else ()
    if not isinstance(tensor, DTensor):
        rows = tensor.detach().reshape(whole)
        return LocalRows(rows=rows, runs=_joined([(0, whole[0] if whole else 1)]), shape=whole)
    _check(tensor.placements, shape, lead)
    local = tensor.to_local().detach()
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:  # no member of the mesh
        return LocalRows(rows=local.new_empty((0, *whole[1:])), runs=(), shape=whole)
    sizes = [tensor.device_mesh.size(axis) for axis in range(tensor.device_mesh.ndim)]
    dims = [
        _runs_of_dim(dim, shape, local.shape, tensor.placements, list(zip(coordinate, sizes, strict=True)))
        for dim in range(min(lead, len(shape)))
    ]
    runs = [(0, 1)] if not dims else dims[0] if len(dims) == 1 else _product(dims[0], dims[1], shape[1])
    rows = local.reshape((-1, *whole[1:])) if local.numel() and whole else local.new_empty((0, *whole[1:]))
    return LocalRows(rows=local if not whole else rows, runs=_joined(runs), shape=whole)


def _check(placements: Sequence[Placement], shape: tuple[int, ...], lead: int) -> None:
    for placement in placements:
        dim = placement.dim if isinstance(placement, Shard | _StridedShard) else None
        if not isinstance(placement, Replicate) and (dim is None or not 0 <= dim < lead):
            why = f"{placement} is no sharding of rows" if dim is None else f"{placement} does not keep rows whole"
            dims = "dim 0" if lead == 1 else f"dims 0 to {lead - 1}"
            raise ValueError(f"placement {tuple(placements)} of {list(shape)}: {why}; expected Replicate() or {dims}")


def _runs_of_dim(
    dim: int,
    shape: tuple[int, ...],
    local_shape: Sequence[int],
    placements: Sequence[Placement],
    coordinate: Sequence[tuple[int, int]],
) -> list[tuple[int, int]]:
    """What this rank holds along one dim; coordinate: by mesh axis, the rank's place and the size.

    FSDP2 splits what the axes to its right have split before (strided), and torch reads the same placement from left to
    right. The two agree unless shards are uneven, and then the local size says which of them was meant.
    """
    sharded = [
        (placement, *coordinate[axis])
        for axis, placement in enumerate(placements)
        if isinstance(placement, Shard | _StridedShard) and placement.dim == dim
    ]
    size = shape[dim]
    left_to_right = [(0, size)]
    for placement, place, count in sharded:
        factor = int(placement.split_factor) if isinstance(placement, _StridedShard) else 1
        pieces = [_chunk(left_to_right, i, factor) for i in range(factor)]
        left_to_right = [run for piece in pieces for run in _chunk(piece, place, count)]
    inner_first = [(0, size)]
    for _, place, count in sorted(sharded, key=lambda each: isinstance(each[0], _StridedShard)):
        inner_first = _chunk(inner_first, place, count)
    readings = {_joined(each): each for each in (inner_first, left_to_right)}
    fitting = [each for each in readings.values() if sum(b - a for a, b in each) == local_shape[dim]]
    if len(fitting) != 1:
        why = "which rows these are is ambiguous" if fitting else f"its shard has {local_shape[dim]} rows of dim {dim}"
        raise ValueError(
            f"placement {tuple(placements)} of {list(shape)}: {why}; expected the shard that torch.chunk makes"
        )
    return fitting[0]


def _chunk(runs: Sequence[tuple[int, int]], index: int, count: int) -> list[tuple[int, int]]:
    """The part `index` of `count` of these rows, one after the other, as torch.chunk splits them."""
    start, stop = shard_range(sum(b - a for a, b in runs), index, count)
    found, at = [], 0
    for a, b in runs:
        begin, end = max(start, at), min(stop, at + b - a)
        if begin < end:
            found.append((a + begin - at, a + end - at))
        at += b - a
    return found


def _product(outer: Sequence[tuple[int, int]], inner: Sequence[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Rows of [outer, inner] flattened."""
    return [(i * size + a, i * size + b) for start, stop in outer for i in range(start, stop) for a, b in inner]


def _joined(runs: Iterable[tuple[int, int]]) -> Runs:
    """Without empty runs, and neighbours in one."""
    found: list[tuple[int, int]] = []
    for start, stop in runs:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        elif start < stop:
            found.append((start, stop))
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Ranks that own the same rows of every tensor (one of each replica): what is sent to one is sent to all.

    ranks: indices into the service's list of ranks. row_start, row_stop: int64 per tensor.
    """

    ranks: tuple[int, ...]
    row_start: np.ndarray
    row_stop: np.ndarray

    def numbers(self, tensors: np.ndarray) -> np.ndarray:
        """By place in a push of these tensors of the manifest, the number that each has for these ranks; -1 for those
        that they are not told of."""
        found = np.full(len(tensors), -1)
        told = held(self.row_start, self.row_stop, tensors)
        found[told] = np.arange(len(told))
        return found


def held(row_start: np.ndarray, row_stop: np.ndarray, tensors: np.ndarray) -> np.ndarray:
    """Places in a push of these tensors of the manifest of those that a rank is told of, by which alone it knows them:
    it holds rows of them. Where it holds none, the first one, so that there is one."""
    found = np.flatnonzero(row_start[tensors] < row_stop[tensors])
    return found if len(found) else np.zeros(1, np.int64)


def destinations(row_starts: list[np.ndarray], row_stops: list[np.ndarray]) -> list[Destination]:
    """Group the service's ranks by the rows that they own."""
    groups: dict[bytes, list[int]] = {}
    for rank, (start, stop) in enumerate(zip(row_starts, row_stops, strict=True)):
        groups.setdefault(start.tobytes() + stop.tobytes(), []).append(rank)
    return [
        Destination(ranks=tuple(ranks), row_start=row_starts[ranks[0]], row_stop=row_stops[ranks[0]])
        for ranks in groups.values()
    ]


def chains(to: Destination, hosts: Mapping[int, str]) -> list[tuple[int, ...]]:
    """The ranks of a destination in chains: what is sent to the first of one is passed on from rank to rank. hosts: of
    the ranks that may be in one, which then has those of each host side by side; any other is a chain of its own."""
    linked = sorted((rank for rank in to.ranks if rank in hosts), key=lambda rank: (hosts[rank], rank))
    return [(rank,) for rank in to.ranks if rank not in hosts] + ([tuple(linked)] if linked else [])


def as_bytes(rows: Tensor) -> Tensor:
    """[n, ...] of any dtype to [n, row bytes] uint8, a view of contiguous memory; a 0-d tensor has one row."""
    flat = rows.detach().contiguous()
    flat = flat.reshape(1, 1) if flat.ndim == 0 else flat.reshape(flat.shape[0], -1) if flat.numel() else flat
    if flat.numel() == 0:
        return torch.empty(0, 0, dtype=torch.uint8)
    return flat.view(torch.uint8)
