"""One transaction on the bytes of one rank: what is planned at its begin and then only executed.

    install = FullInstall(live, transaction, version, indices, arena, in_flight_bytes)
    install.staging.place(chunk)      # while the model runs
    install.prepare()                 # digests of what arrived; undo copy
    install.write()                   # in place, derived, read back, checked
    install.undo()                    # the old bytes

`weight_update.patching` has the same for a delta. Neither knows states, locks or versions that others hold.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quant.layouts import invert_rows

from .delta import Patch, Positions
from .digest import Digests, unlike
from .errors import DigestError, LayoutError, PlanError, TransferError, raise_all
from .live import Copy, Live, Recompute, Span, Write, merge_spans
from .staging import Arena, StagingBuffer, StagingPlan, plan_staging
from .writes import Writes

SLACK_BYTES = 8 << 20  # index arrays of the torch twins for a block, derived values, the interpreter's own
TENSOR_BYTES = 4 << 10  # Python objects that a transaction keeps for one tensor

Ints = npt.NDArray[np.int64]
Changes = Mapping[str, Positions | None]  # tensor -> bytes that this rank wrote, None for whatever it holds of it


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes above idle that a transaction needs on this rank. in_flight: what the transport says that it holds."""

    staging_bytes: int
    undo_bytes: int
    scratch_bytes: int
    in_flight_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        return self.staging_bytes + self.undo_bytes + self.scratch_bytes + self.in_flight_bytes

    def require(self, budget_bytes: int | None) -> None:
        """Raise PlanError where this is more than the budget."""
        if budget_bytes is not None and self.peak_bytes > budget_bytes:
            raise PlanError(
                f"this push needs {self.peak_bytes} bytes above idle on this rank (staging {self.staging_bytes},"
                f" undo {self.undo_bytes}, scratch {self.scratch_bytes}, in flight {self.in_flight_bytes}),"
                f" the budget is {budget_bytes}; push fewer tensors at a time or raise the budget"
            )


class Install(Protocol):
    """What a receiver asks of a transaction. indices: tensors of the manifest, in the order of its digests."""

    transaction: int
    version: int
    indices: Sequence[int]
    staging: StagingBuffer
    memory: MemoryPlan

    def prepare(self) -> Digests:
        """All has arrived: digests of the rank's rows as they will be, [n, 2]. Takes the undo copy."""

    def arrived(self) -> dict[str, Tensor]:
        """The rows of tensors that come whole, uint8 [n, row_bytes] each; none of those that come as changed bytes."""

    def write(self) -> Digests:
        """In place; digests of the rank's rows as they are read back. Raises where they are not what was staged."""

    def undo(self) -> None:
        """The bytes from before `write`, derived values included."""

    def changes(self) -> Changes:
        """Which bytes `write` and `undo` touch."""

    def reverse(self) -> list[Patch]:
        """What leads from the written bytes back to the old ones, in memory of its own; tensors of the manifest."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FullPlan:
    """An install of whole tensors, but for when it is done. indices: of the manifest. spans: bytes that it overwrites,
    derived values included; lives: they themselves. span_of: by write, the span that holds its rows."""

    indices: Sequence[int]
    writes: Writes
    recomputes: Sequence[Recompute]
    spans: Sequence[Span]
    span_of: Sequence[int]
    lives: Sequence[Tensor]
    layout: StagingPlan
    changes: Changes

    @classmethod
    def of(cls, live: Live, indices: Sequence[int]) -> FullPlan:
        """The plan of some tensors."""
        writes = Writes([live.writes[i] for i in indices])
        specs = [write.placement.tensor for write in writes.all]
        recomputes = live.stale({write.span[0] for write in writes.all if write.num_rows})
        derived = [(each.name, 0, live.bytes[each.name].numel()) for each in recomputes]
        spans = merge_spans([*(write.span for write in writes.all), *derived])
        return cls(
            indices=indices,
            writes=writes,
            recomputes=recomputes,
            spans=spans,
            span_of=[bisect_right(spans, (*write.span[:2], sys.maxsize)) - 1 for write in writes.all],
            lives=[_part(live.bytes[name], first, stop) for name, first, stop in spans],
            layout=plan_staging(specs, writes.row0, writes.row0 + writes.num_rows),
            changes=dict.fromkeys(spec.name for spec in specs),
        )

    @property
    def undo_bytes(self) -> list[int]:
        """Of each span."""
        return [each.numel() for each in self.lives]


def _part(data: Tensor, first: int, stop: int) -> Tensor:
    return data if stop - first == data.numel() else data[first:stop]


T = TypeVar("T")


class Plans(Generic[T]):
    """What is made of the last tensors that came: most pushes bring the same ones as the one before."""

    def __init__(self, make: Callable[[Sequence[int]], T]) -> None:
        self._make = make
        self._last: tuple[Sequence[int], T] | None = None

    def of(self, indices: Sequence[int]) -> T:
        if self._last is None or self._last[0] != indices:
            self._last = indices, self._make(indices)
        return self._last[1]


class FullInstall:
    """Whole tensors: their rows arrive in a staging buffer, and each is written through its layout."""

    def __init__(self, live: Live, plan: FullPlan, transaction: int, version: int, in_flight_bytes: int) -> None:
        self.plan, self.transaction, self.version, self.indices = plan, transaction, version, plan.indices
        self._live = live
        self.memory = MemoryPlan(
            staging_bytes=plan.layout.num_bytes,
            undo_bytes=sum(plan.undo_bytes),
            scratch_bytes=plan.writes.block_bytes + SLACK_BYTES + TENSOR_BYTES * len(plan.indices),
            in_flight_bytes=in_flight_bytes,
        )

    def reserve(self, arena: Arena) -> None:
        """Take all memory that the transaction needs."""
        staged, block, undo = self.plan.layout.num_bytes, self.plan.writes.block_bytes, self.memory.undo_bytes
        memory = arena.reserve(staged + block + undo)
        self.staging = StagingBuffer(self.plan.layout, memory[:staged])
        self._scratch = memory[staged : staged + block]
        self._undo = self._copies(memory[staged + block :])
        self._staged = np.zeros((len(self.indices), 2), np.uint64)

    def _copies(self, memory: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Live bytes and where their copy goes, one after the other in `memory`."""
        return list(zip(self.plan.lives, memory.split_with_sizes(self.plan.undo_bytes), strict=True))

    def prepare(self) -> Digests:
        missing = [f"{name}: bytes [{first}, {stop})" for name, (first, stop) in self.staging.missing()]
        raise_all(TransferError, "prepare: rows have not arrived; send them", missing)
        self.staging.close()
        self._staged = self.plan.writes.staged(self.staging)
        for live, copy in self._undo:
            copy.copy_(live)
        return self._staged

    def arrived(self) -> dict[str, Tensor]:
        return {spec.name: self.staging.rows(i) for i, spec in enumerate(self.plan.layout.specs)}

    def write(self) -> Digests:
        self.plan.writes.apply(self.staging)
        for each in self.plan.recomputes:
            each.apply()
        installed = self.plan.writes.read_back(self._scratch)
        self._require_installed(installed)
        return installed

    def _require_installed(self, installed: Digests) -> None:
        """What is read back is what was staged, padding is zero, and nothing moved; raises whatever is not so."""
        require_equal(installed, self._staged, self.plan.writes.all)
        names = {span[0]: None for span in self.plan.spans}
        padding = [each for name in names for each in self._live.padding.get(name, ())]
        stained = [problem for each in padding if (problem := each.problem(self._scratch)) is not None]
        raise_all(LayoutError, "install: padding was written; the old bytes are back", stained)
        self._live.audit.check()

    def undo(self) -> None:
        for live, copy in self._undo:
            live.copy_(copy)

    def changes(self) -> Changes:
        return self.plan.changes

    def reverse(self) -> list[Patch]:
        found = zip(self.indices, self.plan.writes.all, self.plan.span_of, strict=True)
        return [whole_rows(index, write, self._old_rows(write, span)) for index, write, span in found if write.num_rows]

    def _old_rows(self, write: Write, span: int) -> Tensor:
        """Rows as they were, out of the undo copy."""
        first, copy = self.plan.spans[span][1], self._undo[span][1]
        if isinstance(write, Copy):
            at = write.flat.storage_offset() - self._live.bytes[write.span[0]].storage_offset() - first
            return copy[at : at + write.flat.numel()].clone()
        return invert_rows(write.placement, write.row0, write.num_rows, copy, write.base + first)


def whole_rows(index: int, write: Write, rows: Tensor) -> Patch:
    """A patch that puts these rows of a tensor of the manifest where they belong."""
    row_bytes = write.placement.tensor.row_bytes
    first = write.row0 * row_bytes
    values = rows.reshape(-1).cpu().numpy()
    return Patch(tensor=index, first=first, stop=first + len(values), positions=None, values=values)


def require_equal(installed: Digests, staged: Digests, writes: Sequence[Write]) -> None:
    """Raise DigestError that names the tensors whose read-back rows are not what was staged."""
    problems = [
        f"{writes[i].placement.tensor.name}: installed {_hex(installed[i])}, staged {_hex(staged[i])}"
        for i in np.flatnonzero(unlike(installed, staged)).tolist()
    ]
    raise_all(DigestError, "install: what is read back is not what was staged; the old bytes are back", problems)


def read_back(writes: Sequence[Write]) -> Digests:
    """Digests of live rows, [n, 2]."""
    chosen = Writes(writes)
    device = writes[0].local.device if writes else None
    return chosen.read_back(torch.empty(chosen.block_bytes, dtype=torch.uint8, device=device))


def _hex(digest: npt.NDArray[np.uint64]) -> str:
    return "".join(f"{int(lane):016x}" for lane in digest)
