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

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from quant.layouts import Derived, Placement
from quant.parameters import ParameterRow

from .chunks import Chunk, check
from .digest import Digests, digest_rows
from .errors import BusyError, DigestError, LayoutError, ManifestError, PlanError, TransferError, VersionError, raise_all
from .inplace import AddressAudit, Storages
from .live import (
    BLOCK_BYTES,
    Padding,
    Recompute,
    Shards,
    Write,
    bytes_of,
    merge_spans,
    plan_padding,
    plan_recomputes,
    plan_writes,
)
from .manifest import Manifest
from .staging import Arena, StagingBuffer, StagingPlan, plan_staging

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
    """Bytes above idle that a transaction needs on this rank; messages in flight are the transport's."""

    staging_bytes: int
    undo_bytes: int
    scratch_bytes: int

    @property
    def peak_bytes(self) -> int:
        return self.staging_bytes + self.undo_bytes + self.scratch_bytes


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

    storages: live local tensors by name, written in place, never replaced. placements: where each checkpoint tensor lies.
    derived: values recomputed from storages. shards: units [start, stop) of each storage that this rank holds, by default
    all. Bytes that nothing fills are padding and stay zero. live: looks storages up anew for the address audit.
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
        self._bytes = {name: bytes_of(name, tensor) for name, tensor in storages.items()}
        self._writes = plan_writes(self._bytes, placements, derived, {} if shards is None else shards)
        self._recomputes = plan_recomputes(storages, derived)
        self._padding = plan_padding(self._bytes, self._writes)
        self._audit = AddressAudit.capture(dict(storages) if live is None else live)
        self._arena = Arena()
        self._push: _Push | None = None
        # Guards the state, and the live bytes between an install and a re-read. Staging has its own lock, so that bytes
        # arrive meanwhile.
        self._lock = threading.RLock()
        self.row_start = np.array([write.row0 for write in self._writes], np.int64)
        self.row_stop = self.row_start + np.array([write.num_rows for write in self._writes], np.int64)

    @classmethod
    def from_module(
        cls, model: nn.Module, *, memory_budget_bytes: int | None = None, version: int = 0
    ) -> Receiver:
        """The receiver of a model of quant.models, sharded by FSDP2 or not; call it while the model is sharded."""
        from quant.models import derived_of, parameters_of, placements_of, storage_parameters  # only here: a library
        from sharding.fsdp import unit_range  # of named storages needs neither

        held = storage_parameters(model)
        return cls(
            {name: _local(parameter) for name, parameter in held.items()},
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
        self, transaction: int, version: int, base_version: int, tensors: npt.NDArray[np.integer] | Sequence[int]
    ) -> MemoryPlan:
        """Open a transaction over these tensors of the manifest; reserves all memory that it will need."""
        with self._lock:
            self._expect("begin", State.IDLE)
            if base_version != self.version or version <= self.version:
                raise VersionError(
                    f"version {version} on base {base_version}: this rank holds {self.version}; describe again"
                )
            indices = self._checked(tensors)
            writes = [self._writes[i] for i in indices]
            staging = plan_staging(
                [write.placement.tensor for write in writes], self.row_start[indices], self.row_stop[indices]
            )
            self._push = self._plan(transaction, version, writes, staging)
            self.state = State.OPEN
            return self._memory(writes, staging)[0]

    def stage(self, chunk: Chunk, transaction: int | None = None) -> int:
        """Check a chunk and put it where it belongs; returns the bytes staged so far. Any thread, any order, any number
        of times. transaction: refuse the chunk unless this one is open."""
        push = self._push
        if push is None or (transaction is not None and transaction != push.transaction):
            held = "none" if push is None else f"{push.transaction}"
            raise BusyError(f"chunk {chunk.sequence} of transaction {transaction}: the open one is {held}; begin again")
        check(chunk)
        return push.staging.place(chunk)
