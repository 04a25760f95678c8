"""One transaction on the bytes of one rank: what is planned at its begin and then only executed.

    install = FullInstall(live, transaction, version, indices, arena, in_flight_bytes)
    install.staging.place(chunk)      # while the model runs
    install.prepare()                 # digests of what arrived; undo copy
    install.write()                   # in place, derived, read back, checked
    install.undo()                    # the old bytes

`weight_update.patching` has the same for a delta. Neither knows states, locks or versions that others hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quant.layouts import invert_rows

from .delta import Patch, Positions
from .digest import Digests, digest_staged
from .errors import DigestError, LayoutError, PlanError, TransferError, raise_all
from .live import BLOCK_BYTES, Live, Recompute, Span, Write, merge_spans
from .staging import ALIGN_BYTES, Arena, StagingBuffer, StagingPlan, plan_staging

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
    derived values included. columns: rows, bytes of a row, first row and key of every tensor."""

    indices: Sequence[int]
    writes: Sequence[Write]
    recomputes: Sequence[Recompute]
    spans: Sequence[Span]
    layout: StagingPlan
    columns: tuple[Ints, Ints, Ints, npt.NDArray[np.uint64]]
    block_bytes: int
    changes: Changes

    @classmethod
    def of(cls, live: Live, indices: Sequence[int]) -> FullPlan:
        """The plan of some tensors."""
        writes = [live.writes[i] for i in indices]
        specs = [write.placement.tensor for write in writes]
        row0, num_rows = (np.array([getattr(each, name) for each in writes], np.int64) for name in ("row0", "num_rows"))
        recomputes = live.stale({write.span[0] for write in writes if write.num_rows})
        derived = [(each.name, 0, live.bytes[each.name].numel()) for each in recomputes]
        row_bytes = np.array([spec.row_bytes for spec in specs], np.int64)
        keys = np.array([write.key for write in writes], np.uint64)
        return cls(
            indices=indices,
            writes=writes,
            recomputes=recomputes,
            spans=merge_spans([*(write.span for write in writes), *derived]),
            layout=plan_staging(specs, row0, row0 + num_rows),
            columns=(num_rows, row_bytes, row0, keys),
            block_bytes=block_bytes(writes),
            changes=dict.fromkeys(spec.name for spec in specs),
        )


class FullPlans:
    """The plan of the last tensors that came: most pushes bring the same ones as the one before."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._last: FullPlan | None = None

    def of(self, indices: Sequence[int]) -> FullPlan:
        if self._last is None or self._last.indices != indices:
            self._last = FullPlan.of(self._live, indices)
        return self._last


class FullInstall:
    """Whole tensors: their rows arrive in a staging buffer, and each is written through its layout."""

    def __init__(self, live: Live, plan: FullPlan, transaction: int, version: int, in_flight_bytes: int) -> None:
        self.plan, self.transaction, self.version, self.indices = plan, transaction, version, plan.indices
        self._live = live
        self.memory = MemoryPlan(
            staging_bytes=plan.layout.num_bytes,
            undo_bytes=sum(stop - first for _, first, stop in plan.spans),
            scratch_bytes=plan.block_bytes + SLACK_BYTES + TENSOR_BYTES * len(plan.writes),
            in_flight_bytes=in_flight_bytes,
        )

    def reserve(self, arena: Arena) -> None:
        """Take all memory that the transaction needs."""
        staged, block, undo = self.plan.layout.num_bytes, self.plan.block_bytes, self.memory.undo_bytes
        memory = arena.reserve(staged + block + undo)
        self.staging = StagingBuffer(self.plan.layout, memory[:staged])
        self._scratch = memory[staged : staged + block]
        self._undo = self._copies(memory[staged + block :])
        self._staged = np.zeros((len(self.indices), 2), np.uint64)

    def _copies(self, memory: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Live bytes and where their copy goes, one after the other in `memory`."""
        copies, at = [], 0
        for name, first, stop in self.plan.spans:
            copies.append((self._live.bytes[name][first:stop], memory[at : at + stop - first]))
            at += stop - first
        return copies

    def prepare(self) -> Digests:
        missing = [f"{name}: bytes [{first}, {stop})" for name, (first, stop) in self.staging.missing()]
        raise_all(TransferError, "prepare: rows have not arrived; send them", missing)
        self.staging.close()
        self._staged = digest_staged(self.staging.memory, self.plan.layout.at, *self.plan.columns)
        for live, copy in self._undo:
            copy.copy_(live)
        return self._staged

    def arrived(self) -> dict[str, Tensor]:
        return {spec.name: self.staging.rows(i) for i, spec in enumerate(self.plan.layout.specs)}

    def write(self) -> Digests:
        for i, write in enumerate(self.plan.writes):
            write.apply(self.staging.rows(i))
        for each in self.plan.recomputes:
            each.apply()
        installed = read_back(self.plan.writes, self._scratch)
        self._require_installed(installed)
        return installed

    def _require_installed(self, installed: Digests) -> None:
        """What is read back is what was staged, padding is zero, and nothing moved; raises whatever is not so."""
        require_equal(installed, self._staged, self.plan.writes)
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
        copies = dict(zip(self.plan.spans, (copy for _, copy in self._undo), strict=True))
        return [
            whole_rows(index, write, _old_rows(write, copies))
            for index, write in zip(self.indices, self.plan.writes, strict=True)
            if write.num_rows
        ]


def _old_rows(write: Write, copies: Mapping[Span, Tensor]) -> Tensor:
    """Rows as they were, out of the undo copy."""
    name, first, stop = write.span
    (span, copy) = next(
        (span, copy) for span, copy in copies.items() if span[0] == name and span[1] <= first and stop <= span[2]
    )
    return invert_rows(write.placement, write.row0, write.num_rows, copy, write.base + span[1])


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
        for i in np.flatnonzero((installed != staged).any(axis=1)).tolist()
    ]
    raise_all(DigestError, "install: what is read back is not what was staged; the old bytes are back", problems)


def read_back(writes: Sequence[Write], scratch: Tensor | None = None) -> Digests:
    """Digests of live rows, [n, 2]."""
    if scratch is None:
        scratch = torch.empty(block_bytes(writes), dtype=torch.uint8, device=writes[0].local.device if writes else None)
    return np.array([write.digest(scratch) for write in writes], np.uint64).reshape(-1, 2)


def block_bytes(writes: Sequence[Write]) -> int:
    """Scratch for one block of rows, in whole cache lines."""
    largest = max([BLOCK_BYTES, *(write.placement.tensor.row_bytes for write in writes)])
    return -(-largest // ALIGN_BYTES) * ALIGN_BYTES


def _hex(digest: npt.NDArray[np.uint64]) -> str:
    return "".join(f"{int(lane):016x}" for lane in digest)
