"""Transactions on a CUDA device: staged on a side stream, installed on their own, the pause timed by events.

Rows arrive in device memory while the model runs: out of a ring in that memory, or through pinned memory of one chunk's
size. What a pause does is launched whole and waited for once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .cuda import Bytes, Chosen, Moves, Table, as_digests
from .delta import DEVICE_MAGIC, BlobSize, DeviceDelta, Patch, Positions, check_apart, patches_of, unpack
from .digest import Digests
from .errors import TransferError, raise_all
from .install import Changes, FullInstall, FullPlan, Install, Plans, require_equal
from .live import Live
from .patching import DeltaInstall, Dense, Ground
from .staging import Arena, StagingBuffer, StagingPlan

Indices = npt.NDArray[np.int64]


class Cuda:
    """The installs of a receiver whose storages are on a CUDA device, and what they share."""

    def __init__(self, live: Live) -> None:
        self.live, self.device = live, live.device
        self.table = Table(live.writes)
        self.table.select(range(len(live.writes))).compile()
        self._plans, self._grounds = Plans(partial(FullPlan.of, live)), Plans(partial(Ground.of, live))
        self._chosen = Plans(self.table.select)
        self.arena, self.pinned = Arena(self.device), Arena(pinned=True)
        self.side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]  # staging
        self.own = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]  # installs
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        self.timed = False

    @property
    def reserved_bytes(self) -> int:
        return self.arena.num_bytes + self.pinned.num_bytes

    @property
    def pause_ms(self) -> float:
        """How long the last write or undo took on the device; 0 before the first one."""
        return self.events[0].elapsed_time(self.events[1]) if self.timed else 0.0

    def full(self, transaction: int, version: int, indices: Sequence[int], in_flight_bytes: int) -> Install:
        return CudaFull(
            self, self._plans.of(indices), self._chosen.of(indices), transaction, version, in_flight_bytes
        )

    def delta(
        self,
        transaction: int,
        version: int,
        indices: Sequence[int],
        in_flight_bytes: int,
        *,
        base: Digests,
        blobs: Sequence[BlobSize],
        patches: Sequence[Patch],
    ) -> Install:
        return CudaDelta(
            self,
            self._grounds.of(indices),
            self._chosen.of(indices),
            transaction,
            version,
            in_flight_bytes,
            base=base,
            blobs=blobs,
            patches=patches,
        )

    def reserve(self, install: CudaFull | CudaDelta) -> None:
        install.reserve(self.arena)

    def digests(self, indices: Sequence[int]) -> Digests:
        return as_digests(self.table.select(indices).digest())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """On the stream of installs, after all that the current one was given; timed, and waited for."""
        current = torch.cuda.current_stream(self.device)
        self.own.wait_stream(current)
        with torch.cuda.stream(self.own):
            self.events[0].record()
            try:
                yield
            finally:
                self.events[1].record()
                self.events[1].synchronize()
                self.timed = True
        current.wait_stream(self.own)


class DeviceStaging(StagingBuffer):
    """Rows arrive in a GPU's memory: from there in one launch a chunk, from the host through pinned memory of a chunk's
    size, on a side stream."""

    def __init__(self, plan: StagingPlan, memory: Tensor, stream: torch.cuda.Stream, pinned: Arena) -> None:
        super().__init__(plan, memory)
        self._stream, self._pinned = stream, pinned
        stream.wait_stream(torch.cuda.current_stream(memory.device))  # whatever used this memory before

    def _copy(self, payload: memoryview | Tensor, starts: Indices, lengths: Indices) -> None:
        with torch.cuda.device(self.memory.device), torch.cuda.stream(self._stream):
            if not isinstance(payload, Tensor) or payload.device != self.memory.device:
                payload = self._brought(payload)
            before = payload.data_ptr() + np.cumsum(lengths) - lengths
            Moves(before, self.memory.data_ptr() + starts, lengths, self.memory.device).run()
            self._stream.synchronize()

    def _brought(self, payload: memoryview | Tensor) -> Tensor:
        """A payload of the host on the device."""
        pinned = self._pinned.reserve(len(payload))
        if isinstance(payload, Tensor):
            pinned.copy_(payload)
        else:
            pinned.numpy()[:] = np.frombuffer(payload, np.uint8)
        return pinned.to(self.memory.device, non_blocking=True)

    def _settle(self) -> None:
        self._stream.synchronize()


class CudaFull(FullInstall):
    """Whole tensors, a launch for each kind of row."""

    def __init__(
        self, cuda: Cuda, plan: FullPlan, chosen: Chosen, transaction: int, version: int, in_flight_bytes: int
    ) -> None:
        super().__init__(cuda.live, plan, transaction, version, in_flight_bytes)
        self.cuda, self._chosen = cuda, chosen

    def reserve(self, arena: Arena) -> None:
        plan, staged, block = self.plan, self.plan.layout.num_bytes, self.plan.writes.block_bytes
        memory = arena.reserve(staged + block + self.memory.undo_bytes)
        self.staging = DeviceStaging(plan.layout, memory[:staged], self.cuda.side, self.cuda.pinned)
        self._scratch = memory[staged : staged + block]
        self._undo = self._copies(memory[staged + block :])
        self._at = torch.from_numpy(plan.layout.at + memory.data_ptr()).to(memory.device)

    def prepare(self) -> Digests:
        missing = [f"{name}: bytes [{first}, {stop})" for name, (first, stop) in self.staging.missing()]
        raise_all(TransferError, "prepare: rows have not arrived; send them", missing)
        self.staging.close()
        for live, copy in self._undo:
            copy.copy_(live)
        self._staged = as_digests(self._chosen.digest(self._at))
        return self._staged

    def write(self) -> Digests:
        with self.cuda.paused():
            self._chosen.scatter(self._at)
            for each in self.plan.recomputes:
                each.apply()
            lanes = self._chosen.digest()
        installed = as_digests(lanes)
        self._require_installed(installed)
        return installed

    def undo(self) -> None:
        with self.cuda.paused():
            super().undo()


class CudaDelta(DeltaInstall):
    """Changed bytes, all tensors together; rows that come whole one after the other."""

    def __init__(
        self,
        cuda: Cuda,
        ground: Ground,
        chosen: Chosen,
        transaction: int,
        version: int,
        in_flight_bytes: int,
        *,
        base: Digests,
        blobs: Sequence[BlobSize],
        patches: Sequence[Patch],
    ) -> None:
        super().__init__(
            cuda.live, ground, transaction, version, in_flight_bytes, base=base, blobs=blobs, patches=patches
        )
        self.cuda, self.layout, self._chosen = cuda, self._layout, chosen
        self._bytes: Bytes | None = None
        self._on_device: list[DeviceDelta] = []

    def reserve(self, arena: Arena) -> None:
        staged = self._layout.num_bytes
        memory = arena.reserve(staged + self._ground.block_bytes)
        self.staging = DeviceStaging(self._layout, memory[:staged], self.cuda.side, self.cuda.pinned)
        self._scratch = memory[staged:]

    def prepare(self) -> Digests:
        missing = [f"{name}: bytes [{first}, {stop})" for name, (first, stop) in self.staging.missing()]
        raise_all(TransferError, "prepare: the delta has not arrived; send it", missing)
        self.staging.close()
        patches = [*self._patches, *self._unpacked()]
        self._sparse = sorted(
            (patch for patch in patches if patch.positions is not None), key=lambda patch: (patch.tensor, patch.first)
        )
        self._dense = [
            Dense(self.indices[patch.tensor], self._writes[patch.tensor], patch, self._scratch)
            for patch in patches
            if patch.positions is None
        ]
        self._listed = self._joined()
        self._bytes = self._chosen.changes(*self._listed)
        moved = self._moved(self._dense, [part.into for part in self._dense])
        self._staged: Digests = moved + as_digests(self._bytes.moved)
        self._touched = self._in_device_blobs()
        tensors = {patch.tensor for patch in self._sparse} | set(self._touched)
        touched = {part.write.span[0] for part in self._dense} | {self._writes[i].span[0] for i in tensors}
        self._stale = self._live.stale(touched)
        self._derived = [(each.target, each.target.clone()) for each in self._stale]
        self._noted = self._changes()
        return self._staged

    def _unpacked(self) -> list[Patch]:
        """The patches of blobs that the host packed. Those of a device are left as they are."""
        ground = self._ground
        patches: list[Patch] = []
        for i, size in enumerate(self._blobs):
            blob = self.staging.rows(i).reshape(-1)
            if blob[: len(DEVICE_MAGIC)].cpu().numpy().tobytes() == DEVICE_MAGIC:
                columns = (
                    torch.from_numpy(each).to(blob.device) for each in (ground.row_bytes, ground.starts, ground.stops)
                )
                self._on_device.append(DeviceDelta.of_blob(blob, size, *columns))
            else:
                patches += unpack(blob.cpu().numpy().data, size, ground.specs, ground.starts, ground.stops)
        check_apart(patches, ground.specs)
        return patches

    def _in_device_blobs(self) -> list[int]:
        """Tensors that blobs of a device touch."""
        return [int(i) for each in self._on_device for i in torch.unique_consecutive(each.tensors).tolist()]

    def _joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """All changed bytes as one list on the device, in the order of tensors and positions."""
        found = [_listed(self._sparse, self._chosen.device)] if self._sparse or not self._on_device else []
        found += [(each.tensors, each.positions, each.differences) for each in self._on_device]
        if len(found) == 1:
            return found[0]
        tensors, positions, differences = (torch.cat(each) for each in zip(*found, strict=True))
        order = torch.argsort(positions, stable=True)
        order = order[torch.argsort(tensors[order], stable=True)]
        tensors, positions = tensors[order], positions[order]
        if bool(((tensors[1:] == tensors[:-1]) & (positions[1:] == positions[:-1])).any()):
            raise TransferError("delta refused, nothing of it was written: bytes come twice")
        return tensors, positions, differences[order]

    def arrived(self) -> dict[str, Tensor]:
        return self.whole_of(self._dense)

    def write(self) -> Digests:
        changes = self._prepared_bytes()
        with self.cuda.paused():
            changes.apply()
            lanes = [part.apply() for part in self._dense]
            for each in self._stale:
                each.apply()
            installed = as_digests(changes.read_back() - changes.taken)
        installed = installed + self._moved(self._dense, lanes)
        require_equal(installed, self._staged, self._writes)
        self._live.audit.check()
        return installed

    def undo(self) -> None:
        changes = self._prepared_bytes()
        with self.cuda.paused():
            changes.undo()
            for part in self._dense:
                part.undo()
            for target, copy in self._derived:
                target.copy_(copy)

    def changes(self) -> Changes:
        return self._noted

    def _changes(self) -> Changes:
        found: dict[str, Positions | None] = {part.write.placement.tensor.name: None for part in self._dense}
        for tensor, patches in groupby(self._sparse, key=lambda patch: patch.tensor):
            name = self._writes[tensor].placement.tensor.name
            positions = [patch.positions for patch in patches if patch.positions is not None]
            found.setdefault(name, positions[0] if len(positions) == 1 else np.concatenate(positions))
        # Their positions stay on the device: whoever follows them reads all of these tensors.
        return found | {self._ground.specs[i].name: None for i in self._touched}

    def reverse(self) -> list[Patch]:
        on_device = (patch for each in self._on_device for patch in patches_of(each, self._ground.specs))
        sparse = [*self._sparse, *on_device]
        back = [
            Patch(
                tensor=self.indices[patch.tensor],
                first=patch.first,
                stop=patch.stop,
                positions=patch.positions,
                values=np.negative(patch.values),
            )
            for patch in sparse
        ]
        return [*back, *(part.reverse() for part in self._dense)]

    def _prepared_bytes(self) -> Bytes:
        assert self._bytes is not None
        return self._bytes


def _listed(patches: Sequence[Patch], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Patches as one list on the device: tensor, position, difference."""
    counts = [len(patch.values) for patch in patches]
    tensors = np.repeat(np.array([patch.tensor for patch in patches], np.int32), counts)
    none: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
    positions = np.concatenate([*none, *(patch.positions for patch in patches if patch.positions is not None)])
    values = np.concatenate([np.empty(0, np.uint8), *(patch.values for patch in patches)])
    found = (torch.from_numpy(np.ascontiguousarray(each)).to(device) for each in (tensors, positions, values))
    first, second, third = found
    return first, second, third
