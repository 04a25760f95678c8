"""One buffer a rank, in which the rows of a push arrive in any order, twice, or after a reconnect.

The buffer is the concatenation of this rank's rows of every pushed tensor, each aligned to 64 bytes, so that a tensor
is a plain [rows, row_bytes] view once it is complete. Nothing is written unless the whole chunk fits.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quant.formats import TensorSpec

from .chunks import Chunk
from .errors import BusyError, TransferError, raise_all

ALIGN_BYTES = 64  # a cache line, and what the digest reads words from

Bytes = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StagingPlan:
    """Where the rows of each pushed tensor lie in the buffer: bytes [first, stop) of tensor i at at[i]."""

    specs: tuple[TensorSpec, ...]
    first: Bytes
    stop: Bytes
    at: Bytes
    num_bytes: int


def plan_staging(specs: Sequence[TensorSpec], row_start: Bytes, row_stop: Bytes) -> StagingPlan:
    """Lay out rows [row_start[i], row_stop[i]) of each tensor."""
    row_bytes = np.array([spec.row_bytes for spec in specs], np.int64)
    first, stop = row_start * row_bytes, row_stop * row_bytes
    ends = np.cumsum(-(-(stop - first) // ALIGN_BYTES) * ALIGN_BYTES)
    at = np.concatenate([np.zeros(1, np.int64), ends])
    return StagingPlan(specs=tuple(specs), first=first, stop=stop, at=at[:-1], num_bytes=int(at[-1]))


class Arena:
    """Memory that grows when it must and is never given back: fresh pages are ten times slower than reused ones."""

    def __init__(self, device: torch.device | None = None, *, pinned: bool = False) -> None:
        self._make = partial(torch.empty, dtype=torch.uint8, device=device, pin_memory=pinned)
        self._memory = self._make(0)

    @property
    def num_bytes(self) -> int:
        """Bytes that are kept."""
        return self._memory.numel()

    def reserve(self, num_bytes: int) -> Tensor:
        """The first num_bytes of the arena; earlier reservations are void."""
        if num_bytes > self._memory.numel():
            self._memory = self._make(0)  # freed first, so that old and new never coexist
            self._memory = self._make(num_bytes)
            self._memory.zero_()  # touches every page now, not while bytes arrive
        return self._memory[:num_bytes]


class StagingBuffer:
    """The bytes of one transaction on one rank.

    memory: uint8 [plan.num_bytes], owned by this buffer until close(). Of the host; DeviceStaging's is a GPU's.
    """

    def __init__(self, plan: StagingPlan, memory: Tensor) -> None:
        self._plan = plan
        self.memory = memory
        # Guards what was placed, and the memory against a late stream: nothing is written after close(). Held while a
        # chunk is copied; nothing else may run under it.
        self._lock = threading.Lock()
        self._open = True
        # Of each tensor, how many bytes have arrived from its first one on, in order; and where they did not come in
        # order, all that is there: start, stop, start, .. within the rank's rows.
        self._in_order = np.zeros(len(plan.specs), np.int64)
        self._covered: dict[int, list[int]] = {}
        self.staged_bytes = 0
        self.expected_bytes = int((plan.stop - plan.first).sum())

    def place(self, chunk: Chunk) -> int:
        """Copy a chunk in; returns the bytes staged so far, duplicates not counted."""
        at = self._check(chunk)
        lengths = chunk.length.astype(np.int64)
        with self._lock:
            if not self._open:
                raise BusyError(f"chunk {chunk.sequence}: staging is over, the transaction was prepared or aborted")
            self._copy(chunk.payload, at, lengths)
            self._cover(chunk.tensor.astype(np.int64), at - self._plan.at[chunk.tensor], lengths)
            return self.staged_bytes

    def _copy(self, payload: memoryview | Tensor, starts: Bytes, lengths: Bytes) -> None:
        """Pieces, one after the other in the payload, to their starts; complete when it returns."""
        data = payload.cpu().numpy() if isinstance(payload, Tensor) else np.frombuffer(payload, np.uint8)
        memory, read = self.memory.numpy(), 0
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            memory[start : start + length] = data[read : read + length]
            read += length

    def _settle(self) -> None:
        """All that was placed is there."""

    def _cover(self, tensors: Bytes, within: Bytes, lengths: Bytes) -> None:
        """Count what arrived; at once where each tensor goes on where it ended."""
        apart = len(np.unique(tensors)) == len(tensors)
        if apart and not self._covered and (within == self._in_order[tensors]).all():
            self._in_order[tensors] += lengths
            self.staged_bytes += int(lengths.sum())
            return
        for tensor, start, length in zip(tensors.tolist(), within.tolist(), lengths.tolist(), strict=True):
            if tensor not in self._covered:
                done = int(self._in_order[tensor])
                self._covered[tensor] = [0, done] if done else []
            self.staged_bytes += cover(self._covered[tensor], start, start + length)

    def missing(self) -> list[tuple[str, tuple[int, int]]]:
        """(tensor, byte range in the whole tensor) of everything that has not arrived."""
        plan = self._plan
        found: list[tuple[str, tuple[int, int]]] = []
        if self.staged_bytes == self.expected_bytes:
            return found
        for i, (first, stop) in enumerate(zip(plan.first.tolist(), plan.stop.tolist(), strict=True)):
            done = int(self._in_order[i])
            edges = [0, *self._covered.get(i, [0, done] if done else []), stop - first]
            gaps = zip(edges[0::2], edges[1::2], strict=True)
            found += [(plan.specs[i].name, (first + a, first + b)) for a, b in gaps if a < b]
        return found

    def rows(self, i: int) -> Tensor:
        """The staged rows of tensor i: uint8 [n, row_bytes], a view."""
        plan = self._plan
        at, row_bytes = int(plan.at[i]), plan.specs[i].row_bytes
        num_bytes = int(plan.stop[i] - plan.first[i])
        num_rows = num_bytes // row_bytes if row_bytes else 0
        return self.memory[at : at + num_bytes].view(num_rows, row_bytes)

    def pieces(self, some: npt.NDArray[np.intp]) -> tuple[Tensor, ...]:
        """The staged bytes of these tensors, in increasing order and none of them empty: uint8 [bytes], views."""
        at, plan = self._plan.at[some], self._plan
        edges = np.stack([at, at + (plan.stop - plan.first)[some]], axis=1).ravel()
        sizes = np.diff(edges, prepend=0, append=self.memory.numel())  # of what lies between them, and of each
        return self.memory.split_with_sizes(sizes.tolist())[1::2]

    @property
    def at(self) -> Bytes:
        """Where each tensor's rows begin in the memory."""
        return self._plan.at

    def close(self) -> None:
        """Refuse everything from now on; returns once no thread is writing."""
        with self._lock:
            self._open = False
            self._settle()

    def _check(self, chunk: Chunk) -> Bytes:
        """Where each piece goes in the buffer; raises, naming every piece that lies outside this rank's rows."""
        plan = self._plan
        if len(chunk.tensor) and int(chunk.tensor.max()) >= len(plan.specs):
            raise TransferError(
                f"chunk {chunk.sequence}: tensor {int(chunk.tensor.max())}, the push has {len(plan.specs)}; begin again"
            )
        first, stop = plan.first[chunk.tensor], plan.stop[chunk.tensor]
        offset, length = chunk.offset.astype(np.int64), chunk.length.astype(np.int64)  # 2^63 and up become negative
        outside = (offset < first) | (length > stop - offset)
        problems = [
            f"{plan.specs[chunk.tensor[i]].name}: {chunk.length[i]} bytes at offset {chunk.offset[i]},"
            f" this rank takes bytes [{first[i]}, {stop[i]}) of {plan.specs[chunk.tensor[i]].num_bytes}"
            for i in np.flatnonzero(outside)
        ]
        raise_all(TransferError, f"chunk {chunk.sequence} refused, nothing of it was written", problems)
        return plan.at[chunk.tensor] + (offset - first)


def cover(edges: list[int], start: int, stop: int) -> int:
    """Add [start, stop) to the sorted intervals in `edges` (start, stop, start, ..); returns the bytes that are new."""
    if start == stop:
        return 0
    if edges and start == edges[-1]:  # in order, by far the most frequent
        edges[-1] = stop
        return stop - start
    low, high = bisect_left(edges, start), bisect_right(edges, stop)
    # An odd index lies inside an interval, or at its end: that interval is continued.
    held = [start] * (low % 2) + edges[low:high] + [stop] * (high % 2)
    edges[low:high] = [start] * (1 - low % 2) + [stop] * (1 - high % 2)
    return stop - start - (sum(held[1::2]) - sum(held[0::2]))
