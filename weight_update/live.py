"""The live bytes of a rank: where the rows of every tensor lie in its storages, and which bytes must stay zero.

All of it is planned once, when the receiver is built; an install then only executes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from quant.layouts import Derived, Placement, apply_rows, invert_rows

from .digest import MASK, digest_rows, name_key
from .errors import PlanError, raise_all
from .inplace import AddressAudit, Storages, local_of

BLOCK_BYTES = 1 << 20  # rows go in blocks of about this size: what a core's cache holds, and bounded scratch
MAX_WORD_BYTES = 8  # padding is looked at in words of up to this size

Shards = Mapping[str, tuple[int, int]]
Span = tuple[str, int, int]  # storage, first and last-plus-one byte of the shard


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Write:
    """Rows [row0, row0 + num_rows) of one tensor, in the shard of a storage that this rank holds.

    local: the shard's bytes. base: where they start in the whole storage. span: the whole units that hold the rows.
    blocks: the rows again, [start, stop) from row0, cut where they are read or written at a time.
    """

    placement: Placement
    key: int
    local: Tensor
    base: int
    row0: int
    num_rows: int
    blocks: tuple[tuple[int, int], ...]
    span: Span

    def apply(self, rows: Tensor) -> None:
        """Write the rows, uint8 [num_rows, row_bytes], in place."""
        for start, stop in self.blocks:
            apply_rows(self.placement, rows[start:stop], self.row0 + start, self.local, self.base)

    def digest(self, scratch: Tensor) -> tuple[int, int]:
        """The digest of the rows as they lie in the storage, read back through the layout."""
        lane0 = lane1 = 0
        row_bytes = self.placement.tensor.row_bytes
        for start, stop in self.blocks:
            out = scratch[: (stop - start) * row_bytes].view(stop - start, row_bytes)
            invert_rows(self.placement, self.row0 + start, stop - start, self.local, self.base, out=out)
            part0, part1 = digest_rows(self.key, out, self.row0 + start)
            lane0, lane1 = lane0 + part0, lane1 + part1
        return lane0 & MASK, lane1 & MASK


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Copy(Write):
    """A write whose rows lie in the storage as they come: a plain copy, and a digest of the live bytes where they are.

    flat: those bytes, uint8 [num_rows * row_bytes].
    """

    flat: Tensor

    def apply(self, rows: Tensor) -> None:
        self.flat.copy_(rows.reshape(-1))

    def digest(self, scratch: Tensor) -> tuple[int, int]:
        return digest_rows(self.key, self.flat.view(self.num_rows, -1), self.row0)


def part_of(write: Write, row0: int, num_rows: int) -> Write:
    """The same tensor, fewer rows."""
    blocks = tuple(_blocks(num_rows, write.placement.tensor.row_bytes))
    return Write(
        placement=write.placement,
        key=write.key,
        local=write.local,
        base=write.base,
        row0=row0,
        num_rows=num_rows,
        blocks=blocks,
        span=write.span,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recompute:
    """One derived value: target.copy_(function(*inputs)), on the rank that holds it."""

    name: str
    target: Tensor
    inputs: tuple[Tensor, ...]
    sources: tuple[str, ...]
    function: Callable[..., Tensor]

    def apply(self) -> None:
        self.target.copy_(self.function(*self.inputs))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Padding:
    """Words that belong to no tensor: columns `positions` of `units`, [units, words] of int64, int32 or uint8, which
    start at unit `first` of the shard."""

    storage: str
    first: int
    units: Tensor
    positions: Tensor

    def problem(self, scratch: Tensor) -> str | None:
        """What is wrong, None while all are zero."""
        words = scratch.view(self.units.dtype)
        step = max(1, len(words) // len(self.positions))
        for start in range(0, len(self.units), step):
            block = self.units[start : start + step]
            out = words[: len(block) * len(self.positions)].view(len(block), -1)
            torch.index_select(block, 1, self.positions, out=out)
            if out.any():
                row, column = (int(i) for i in out.nonzero()[0])
                word = out[row, column].view(1).view(torch.uint8)
                byte = int(word.nonzero()[0])
                at = int(self.positions[column]) * word.numel() + byte
                unit = self.first + start + row
                return f"{self.storage}: padding byte {at} of unit {unit} of this rank is {int(word[byte])}, expected 0"
        return None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Live:
    """All that a rank's storages are: their bytes, where every tensor of the manifest lies, what is derived, what is
    padding, and where everything was."""

    bytes: Mapping[str, Tensor]
    writes: tuple[Write, ...]
    recomputes: tuple[Recompute, ...]
    padding: Mapping[str, tuple[Padding, ...]]
    audit: AddressAudit

    @property
    def device(self) -> torch.device:
        """Where the storages are."""
        return next(iter(self.bytes.values())).device if self.bytes else torch.device("cpu")

    def stale(self, touched: set[str]) -> list[Recompute]:
        """Derived values, in their order, that follow from these storages or from each other."""
        stale = []
        for each in self.recomputes:
            if touched & set(each.sources):
                stale.append(each)
                touched = touched | {each.name}
        return stale


def plan_live(
    storages: Mapping[str, Tensor],
    placements: Sequence[Placement],
    derived: Sequence[Derived],
    shards: Shards,
    live: Storages,
) -> Live:
    """The live bytes of one rank; PlanError that lists whatever does not fit together."""
    data = {name: bytes_of(name, local_of(tensor)) for name, tensor in storages.items()}
    devices = {each.device for each in data.values()}
    if len(devices) > 1:
        raise PlanError(f"storages lie on {', '.join(sorted(map(str, devices)))}; expected one device, a receiver each")
    writes = plan_writes(data, placements, derived, shards)
    return Live(
        bytes=data,
        writes=writes,
        recomputes=plan_recomputes(storages, derived),
        padding=plan_padding(data, writes),
        audit=AddressAudit.capture(live),
    )


def bytes_of(name: str, tensor: Tensor) -> Tensor:
    """The tensor's memory as 1-D uint8, a view."""
    if not tensor.is_contiguous():
        raise PlanError(f"{name}: shape {tuple(tensor.shape)}, strides {tensor.stride()}; expected contiguous memory")
    return tensor.detach().view(-1).view(torch.uint8)


# ---------------------------------------------------------------- plans


def plan_writes(
    storages: Mapping[str, Tensor], placements: Sequence[Placement], derived: Sequence[Derived], shards: Shards
) -> tuple[Write, ...]:
    """One write a placement, in their order. storages: the shards' bytes; every one must be filled by something."""
    writes, problems = [], []
    for placement in placements:
        try:
            writes.append(_plan_write(storages, placement, shards))
        except ValueError as error:
            problems.append(str(error))
    filled = {placement.storage for placement in placements} | {each.name for each in derived}
    problems += [f"{name}: nothing fills it; add a placement or leave it out" for name in storages.keys() - filled]
    problems += [
        f"{name}: its tensors have {used} bytes on this rank, it has {storages[name].numel()}; they overlap"
        for name, used in _used_bytes(writes).items()
        if used > storages[name].numel()
    ]
    raise_all(PlanError, "storages and placements do not fit together", problems)
    return tuple(writes)


def _plan_write(storages: Mapping[str, Tensor], placement: Placement, shards: Shards) -> Write:
    spec, storage, unit_bytes = placement.tensor, placement.storage, placement.unit_bytes
    if storage not in storages:
        raise PlanError(f"{spec.name}: storage {storage} is not among the {len(storages)} given; add it")
    local = storages[storage]
    first_unit, stop_unit = shards.get(storage, (0, local.numel() // unit_bytes))
    if local.numel() != (stop_unit - first_unit) * unit_bytes:
        raise PlanError(
            f"{spec.name}: {storage} has {local.numel()} bytes on this rank, units [{first_unit}, {stop_unit}) of"
            f" {unit_bytes} bytes were expected; check its shape and shards"
        )
    row0, row_stop = placement.rows_of_units(first_unit, stop_unit)
    if storage not in shards and row_stop - row0 != spec.num_rows:
        raise PlanError(
            f"{spec.name}: {storage} has {local.numel()} bytes, which hold {row_stop - row0} of {spec.num_rows} rows;"
            " check its shape, or say in shards which units this rank holds"
        )
    base = first_unit * unit_bytes
    offsets = placement.row_offsets[row0:row_stop] - base
    low, high = (int(offsets.min()) // unit_bytes, int(offsets.max()) // unit_bytes + 1) if len(offsets) else (0, 0)
    fields: dict[str, Any] = {
        "placement": placement,
        "key": name_key(spec.name),
        "local": local,
        "base": base,
        "row0": row0,
        "num_rows": row_stop - row0,
        "blocks": tuple(_blocks(row_stop - row0, spec.row_bytes)),
        "span": (storage, low * unit_bytes, high * unit_bytes),
    }
    if not _is_row_major(placement, offsets):
        return Write(**fields)
    start = int(offsets[0])
    return Copy(**fields, flat=local[start : start + len(offsets) * spec.row_bytes])


def _is_row_major(placement: Placement, offsets: npt.NDArray[np.int64]) -> bool:
    """Whether these rows lie one after the other, each in one piece and with its bytes as they come."""
    row_bytes = placement.tensor.row_bytes
    whole = placement.run_bytes == row_bytes and not placement.run_offsets.any() and not placement.swap_nibbles
    return bool(whole and len(offsets) and (np.diff(offsets) == row_bytes).all())


def _blocks(num_rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    return ((start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def plan_recomputes(storages: Mapping[str, Tensor], derived: Sequence[Derived]) -> tuple[Recompute, ...]:
    """The derived values that this rank holds. Their inputs lie on the same rank, whole."""
    problems = [
        f"{each.name}: {name} is not among the storages"
        for each in derived
        for name in (each.name, *each.inputs)
        if name not in storages
    ]
    raise_all(PlanError, "derived values lack storages", problems)
    storages = {name: local_of(tensor).detach() for name, tensor in storages.items()}
    held = [each for each in derived if storages[each.name].numel()]
    problems = [
        f"{each.name}: its input {name} is on another rank; shard both alike"
        for each in held
        for name in each.inputs
        if not storages[name].numel()
    ]
    raise_all(PlanError, "derived values cannot be computed", problems)
    return tuple(
        Recompute(
            name=each.name,
            target=storages[each.name],
            inputs=tuple(storages[name] for name in each.inputs),
            sources=each.inputs,
            function=each.function,
        )
        for each in held
    )


def merge_spans(spans: Sequence[Span]) -> list[Span]:
    """The same bytes, each once, in as few spans as possible."""
    merged: list[Span] = []
    for storage, first, stop in sorted(span for span in spans if span[1] < span[2]):
        if merged and merged[-1][0] == storage and first <= merged[-1][2]:
            merged[-1] = (storage, merged[-1][1], max(stop, merged[-1][2]))
        else:
            merged.append((storage, first, stop))
    return merged


# ---------------------------------------------------------------- padding

# Rows of one tensor in one unit: their offsets in it, the runs of a row, the bytes of a run.
Part = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]
Unfilled = tuple[torch.dtype, Tensor]  # words of this type, and where they are in a unit


def plan_padding(storages: Mapping[str, Tensor], writes: Sequence[Write]) -> dict[str, tuple[Padding, ...]]:
    """The bytes of every storage that no tensor fills. Units filled alike share one list of positions."""
    used = _used_bytes(writes)
    known: dict[object, Unfilled] = {}
    padded = [name for name, num_bytes in used.items() if num_bytes < storages[name].numel()]
    return {name: _padding_of(name, [w for w in writes if w.span[0] == name], known) for name in padded}


def _used_bytes(writes: Sequence[Write]) -> dict[str, int]:
    used: dict[str, int] = {}
    for write in writes:
        name, spec = write.span[0], write.placement.tensor
        used[name] = used.get(name, 0) + write.num_rows * spec.row_bytes
    return used


def _padding_of(storage: str, writes: Sequence[Write], known: dict[object, Unfilled]) -> tuple[Padding, ...]:
    unit_bytes = writes[0].placement.unit_bytes
    local = writes[0].local
    parts: list[list[Part]] = [[] for _ in range(local.numel() // unit_bytes)]
    for write in writes:
        located = write.placement.located
        offsets = write.placement.row_offsets[write.row0 : write.row0 + write.num_rows] - write.base
        unit, within = np.divmod(offsets, unit_bytes)
        cuts = np.flatnonzero(np.diff(unit)) + 1
        for part in np.split(within, cuts) if len(within) else ():
            parts[int(unit[0])].append((part, located.runs, located.run_bytes))
            unit = unit[len(part) :]
    found: list[Padding] = []
    start = 0
    for alike, group in groupby(parts, key=_signature):
        stop = start + len(list(group))
        key = (unit_bytes, local.data_ptr() % MAX_WORD_BYTES, alike)
        if key not in known:
            known[key] = _unfilled(local, unit_bytes, parts[start])
        dtype, positions = known[key]
        units = local.view(dtype).view(len(parts), -1)[start:stop]
        at_once = BLOCK_BYTES // dtype.itemsize  # what fits in the scratch
        found += [
            Padding(storage=storage, first=start, units=units, positions=positions[i : i + at_once])
            for i in range(0, len(positions), at_once)
        ]
        start = stop
    return tuple(found)


def _signature(parts: Sequence[Part]) -> tuple[tuple[int, int, int], ...]:
    return tuple(
        (xxhash.xxh3_64_intdigest(rows.tobytes()), xxhash.xxh3_64_intdigest(runs.tobytes()), run_bytes)
        for rows, runs, run_bytes in parts
    )


def _unfilled(local: Tensor, unit_bytes: int, parts: Sequence[Part]) -> Unfilled:
    """The words of a unit that none of the parts fills; words as wide as the padding and the memory allow."""
    free = np.ones(unit_bytes, np.bool_)
    for rows, runs, run_bytes in parts:
        row = (runs[:, None] + np.arange(run_bytes)).ravel()
        step = max(1, BLOCK_BYTES // len(row))
        for start in range(0, len(rows), step):
            free[rows[start : start + step, None] + row] = False
    for dtype in (torch.int64, torch.int32):
        size = dtype.itemsize
        if unit_bytes % size or local.data_ptr() % size or local.storage_offset() % size or local.numel() % size:
            continue
        words = free.reshape(-1, size)
        if np.array_equal(words.all(axis=1), words.any(axis=1)):
            return dtype, _positions(words[:, 0]).to(local.device)
    return torch.uint8, _positions(free).to(local.device)


def _positions(free: npt.NDArray[np.bool_]) -> Tensor:
    dtype = np.int32 if len(free) < 1 << 31 else np.int64
    return torch.from_numpy(np.flatnonzero(free).astype(dtype))
