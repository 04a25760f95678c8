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

from quant.layouts import Derived, Placement, invert_rows
from quant.parameters import ParameterRow

from .chunks import Chunk, check
from .delta import BlobSize, Patch, Positions
from .devices import DEVICES
from .digest import Digests, Lanes, summed
from .errors import BusyError, ManifestError, VersionError, raise_all
from .holdings import ABSENT, Holdings, holdings_of
from .inplace import Storages, local_of
from .install import Changes, Install, MemoryPlan
from .live import Shards, plan_live
from .manifest import Manifest

MAX_MARKED = 16  # installs whose changes are kept one by one
Indices = npt.NDArray[np.integer[Any]] | Sequence[int]


class State(enum.Enum):
    """Where a receiver stands."""

    IDLE = "idle"
    OPEN = "open"
    PREPARED = "prepared"
    INSTALLED = "installed"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reverse:
    """What leads this rank's bytes from one version back to the one that it built on. Tensors are of the manifest."""

    version: int
    base_version: int
    patches: tuple[Patch, ...]

    @property
    def num_bytes(self) -> int:
        return sum(
            patch.values.nbytes + (0 if patch.positions is None else patch.positions.nbytes) for patch in self.patches
        )


class Receiver:
    """The storages of one rank and the transaction that rewrites them.

    storages: live tensors by name (of a DTensor the local shard), written in place, never replaced. placements: where
    each checkpoint tensor lies. derived: values recomputed from storages. shards: units [start, stop) of each storage
    that this rank holds, by default all. Bytes that nothing fills are padding and stay zero. live: looks the storages
    up anew for the address audit. All storages lie on one device: the host, or a CUDA device.
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
        self._live = plan_live(
            storages,
            placements,
            derived,
            {} if shards is None else shards,
            self._storages if live is None else live,
        )
        self._device = DEVICES[self._live.device.type](self._live)
        self._install: Install | None = None
        self._last: tuple[Install, int] | None = None  # the published one whose undo is still there, and its base
        self._which, self._listed = np.zeros(0, np.int64), list[int]()  # the tensors of the last transaction, both ways
        self._known = np.zeros((len(placements), 2), np.uint64)  # digests of the live rows of this rank
        self._is_known = np.zeros(len(placements), np.bool_)
        self._stale: dict[str, list[Positions] | None] = {each.tensor.name: None for each in placements}
        self._marked: list[Changes] = []  # what was written since, and is not yet in _stale
        # Guards the state, and the live bytes between an install and a re-read. Staging has its own lock, so that bytes
        # arrive meanwhile.
        self._lock = threading.RLock()
        writes = self._live.writes
        self.row_start = np.array([write.row0 for write in writes], np.int64)
        self.row_stop = self.row_start + np.array([write.num_rows for write in writes], np.int64)

    @classmethod
    def from_module(cls, model: nn.Module, *, memory_budget_bytes: int | None = None, version: int = 0) -> Receiver:
        """The receiver of a model of quant.models, sharded by FSDP2 or not; call it while the model is sharded."""
        return cls.of(holdings_of(model), memory_budget_bytes=memory_budget_bytes, version=version)

    @classmethod
    def of(cls, holdings: Holdings, *, memory_budget_bytes: int | None = None, version: int = 0) -> Receiver:
        """The receiver of what an engine holds, whoever's model it is."""
        return cls(
            holdings.storages(),
            holdings.placements,
            holdings.derived,
            shards=holdings.shards,
            parameters=holdings.parameters,
            memory_budget_bytes=memory_budget_bytes,
            version=version,
            live=holdings.storages,
        )

    # -- the transaction

    def begin(
        self,
        transaction: int,
        version: int,
        base_version: int,
        tensors: Indices,
        *,
        in_flight_bytes: int = 0,
        blobs: Sequence[BlobSize] | None = None,
        patches: Sequence[Patch] = (),
    ) -> MemoryPlan:
        """Open a transaction over these tensors of the manifest; reserves all the memory that it will need.

        in_flight_bytes: what the caller's transport may hold at a time, counted in the plan and against the budget.
        blobs: a delta comes instead of whole tensors, of these sizes, one a trainer rank; chunks name the trainer rank
        where they name a tensor otherwise. patches: part of a delta that is here already (with blobs=()), whose tensors
        are positions in `tensors`.
        """
        with self._lock:
            self._expect("begin", State.IDLE)
            if base_version != self.version or version <= self.version:
                raise VersionError(
                    f"version {version} on base {base_version}: this rank holds {self.version}; describe again"
                )
            indices = self._checked(tensors)
            begun = (transaction, version, indices, in_flight_bytes)
            if blobs is None:
                install = self._device.full(*begun)
            else:
                install = self._device.delta(*begun, base=self._base_digests(), blobs=blobs, patches=patches)
            install.memory.require(self._budget_bytes)
            self._last = None  # its undo lies in the memory that is taken now
            self._device.reserve(install)
            self._install, self.state = install, State.OPEN
            return install.memory

    def stage(self, chunk: Chunk, transaction: int | None = None) -> int:
        """Check a chunk and put it where it belongs; returns the bytes staged so far. Any thread, any order, any number
        of times. transaction: refuse the chunk unless this one is open."""
        install = self._install
        if install is None or (transaction is not None and transaction != install.transaction):
            held = "none" if install is None else f"{install.transaction}"
            raise BusyError(f"chunk {chunk.sequence} of transaction {transaction}: the open one is {held}; begin again")
        check(chunk)
        return install.staging.place(chunk)

    def prepare(self) -> Digests:
        """Everything is here: digests of the rows as they will be, [n, 2] in the order of begin. Takes the undo copy;
        of a delta, says where every changed byte goes."""
        with self._lock:
            digests = self._expect("prepare", State.OPEN).prepare()
            self.state = State.PREPARED
            return digests

    def install(self) -> Digests:
        """Write in place, recompute what is derived, read back: digests of the installed rows, [n, 2].

        Whatever fails puts the old bytes back before it is raised; the transaction is then prepared again.
        """
        with self._lock:
            install = self._expect("install", State.PREPARED)
            self.state = State.INSTALLED
            self._mark_stale(install)
            try:
                self._written = install.write()
            except BaseException:
                self.undo()
                raise
            return self._written

    def undo(self) -> None:
        """Put the bytes from before install back, derived values included."""
        with self._lock:
            install = self._expect("undo", State.INSTALLED)
            self._mark_stale(install)
            install.undo()
            self.state = State.PREPARED

    def publish(self) -> None:
        """What is installed is the version from now on."""
        with self._lock:
            install = self._expect("publish", State.INSTALLED)
            self._known[self._which], self._is_known[self._which] = self._written, True
            self._last = install, self.version
            self.version = install.version
            self._end(install)

    def abort(self) -> None:
        """Back to the old bytes and to idle, from any state; nothing where nothing is open."""
        with self._lock:
            if self._install is None:
                return
            if self.state is State.INSTALLED:
                self.undo()
            self._end(self._install)

    def digests(self, tensors: Indices | None = None) -> Digests:
        """Digests of the live bytes of these tensors, all by default, [n, 2]; every byte is read."""
        with self._lock:
            return self._device.digests(range(len(self._live.writes)) if tensors is None else [int(i) for i in tensors])

    def rows(self, version: int, tensor: int, first: int, stop: int) -> Tensor:
        """Live rows [first, stop) of a tensor of the manifest in checkpoint form, uint8 [n, row_bytes], copied to host
        memory; VersionError unless they are this version's."""
        with self._lock:
            self._require_version(version)
            write = self._live.writes[tensor]
            if not write.row0 <= first <= stop <= write.row0 + write.num_rows:
                raise VersionError(
                    f"{write.placement.tensor.name}: rows [{first}, {stop}) of version {version}, this rank holds"
                    f" [{write.row0}, {write.row0 + write.num_rows}); describe the service again"
                )
            return invert_rows(write.placement, first, stop - first, write.local, write.base).cpu()

    def read_back(self, version: int, tensors: Sequence[int]) -> Digests:
        """Digests of all live rows of these tensors, [n, 2]; VersionError unless they are this version's."""
        with self._lock:
            self._require_version(version)
            return self._device.digests(tensors)

    def installed_digests(self, version: int, tensors: Sequence[int]) -> tuple[Digests, npt.NDArray[np.bool_]]:
        """Digests of this rank's rows of tensors as they were read back when they were installed, [n, 2], and of which
        anything was; VersionError unless they are this version's."""
        with self._lock:
            self._require_version(version)
            return self._known[tensors], self._is_known[tensors]

    def known_digest(self) -> Lanes | None:
        """Digest of all of this rank's rows as they were last read back; None where some never were."""
        with self._lock:
            return summed(self._known) if self._is_known.all() else None

    @property
    def last_undo_bytes(self) -> int:
        """Bytes that the last publish overwrote; 0 once the next transaction began."""
        with self._lock:
            return 0 if self._last is None else self._last[0].memory.undo_bytes

    def last_undo(self) -> Reverse | None:
        """The reverse delta of the last publish, in memory of its own; None once the next transaction began."""
        with self._lock:
            if self._last is None:
                return None
            install, base_version = self._last
            return Reverse(version=install.version, base_version=base_version, patches=tuple(install.reverse()))

    def changes(self) -> Changes:
        """Which bytes the open transaction will write, once it is prepared."""
        with self._lock:
            return self._expect("changes", State.PREPARED).changes()

    def arrived(self) -> dict[str, Tensor]:
        """This rank's rows of the tensors that the prepared transaction brings whole, by name: uint8 [n, row_bytes],
        views."""
        with self._lock:
            return self._expect("arrived", State.PREPARED).arrived()

    def take_stale(self) -> dict[str, Positions | None]:
        """Tensors whose live bytes were written since the last call, and which bytes of them; None for any of them."""
        with self._lock:
            self._sort_marked()
            stale, self._stale = self._stale, {}
            return {name: _joined(parts) for name, parts in stale.items()}

    # -- what is there

    @property
    def device(self) -> torch.device:
        """Where the storages are."""
        return next((data.device for data in self._live.bytes.values()), torch.device("cpu"))

    @property
    def staged_bytes(self) -> int:
        """Bytes staged so far in the open transaction, duplicates not counted."""
        install = self._install
        return 0 if install is None else install.staging.staged_bytes

    @property
    def reserved_bytes(self) -> int:
        """Bytes of staging, undo and scratch that are kept, touched, from one push to the next."""
        return self._device.reserved_bytes

    def audit(self) -> None:
        """Raise LayoutError unless every storage is where it was when this receiver was built."""
        with self._lock:
            self._live.audit.check()

    def is_absent(self, tensor: int) -> bool:
        """Whether a tensor of the manifest is one that only replicas of other formats hold."""
        return self._live.writes[tensor].placement.storage == ABSENT

    def storage_bytes(self) -> dict[str, bytes]:
        """A copy of every storage of this rank, as it lies in memory."""
        with self._lock:
            return {name: data.cpu().numpy().tobytes() for name, data in self._live.bytes.items()}

    def storage_addresses(self) -> dict[str, int]:
        """The data pointer of every storage of this rank."""
        return {name: local_of(tensor).data_ptr() for name, tensor in self._storages.items()}

    # -- planning

    def _expect(self, what: str, state: State) -> Install:
        if self.state is not state:
            by = f" by transaction {self._install.transaction}" if self._install else ""
            raise BusyError(f"{what}: this rank is {self.state.value}{by}, expected {state.value}; abort, or wait")
        return self._install  # type: ignore[return-value]

    def _require_version(self, version: int) -> None:
        if version != self.version or self.state is State.INSTALLED:
            held = f"{self.version}" + (", and its next is being installed" if version == self.version else "")
            raise VersionError(f"rows of version {version}: this rank holds {held}; ask for the current version")

    def _checked(self, tensors: Indices) -> list[int]:
        given, count = np.asarray(tensors, np.int64), len(self._live.writes)
        if len(given) and np.array_equal(given, self._which):
            return self._listed
        outside = given[(given < 0) | (given >= count)].tolist()
        problems = [f"tensor {i}: the manifest has {count}" for i in outside]
        problems += ["no tensor"] if not len(given) else []
        problems += ["a tensor is named twice"] if len(np.unique(given)) != len(given) else []
        raise_all(ManifestError, "begin refused", problems)
        self._which, self._listed = given, given.tolist()
        return self._listed

    def _base_digests(self) -> Digests:
        """Digests of this rank's rows as they were last read back; what was never read is read now."""
        unknown = self._which[~self._is_known[self._which]]
        if len(unknown):
            self._known[unknown], self._is_known[unknown] = self.digests(unknown), True
        known: Digests = self._known[self._which]
        return known

    def _mark_stale(self, install: Install) -> None:
        """Note what is written; serving has stopped, so it is sorted later."""
        self._marked.append(install.changes())
        if len(self._marked) > MAX_MARKED:
            self._sort_marked()

    def _sort_marked(self) -> None:
        marked, self._marked = self._marked, []
        for changes in marked:
            if set(map(type, changes.values())) <= {type(None)}:  # whole tensors, of which there may be very many
                self._stale |= dict.fromkeys(changes)
                continue
            for name, positions in changes.items():
                before = self._stale.get(name, [])
                self._stale[name] = None if positions is None or before is None else [*before, positions]

    def _end(self, install: Install) -> None:
        install.staging.close()
        self._install, self.state = None, State.IDLE


def _joined(parts: list[Positions] | None) -> Positions | None:
    """All of them; the very array where there is one, since plans are made for it."""
    return np.concatenate(parts) if parts is not None and len(parts) > 1 else parts[0] if parts else None
