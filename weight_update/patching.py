"""A delta on one rank: blobs become patches while the model runs, and the pause writes the changed bytes only.

The digest follows the change: the words that held changed bytes go out of it as they were, and come in as they are read
back from the live storage. Bytes that nothing touched are not read; a scrub does that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quant.formats import TensorSpec
from quant.kernels import byte_view, put_bytes
from quant.placements import Words, invert_rows, locate_bytes, swapped

from .delta import BlobSize, Patch, Positions, check_apart, unpack
from .digest import Digests, Lanes, digest_rows, digest_words, word_patcher, words_of
from .errors import TransferError, raise_all
from .install import (
    SLACK_BYTES,
    TENSOR_BYTES,
    Changes,
    MemoryPlan,
    require_equal,
    whole_rows,
)
from .live import Live, Recompute, Write, part_of
from .staging import Arena, StagingBuffer, plan_staging
from .writes import block_bytes


class Part(Protocol):
    """The changes of one tensor, or of some of its rows. out, into: what they take from its digest and add to it."""

    index: int
    write: Write
    out: Lanes
    into: Lanes

    def apply(self) -> Lanes:
        """Write in place; what the rows or words add to the digest as they are read back."""

    def undo(self) -> None:
        """The old bytes."""

    def reverse(self) -> Patch:
        """Back from the new bytes to the old ones."""


class Sparse:
    """Single bytes. Reads what is there now, so it is made while nothing else writes."""

    def __init__(self, index: int, write: Write, patch: Patch) -> None:
        assert patch.positions is not None
        self.index, self.write, self.patch = index, write, patch
        placement, row_bytes = write.placement, write.placement.tensor.row_bytes
        swap = swapped if placement.swap_nibbles else lambda values: values
        self._at = locate_bytes(placement, patch.positions, write.local, write.base)
        self._old = write.local[self._at]
        changed = swap(self._old).cpu().numpy() + patch.values
        self._new = swap(torch.from_numpy(changed).to(self._old.device))
        words = words_of(row_bytes, patch.positions)
        begins = np.diff(words, prepend=-1) != 0
        self._words = words[begins]
        self._begins = np.flatnonzero(begins)
        self._live = Words(placement, self._words, write.local, write.base)
        before = self._live.read()
        after = before.astype("<u8")
        slot = np.cumsum(begins) - 1
        after.view(np.uint8)[slot * 8 + patch.positions % row_bytes % 8] = changed
        self.out, self.into = self._digest(before), self._digest(after.astype(np.uint64))
        self._patcher = self._in_one_go()

    def _digest(self, words: npt.NDArray[np.uint64]) -> Lanes:
        return digest_words(self.write.key, self.write.placement.tensor.row_bytes, self._words, words)

    def _in_one_go(self) -> Callable[[], Lanes] | None:
        """What writes and reads back at once; None where the words do not lie in host memory as they are."""
        memory, direct = byte_view(self.write.local), self._live.direct
        if memory is None or direct is None:
            return None
        changes = (memory, self._at.numpy(), self._new.numpy(), self._begins)
        words = (*direct, self._words)
        return word_patcher(self.write.key, self.write.placement.tensor.row_bytes, changes, words)

    def apply(self) -> Lanes:
        if self._patcher is not None:
            return self._patcher()
        put_bytes(self.write.local, self._at, self._new)
        return self._digest(self._live.read())

    def undo(self) -> None:
        put_bytes(self.write.local, self._at, self._old)

    def reverse(self) -> Patch:
        patch = self.patch
        values = np.negative(patch.values)
        return Patch(tensor=self.index, first=patch.first, stop=patch.stop, positions=patch.positions, values=values)


class Dense:
    """Whole rows."""

    def __init__(self, index: int, write: Write, patch: Patch, scratch: Tensor) -> None:
        row_bytes = write.placement.tensor.row_bytes
        row0, row1 = patch.first // row_bytes, patch.stop // row_bytes
        self.index, self.write = index, part_of(write, row0, row1 - row0)
        self._scratch = scratch
        self.rows = torch.from_numpy(patch.values).view(row1 - row0, row_bytes).to(write.local.device)
        self._old = invert_rows(write.placement, row0, row1 - row0, write.local, write.base)
        if patch.relative:
            self.rows += self._old
        self.out, self.into = (digest_rows(write.key, rows, row0) for rows in (self._old, self.rows))

    def apply(self) -> Lanes:
        self.write.apply(self.rows)
        return self.write.digest(self._scratch)

    def undo(self) -> None:
        self.write.apply(self._old)

    def reverse(self) -> Patch:
        return whole_rows(self.index, self.write, self._old)


def _lanes(digests: Sequence[Lanes]) -> Digests:
    """Digests as an array, [n, 2] uint64."""
    return np.array(digests, np.uint64).reshape(-1, 2)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Planned:
    """What a prepare makes of the patches."""

    parts: list[Part]
    recomputes: list[Recompute]
    derived: list[tuple[Tensor, Tensor]]  # live values, their copy
    staged: Digests
    changes: Changes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ground:
    """The tensors of a delta, of the manifest by `indices`: their writes and specs, their rows here, scratch for one
    block of them."""

    indices: Sequence[int]
    writes: Sequence[Write]
    specs: Sequence[TensorSpec]
    row_bytes: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    stops: npt.NDArray[np.int64]
    positions: Mapping[int, int]
    block_bytes: int

    @classmethod
    def of(cls, live: Live, indices: Sequence[int]) -> Ground:
        """The same for every delta of these tensors."""
        writes = [live.writes[i] for i in indices]
        starts = np.array([write.row0 for write in writes], np.int64)
        return cls(
            indices=indices,
            writes=writes,
            specs=[write.placement.tensor for write in writes],
            row_bytes=np.array([write.placement.tensor.row_bytes for write in writes], np.int64),
            starts=starts,
            stops=starts + np.array([write.num_rows for write in writes], np.int64),
            positions={index: i for i, index in enumerate(indices)},
            block_bytes=block_bytes(writes),
        )


class DeltaInstall:
    """Changed bytes of some tensors.

    base: digests of this rank's rows of the pushed tensors as they are, [n, 2]. blobs: announced sizes, one a trainer
    rank, in their order. patches: given instead where the change comes from this rank itself (a rollback).
    """

    def __init__(
        self,
        live: Live,
        ground: Ground,
        transaction: int,
        version: int,
        in_flight_bytes: int,
        *,
        base: Digests,
        blobs: Sequence[BlobSize] = (),
        patches: Sequence[Patch] = (),
    ) -> None:
        self.transaction, self.version, self.indices = transaction, version, ground.indices
        self._live, self._base, self._blobs, self._patches = live, base, blobs, list(patches)
        self._ground, self._writes = ground, ground.writes
        self._planned: _Planned | None = None
        specs = [
            TensorSpec(name=f"delta of trainer rank {i}", dtype="U8", shape=(blob.num_bytes,))
            for i, blob in enumerate(blobs)
        ]
        stops = np.array([blob.num_bytes for blob in blobs], np.int64)
        self._layout = plan_staging(specs, np.zeros_like(stops), stops)
        self.memory = MemoryPlan(
            staging_bytes=self._layout.num_bytes,
            undo_bytes=sum(blob.unpacked_bytes for blob in blobs) + sum(map(held_bytes, patches)),
            scratch_bytes=ground.block_bytes + SLACK_BYTES + TENSOR_BYTES * len(ground.indices),
            in_flight_bytes=in_flight_bytes,
        )

    def reserve(self, arena: Arena) -> None:
        """Take what is known by now; the rest is allocated by prepare, as much as was announced."""
        staged = self._layout.num_bytes
        memory = arena.reserve(staged + self._ground.block_bytes)
        self.staging = StagingBuffer(self._layout, memory[:staged])
        self._scratch = memory[staged:]

    def prepare(self) -> Digests:
        missing = [f"{name}: bytes [{first}, {stop})" for name, (first, stop) in self.staging.missing()]
        raise_all(TransferError, "prepare: the delta has not arrived; send it", missing)
        self.staging.close()
        patches = [*self._patches, *self._unpacked()]
        parts = [self._part(patch) for patch in patches]
        staged = self._moved(parts, [part.into for part in parts])
        recomputes = self._live.stale({part.write.span[0] for part in parts})
        derived = [(each.target, each.target.clone()) for each in recomputes]
        self._planned = _Planned(
            parts=parts, recomputes=recomputes, derived=derived, staged=staged, changes=_changes(parts)
        )
        return staged

    def _unpacked(self) -> list[Patch]:
        ground = self._ground
        patches = [
            patch
            for i, size in enumerate(self._blobs)
            for patch in unpack(
                self.staging.rows(i).reshape(-1).numpy().data, size, ground.specs, ground.starts, ground.stops
            )
        ]
        check_apart(patches, ground.specs)
        return patches

    def _part(self, patch: Patch) -> Part:
        index, write = self.indices[patch.tensor], self._writes[patch.tensor]
        return Dense(index, write, patch, self._scratch) if patch.positions is None else Sparse(index, write, patch)

    def _moved(self, parts: Sequence[Part], into: Sequence[Lanes]) -> Digests:
        """The base digests with what the parts take out and what they put in, mod 2^64."""
        digests = self._base.copy()
        at = np.array([self._ground.positions[part.index] for part in parts], np.int64)
        np.add.at(digests, at, _lanes(into) - _lanes([part.out for part in parts]))
        return digests

    def arrived(self) -> dict[str, Tensor]:
        return self.whole_of([part for part in self._prepared().parts if isinstance(part, Dense)])

    def whole_of(self, dense: Sequence[Dense]) -> dict[str, Tensor]:
        """The rows of tensors that come whole in these parts, by name."""
        parts: dict[int, list[Dense]] = {}
        for part in dense:
            parts.setdefault(part.index, []).append(part)
        found = {}
        for index, write in zip(self.indices, self._writes, strict=True):
            ordered = sorted(parts.get(index, ()), key=lambda part: part.write.row0)
            if sum(part.write.num_rows for part in ordered) == write.num_rows:
                none = torch.empty(0, write.placement.tensor.row_bytes, dtype=torch.uint8)
                rows = [part.rows for part in ordered] or [none]
                found[write.placement.tensor.name] = rows[0] if len(rows) == 1 else torch.cat(rows)
        return found

    def write(self) -> Digests:
        planned = self._prepared()
        installed = self._moved(planned.parts, [part.apply() for part in planned.parts])
        for each in planned.recomputes:
            each.apply()
        require_equal(installed, planned.staged, self._writes)
        self._live.audit.check()
        return installed

    def undo(self) -> None:
        planned = self._prepared()
        for part in planned.parts:
            part.undo()
        for target, copy in planned.derived:
            target.copy_(copy)

    def changes(self) -> Changes:
        return self._prepared().changes

    def reverse(self) -> list[Patch]:
        return [part.reverse() for part in self._prepared().parts]

    def _prepared(self) -> _Planned:
        assert self._planned is not None
        return self._planned


def _changes(parts: Sequence[Part]) -> Changes:
    found: dict[str, list[Positions | None]] = {}
    for part in parts:
        positions = part.patch.positions if isinstance(part, Sparse) else None
        found.setdefault(part.write.placement.tensor.name, []).append(positions)
    return {name: _joined(positions) for name, positions in found.items()}


def _joined(parts: Sequence[Positions | None]) -> Positions | None:
    known = [positions for positions in parts if positions is not None]
    if len(known) < len(parts):
        return None
    return known[0] if len(known) == 1 else np.concatenate(known)


def held_bytes(patch: Patch) -> int:
    """Memory that a patch takes on a rank while it is installed."""
    dense = patch.positions is None
    size = BlobSize(
        num_bytes=0,
        num_segments=1,
        num_changes=0 if dense else len(patch.values),
        dense_bytes=len(patch.values) if dense else 0,
    )
    return size.unpacked_bytes
