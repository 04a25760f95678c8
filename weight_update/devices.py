"""What a receiver needs of the device that its storages are on: installs, memory, digests. A row a type of device."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from .delta import BlobSize, Patch
from .digest import Digests
from .install import FullInstall, FullPlan, Install, Plans, read_back
from .live import Live
from .patching import DeltaInstall, Ground
from .staging import Arena


class Device(Protocol):
    """The installs of one receiver, and the memory that they share from one push to the next."""

    @property
    def reserved_bytes(self) -> int:
        """Bytes that are kept."""

    def full(self, transaction: int, version: int, indices: Sequence[int], in_flight_bytes: int) -> Install:
        """An install of whole tensors."""

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
        """An install of changed bytes."""

    def reserve(self, install: Any) -> None:
        """Take the memory that an install of this device has planned."""

    def digests(self, indices: Sequence[int]) -> Digests:
        """Of live rows, every byte read back."""


class Host:
    """Host memory."""

    def __init__(self, live: Live) -> None:
        self._live, self._arena = live, Arena()
        self._plans = Plans(partial(FullPlan.of, live))
        self._grounds = Plans(partial(Ground.of, live))

    @property
    def reserved_bytes(self) -> int:
        return self._arena.num_bytes

    def full(self, transaction: int, version: int, indices: Sequence[int], in_flight_bytes: int) -> Install:
        return FullInstall(self._live, self._plans.of(indices), transaction, version, in_flight_bytes)

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
        ground = self._grounds.of(indices)
        return DeltaInstall(
            self._live, ground, transaction, version, in_flight_bytes, base=base, blobs=blobs, patches=patches
        )

    def reserve(self, install: Any) -> None:
        install.reserve(self._arena)

    def digests(self, indices: Sequence[int]) -> Digests:
        return read_back([self._live.writes[i] for i in indices])


def _cuda(live: Live) -> Device:
    device: Device = importlib.import_module(".cuda_install", __package__).Cuda(live)
    return device


DEVICES: Mapping[str, Callable[[Live], Device]] = {"cpu": Host, "cuda": _cuda}
