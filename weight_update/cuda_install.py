"""Transactions on a CUDA device: staged on a side stream, installed on their own, the pause timed by events.

Rows arrive in pinned host memory and follow into device memory while the model runs (a transport that writes device
memory itself takes `StagingBuffer.rows`). What a pause does is launched whole and waited for once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .cuda import Bytes, Chosen, Table, as_digests
from .delta import BlobSize, Patch, Positions
from .digest import Digests
from .errors import LayoutError, TransferError, raise_all
from .install import Changes, FullInstall, Install, require_equal
from .live import Live
from .patching import DeltaInstall, Dense
from .staging import ALIGN_BYTES, Arena, StagingBuffer


class Cuda:
    """The installs of a receiver whose storages are on a CUDA device, and what they share."""

    def __init__(self, live: Live) -> None:
        self.live, self.device = live, live.device
        self.table = Table(live.writes)
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
        return CudaFull(self, transaction, version, indices, in_flight_bytes)

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
        return CudaDelta(self, transaction, version, indices, in_flight_bytes, base=base, blobs=blobs, patches=patches)

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


class Follower:
    """Device memory that follows pinned host memory on a side stream: a `staging.Mirror`."""

    def __init__(self, pinned: Tensor, memory: Tensor, stream: torch.cuda.Stream) -> None:
        self.memory, self._pinned, self._stream = memory, pinned, stream
        stream.wait_stream(torch.cuda.current_stream(memory.device))  # whatever used this memory before

    def send(self, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]) -> None:
        """Pieces that only padding lies between are one copy."""
        with torch.cuda.stream(self._stream):
            for first, stop in _runs(starts, stops):
                self.memory[first:stop].copy_(self._pinned[first:stop], non_blocking=True)

    def wait(self) -> None:
        self._stream.synchronize()


def _runs(starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    if not len(starts):
        return
    cuts = np.flatnonzero((starts[1:] < stops[:-1]) | (starts[1:] - stops[:-1] >= ALIGN_BYTES)) + 1
    for part in np.split(np.arange(len(starts)), cuts):
        yield int(starts[part[0]]), int(stops[part[-1]])


def _staging(install: CudaFull | CudaDelta, memory: Tensor) -> StagingBuffer:
    device = install.cuda
    pinned = device.pinned.reserve(len(memory))
    return StagingBuffer(install.layout, pinned, Follower(pinned, memory, device.side))


class CudaFull(FullInstall):
    """Whole tensors, a launch for each kind of row."""

    def __init__(
        self, cuda: Cuda, transaction: int, version: int, indices: Sequence[int], in_flight_bytes: int
    ) -> None:
        super().__init__(cuda.live, transaction, version, indices, in_flight_bytes)
        self.cuda, self.layout = cuda, self._layout
        self._chosen: Chosen = cuda.table.select(indices)

    def reserve(self, arena: Arena) -> None:
        staged, block, undo = self._layout.num_bytes, self._block_bytes, self.memory.undo_bytes
        memory = arena.reserve(staged + block + undo)
        self.staging = _staging(self, memory[:staged])
        self._scratch = memory[staged : staged + block]
        self._undo = self._copies(memory[staged + block :])
        self._at = torch.from_numpy(self._layout.at + memory.data_ptr()).to(memory.device)

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
            for each in self._recomputes:
                each.apply()
            lanes = self._chosen.digest()
            installed = as_digests(lanes)
        require_equal(installed, self._staged, self._writes)
        names = {span[0]: None for span in self._spans}
        padding = [each for name in names for each in self._live.padding.get(name, ())]
        stained = [problem for each in padding if (problem := each.problem(self._scratch)) is not None]
        raise_all(LayoutError, "install: padding was written; the old bytes are back", stained)
        self._live.audit.check()
        return installed

    def undo(self) -> None:
        with self.cuda.paused():
            super().undo()


class CudaDelta(DeltaInstall):
    """Changed bytes, all tensors together; rows that come whole one after the other."""

    def __init__(
        self,
        cuda: Cuda,
        transaction: int,
        version: int,
        indices: Sequence[int],
        in_flight_bytes: int,
        *,
        base: Digests,
        blobs: Sequence[BlobSize],
        patches: Sequence[Patch],
    ) -> None:
        super().__init__(
            cuda.live, transaction, version, indices, in_flight_bytes, base=base, blobs=blobs, patches=patches
        )
        self.cuda, self.layout = cuda, self._layout
        self._chosen = cuda.table.select(indices)
        self._bytes: Bytes | None = None

    def reserve(self, arena: Arena) -> None:
        # Blobs are unpacked by the host: they stay there.
        self.staging = StagingBuffer(self._layout, self.cuda.pinned.reserve(self._layout.num_bytes))
        self._scratch = arena.reserve(self._block_bytes)

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
        self._bytes = self._chosen.changes(*_joined(self._sparse, self._chosen.device))
        moved = self._moved(self._dense, [part.into for part in self._dense])
        self._staged: Digests = moved + as_digests(self._bytes.moved)
        touched = {part.write.span[0] for part in self._dense}
        touched |= {self._writes[patch.tensor].span[0] for patch in self._sparse}
        self._stale = self._live.stale(touched)
        self._derived = [(each.target, each.target.clone()) for each in self._stale]
        return self._staged

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
        found: dict[str, Positions | None] = {part.write.placement.tensor.name: None for part in self._dense}
        for tensor, patches in groupby(self._sparse, key=lambda patch: patch.tensor):
            name = self._writes[tensor].placement.tensor.name
            positions = [patch.positions for patch in patches if patch.positions is not None]
            found.setdefault(name, positions[0] if len(positions) == 1 else np.concatenate(positions))
        return found

    def reverse(self) -> list[Patch]:
        back = [
            Patch(
                tensor=self.indices[patch.tensor],
                first=patch.first,
                stop=patch.stop,
                positions=patch.positions,
                values=np.negative(patch.values),
            )
            for patch in self._sparse
        ]
        return [*back, *(part.reverse() for part in self._dense)]

    def _prepared_bytes(self) -> Bytes:
        assert self._bytes is not None
        return self._bytes


def _joined(patches: Sequence[Patch], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """All changed bytes as one list on the device: tensor, position, difference."""
    counts = [len(patch.values) for patch in patches]
    tensors = np.repeat(np.array([patch.tensor for patch in patches], np.int32), counts)
    none: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
    positions = np.concatenate([*none, *(patch.positions for patch in patches if patch.positions is not None)])
    values = np.concatenate([np.empty(0, np.uint8), *(patch.values for patch in patches)])
    found = (torch.from_numpy(np.ascontiguousarray(each)).to(device) for each in (tensors, positions, values))
    first, second, third = found
    return first, second, third
