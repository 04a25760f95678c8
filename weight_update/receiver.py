"""The rank side of a weight update, as a library: it fills any named storages and knows neither Ray, gRPC nor a model.

receiver = Receiver(storages, placements, derived)      # or Receiver.from_module(model)
receiver.begin(transaction, version, base_version, tensors)
receiver.stage(chunk)                                   # while the model runs
receiver.prepare()                                      # complete? digests of what arrived; undo copy
receiver.install()                                      # the pause: in place, derived, read back, checked
receiver.publish()                                      # or undo(), or abort() from any state

IDLE -begin-> OPEN -prepare-> PREPARED -install-> INSTALLED -publish-> IDLE
                                       <--undo---            abort: IDLE, the old bytes, from anywhere
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from quant.layouts import Derived, Placement
from quant.parameters import ParameterRow

from .chunks import Chunk, check
from .digest import Digests, digest_rows
from .errors import (
    BusyError,
    DigestError,
    LayoutError,
    ManifestError,
    PlanError,
    TransferError,
    VersionError,
    raise_all,
)
from .inplace import AddressAudit, Storages, local_of
from .live import (
    Padding,
    Recompute,
    Shards,
    Span,
    Write,
    block_bytes_of,
    bytes_of,
    digests_of,
    merge_spans,
    plan_padding,
    plan_recomputes,
    plan_writes,
)
from .manifest import Manifest
from .staging import Arena, StagingBuffer, plan_staging

SLACK_BYTES = 8 << 20  # index arrays of the torch twins for a block, derived values, the interpreter's own
TENSOR_BYTES = 4 << 10  # Python objects that a transaction keeps for one tensor


class State(enum.Enum):
    """Where a receiver stands."""

    IDLE = "idle"
    OPEN = "open"
    PREPARED = "prepared"
    INSTALLED = "installed"


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


@dataclass(slots=True, kw_only=True, eq=False)
class _Push:
    """One transaction, planned: what is executed later has no decisions left."""

    transaction: int
    version: int
    writes: list[Write]
    rows: list[Tensor]  # staged, as each write takes them
    staging: StagingBuffer
    undo: list[tuple[Tensor, Tensor]]  # live bytes, their copy
    recomputes: list[Recompute]
    padding: list[Padding]
    scratch: Tensor
    staged: Digests | None = None


class Receiver:
    """The storages of one rank and the transaction that rewrites them.

    storages: live tensors by name (of a DTensor the local shard), written in place, never replaced. placements: where
    each checkpoint tensor lies. derived: values recomputed from storages. shards: units [start, stop) of each storage
    that this rank holds, by default all. Bytes that nothing fills are padding and stay zero. live: looks the storages
    up anew for the address audit. All memory is host memory.
    """

    def __init__(
        self,
        storages: Mapping[str, Tensor],
        placements: Sequence[Placement],
        derived: Sequence[Derived] = (),
        *,
        shards: Shards | None = None,
        parameters: Sequence[ParameterRow] = (),
        memory_budget_bytes: int | None = None,
        version: int = 0,
        live: Storages | None = None,
    ) -> None:
        self.manifest = Manifest(
            tensors=tuple(placement.tensor for placement in placements), parameters=tuple(parameters)
        )
        self.version = version
        self.state = State.IDLE
        self._budget_bytes = memory_budget_bytes
        self._storages = dict(storages)
        self._bytes = {name: bytes_of(name, local_of(tensor)) for name, tensor in storages.items()}
        self._writes = plan_writes(self._bytes, placements, derived, {} if shards is None else shards)
        self._recomputes = plan_recomputes(self._storages, derived)
        self._padding = plan_padding(self._bytes, self._writes)
        self._audit = AddressAudit.capture(self._storages if live is None else live)
        self._arena = Arena()
        self._push: _Push | None = None
        # Guards the state, and the live bytes between an install and a re-read. Staging has its own lock, so that bytes
        # arrive meanwhile.
        self._lock = threading.RLock()
        self.row_start = np.array([write.row0 for write in self._writes], np.int64)
        self.row_stop = self.row_start + np.array([write.num_rows for write in self._writes], np.int64)

    @classmethod
    def from_module(cls, model: nn.Module, *, memory_budget_bytes: int | None = None, version: int = 0) -> Receiver:
        """The receiver of a model of quant.models, sharded by FSDP2 or not; call it while the model is sharded."""
        from quant.models import derived_of, parameters_of, placements_of, storage_parameters  # only here: a library
        from sharding.fsdp import unit_range  # of named storages needs neither

        held = storage_parameters(model)
        return cls(
            held,
            placements_of(model),
            derived_of(model),
            shards={name: unit_range(parameter) for name, parameter in held.items()},
            parameters=parameters_of(model),
            memory_budget_bytes=memory_budget_bytes,
            version=version,
            live=lambda: storage_parameters(model),
        )

    # -- the transaction

    def begin(
        self,
        transaction: int,
        version: int,
        base_version: int,
        tensors: npt.NDArray[np.integer[Any]] | Sequence[int],
        *,
        in_flight_bytes: int = 0,
    ) -> MemoryPlan:
        """Open a transaction over these tensors of the manifest; reserves all the memory that it will need.

        in_flight_bytes: what the caller's transport may hold at a time, counted in the plan and against the budget.
        """
        with self._lock:
            self._expect("begin", State.IDLE)
            if base_version != self.version or version <= self.version:
                raise VersionError(
                    f"version {version} on base {base_version}: this rank holds {self.version}; describe again"
                )
            self._push, memory = self._plan(transaction, version, self._checked(tensors), in_flight_bytes)
            self.state = State.OPEN
            return memory

    def stage(self, chunk: Chunk, transaction: int | None = None) -> int:
        """Check a chunk and put it where it belongs; returns the bytes staged so far. Any thread, any order, any number
        of times. transaction: refuse the chunk unless this one is open."""
        push = self._push
        if push is None or (transaction is not None and transaction != push.transaction):
            held = "none" if push is None else f"{push.transaction}"
            raise BusyError(f"chunk {chunk.sequence} of transaction {transaction}: the open one is {held}; begin again")
        check(chunk)
        return push.staging.place(chunk)

    def prepare(self) -> Digests:
        """Everything is here: digests of the staged rows, [n, 2] in the order of begin. Takes the undo copy."""
        with self._lock:
            push = self._expect("prepare", State.OPEN)
            missing = [f"{name}: bytes [{first}, {stop})" for name, (first, stop) in push.staging.missing()]
            raise_all(TransferError, "prepare: rows have not arrived; send them", missing)
            push.staging.close()
            push.staged = np.array(
                [digest_rows(write.key, rows, write.row0) for write, rows in zip(push.writes, push.rows, strict=True)],
                np.uint64,
            )
            for live, copy in push.undo:
                copy.copy_(live)
            self.state = State.PREPARED
            return push.staged

    def install(self) -> Digests:
        """Write in place, recompute what is derived, read back: digests of the installed rows, [n, 2].

        Whatever fails puts the old bytes back before it is raised; the transaction is then prepared again.
        """
        with self._lock:
            push = self._expect("install", State.PREPARED)
            self.state = State.INSTALLED
            try:
                return self._install(push)
            except BaseException:
                self.undo()
                raise

    def undo(self) -> None:
        """Put the bytes from before install back, derived values included."""
        with self._lock:
            push = self._expect("undo", State.INSTALLED)
            for live, copy in push.undo:
                live.copy_(copy)
            self.state = State.PREPARED

    def publish(self) -> None:
        """What is installed is the version from now on."""
        with self._lock:
            push = self._expect("publish", State.INSTALLED)
            self.version = push.version
            self._end(push)

    def abort(self) -> None:
        """Back to the old bytes and to idle, from any state; nothing where nothing is open."""
        with self._lock:
            if self._push is None:
                return
            if self.state is State.INSTALLED:
                self.undo()
            self._end(self._push)

    def digests(self, tensors: npt.NDArray[np.integer[Any]] | Sequence[int] | None = None) -> Digests:
        """Digests of the live bytes of these tensors, all by default, [n, 2]."""
        with self._lock:
            writes = self._writes if tensors is None else [self._writes[int(i)] for i in tensors]
            return digests_of(writes, torch.empty(block_bytes_of(writes), dtype=torch.uint8))

    # -- what is there

    def staged(self) -> dict[str, Tensor]:
        """This rank's rows of the open transaction by tensor, uint8 [n, row_bytes], views; whole once prepared."""
        push = self._push
        return {} if push is None else {w.placement.tensor.name: r for w, r in zip(push.writes, push.rows, strict=True)}

    def live(self, tensor: int, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, which this rank holds, as they are served: uint8 [n, row_bytes], a copy."""
        with self._lock:
            return self._writes[tensor].read(start, stop)

    @property
    def staged_bytes(self) -> int:
        """Bytes staged so far in the open transaction, duplicates not counted."""
        push = self._push
        return 0 if push is None else push.staging.staged_bytes

    @property
    def reserved_bytes(self) -> int:
        """Bytes of staging, undo and scratch that are kept, touched, from one push to the next."""
        return self._arena.num_bytes

    def audit(self) -> None:
        """Raise LayoutError unless every storage is where it was when this receiver was built."""
        with self._lock:
            self._audit.check()

    def storage_bytes(self) -> dict[str, bytes]:
        """A copy of every storage of this rank, as it lies in memory."""
        with self._lock:
            return {name: data.numpy().tobytes() for name, data in self._bytes.items()}

    def storage_addresses(self) -> dict[str, int]:
        """The data pointer of every storage of this rank."""
        return {name: local_of(tensor).data_ptr() for name, tensor in self._storages.items()}

    # -- planning

    def _expect(self, what: str, state: State) -> _Push:
        if self.state is not state:
            by = f" by transaction {self._push.transaction}" if self._push else ""
            raise BusyError(f"{what}: this rank is {self.state.value}{by}, expected {state.value}; abort, or wait")
        return self._push  # type: ignore[return-value]

    def _checked(self, tensors: npt.NDArray[np.integer[Any]] | Sequence[int]) -> list[int]:
        indices = [int(i) for i in tensors]
        count = len(self._writes)
        problems = [f"tensor {i}: the manifest has {count}" for i in indices if not 0 <= i < count]
        problems += ["no tensor"] if not indices else []
        problems += ["a tensor is named twice"] if len(set(indices)) != len(indices) else []
        raise_all(ManifestError, "begin refused", problems)
        return indices

    def _plan(
        self, transaction: int, version: int, indices: list[int], in_flight_bytes: int
    ) -> tuple[_Push, MemoryPlan]:
        writes = [self._writes[i] for i in indices]
        recomputes = self._stale({write.span[0] for write in writes if write.num_rows})
        derived = [(each.name, 0, self._bytes[each.name].numel()) for each in recomputes]
        spans = merge_spans([*(write.span for write in writes), *derived])
        layout = plan_staging(
            [write.placement.tensor for write in writes], self.row_start[indices], self.row_stop[indices]
        )
        undo_bytes = sum(stop - first for _, first, stop in spans)
        block_bytes = block_bytes_of(writes)
        memory = MemoryPlan(
            staging_bytes=layout.num_bytes,
            undo_bytes=undo_bytes,
            scratch_bytes=block_bytes + SLACK_BYTES + TENSOR_BYTES * len(writes),
            in_flight_bytes=in_flight_bytes,
        )
        self._require_budget(memory)
        arena = self._arena.reserve(layout.num_bytes + block_bytes + undo_bytes)
        staging = StagingBuffer(layout, arena[: layout.num_bytes])
        push = _Push(
            transaction=transaction,
            version=version,
            writes=writes,
            rows=[staging.rows(i) for i in range(len(writes))],
            staging=staging,
            undo=self._copies(spans, arena[layout.num_bytes + block_bytes :]),
            recomputes=recomputes,
            padding=[each for name in {span[0]: None for span in spans} for each in self._padding.get(name, ())],
            scratch=arena[layout.num_bytes : layout.num_bytes + block_bytes],
        )
        return push, memory

    def _copies(self, spans: Sequence[Span], memory: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Live bytes and where their copy goes, one after the other in `memory`."""
        copies, at = [], 0
        for name, first, stop in spans:
            copies.append((self._bytes[name][first:stop], memory[at : at + stop - first]))
            at += stop - first
        return copies

    def _stale(self, touched: set[str]) -> list[Recompute]:
        """Derived values, in their order, that follow from these storages or from each other."""
        stale = []
        for each in self._recomputes:
            if touched & set(each.sources):
                stale.append(each)
                touched = touched | {each.name}
        return stale

    def _require_budget(self, memory: MemoryPlan) -> None:
        if self._budget_bytes is not None and memory.peak_bytes > self._budget_bytes:
            raise PlanError(
                f"this push needs {memory.peak_bytes} bytes above idle on this rank (staging {memory.staging_bytes},"
                f" undo {memory.undo_bytes}, scratch {memory.scratch_bytes}, in flight {memory.in_flight_bytes}),"
                f" the budget is {self._budget_bytes}; push fewer tensors at a time or raise the budget"
            )

    # -- execution

    def _install(self, push: _Push) -> Digests:
        for write, rows in zip(push.writes, push.rows, strict=True):
            write.apply(rows)
        for each in push.recomputes:
            each.apply()
        installed = digests_of(push.writes, push.scratch)
        self._verify(push, installed)
        return installed

    def _verify(self, push: _Push, installed: Digests) -> None:
        assert push.staged is not None
        problems = [
            f"{push.writes[i].placement.tensor.name}: installed {_hex(installed[i])}, staged {_hex(push.staged[i])}"
            for i in np.flatnonzero((installed != push.staged).any(axis=1))
        ]
        raise_all(DigestError, "install: what is read back is not what was staged; the old bytes are back", problems)
        stained = [problem for each in push.padding if (problem := each.problem(push.scratch)) is not None]
        raise_all(LayoutError, "install: padding was written; the old bytes are back", stained)
        self._audit.check()

    def _end(self, push: _Push) -> None:
        push.staging.close()
        self._push, self.state = None, State.IDLE


def _hex(digest: npt.NDArray[np.uint64]) -> str:
    return "".join(f"{int(lane):016x}" for lane in digest)
