"""What commits overwrote on one rank: the way back to older versions, for as long as it is kept.

    history = History(manifest.tensors, receiver.row_start, receiver.row_stop, keep=8, keep_bytes=256 << 20)
    history.add(receiver.last_undo())         # after each commit; logs what fell out
    history.versions(receiver.version)        # that this rank can go back to
    patches = history.back(receiver.version, 7)

    now 9 --reverse--> 8 --reverse--> 7       one reverse delta after the other, composed into one

A rollback is a commit like any other: what it overwrites leads back to where it was.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from quant.formats import TensorSpec

from .chain import compose
from .delta import BlobSize, Patch, Rows, pack, unpack
from .errors import VersionError
from .receiver import Reverse

log = logging.getLogger(__name__)

KEEP = 8
KEEP_BYTES = 256 << 20
# What a full push of a large model overwrote is not kept in memory: that would be a second copy of the model, and more
# while it is packed. Such a version is reached through the store.
STEP_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One reverse delta as it is kept: packed, since most of it is never read again."""

    version: int
    base_version: int
    blob: bytes
    size: BlobSize


class History:
    """Reverse deltas of one rank, newest last. specs, row_start, row_stop: of the manifest, and of this rank.

    keep, keep_bytes: bounds; the oldest falls out first, and what is older is out of reach then. step_bytes: bound of
    one step, before it is packed.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        row_start: Rows,
        row_stop: Rows,
        *,
        keep: int = KEEP,
        keep_bytes: int = KEEP_BYTES,
        step_bytes: int = STEP_BYTES,
    ) -> None:
        self._specs, self._row_start, self._row_stop = specs, row_start, row_stop
        self._keep, self._keep_bytes, self._step_bytes = keep, keep_bytes, step_bytes
        self._lock = threading.Lock()  # guards the steps; nothing is packed under it
        self._steps: dict[int, Step] = {}  # by the version that a step leads back from

    @property
    def num_bytes(self) -> int:
        """Bytes that are kept."""
        with self._lock:
            return sum(len(step.blob) for step in self._steps.values())

    def sizes(self) -> dict[int, int]:
        """Version -> bytes that lead back to it."""
        with self._lock:
            return {step.base_version: len(step.blob) for step in self._steps.values()}

    def takes(self, num_bytes: int) -> bool:
        """Whether a step that overwrote so many bytes may be kept; asked before they are copied."""
        if num_bytes > self._step_bytes:
            log.info(
                "what is older is out of reach in memory: %d bytes lead back, %d of a version are kept at most; a"
                " version store reaches it",
                num_bytes, self._step_bytes,
            )  # fmt: skip
        return num_bytes <= self._step_bytes

    def add(self, reverse: Reverse) -> list[int]:
        """Keep one; returns the versions that fell out of reach."""
        # What was loaded has no number to go back to; bytes that came in place of the same version lead nowhere.
        if not 0 < reverse.base_version < reverse.version:
            return []
        blob, size = pack(reverse.patches)
        step = Step(version=reverse.version, base_version=reverse.base_version, blob=blob, size=size)
        with self._lock:
            self._steps[step.version] = step
            dropped = list(self._excess())
            for each in dropped:
                del self._steps[each.version]
        for each in dropped:
            log.info(
                "version %d is out of reach: its %d bytes fell out of %d versions, %d bytes that are kept",
                each.base_version, len(each.blob), self._keep, self._keep_bytes,
            )  # fmt: skip
        return [each.base_version for each in dropped]

    def _excess(self) -> Iterator[Step]:
        kept = kept_bytes = 0
        for version in sorted(self._steps, reverse=True):
            step = self._steps[version]
            kept, kept_bytes = kept + 1, kept_bytes + len(step.blob)
            if kept > self._keep or kept_bytes > self._keep_bytes:
                yield step

    def versions(self, current: int) -> tuple[int, ...]:
        """Versions that lead back from the current one, newest first."""
        with self._lock:
            return tuple(step.base_version for step in self._chain(current))

    def _chain(self, current: int) -> Iterator[Step]:
        while (step := self._steps.get(current)) is not None:
            yield step
            current = step.base_version

    def back(self, current: int, version: int) -> list[Patch]:
        """What turns this rank's bytes of the current version into those of an older one; tensors of the manifest."""
        with self._lock:
            steps = [step for step in self._chain(current) if step.base_version >= version]
        if not steps or steps[-1].base_version != version:
            reachable = ", ".join(map(str, self.versions(current))) or "none"
            raise VersionError(f"version {version} is not kept on this rank; reachable from {current}: {reachable}")
        chain = [unpack(memoryview(s.blob), s.size, self._specs, self._row_start, self._row_stop) for s in steps]
        return compose(chain)
