"""Chunks of what lies in a GPU's memory, many pieces at a time: tables of addresses, one launch a chunk.

    loads = Located(...).loads(chunk_bytes)             # once for pushes of the same rows from the same memory
    for load in loads: stream.send(Gathered(number, load, ready, side))
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .chunks import Packet
from .packing import CHUNK_PIECES

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Located:
    """Pieces of tensors in the memory of one device: length[i] bytes at an address, for byte offset[i] of tensor[i],
    as the ranks number them that get it. memory: what must not go meanwhile."""

    device: torch.device
    tensor: Ints
    offset: Ints
    length: Ints
    address: Ints
    memory: Tensor

    def loads(self, chunk_bytes: int) -> list[Load]:
        """All of them, in chunks."""
        return [Load(part) for part in self.ordered().cut(chunk_bytes)] if len(self.tensor) else []

    def ordered(self) -> Located:
        """Those of whole words of 16 bytes first, so that they stay so in a payload."""
        order = np.argsort((self.length | self.address) & 15 != 0, kind="stable")
        return self._taken(order, np.zeros_like(order), self.length[order])

    def cut(self, chunk_bytes: int) -> Iterator[Located]:
        """Payloads of at most so many bytes and CHUNK_PIECES pieces."""
        ends = np.cumsum(self.length)
        total = int(ends[-1]) if len(ends) else 0
        edges = np.union1d(ends[self.length > 0], np.arange(chunk_bytes, total, chunk_bytes))
        begins = np.concatenate([np.zeros(1, np.int64), edges[:-1]])[: len(edges)]
        which = np.searchsorted(ends, begins, side="right")
        pieces = self._taken(which, begins - (ends - self.length)[which], edges - begins)
        for number in np.unique(begins // chunk_bytes).tolist():
            low, high = np.searchsorted(begins, [number * chunk_bytes, (number + 1) * chunk_bytes]).tolist()
            for start in range(low, high, CHUNK_PIECES):
                chosen = np.arange(start, min(start + CHUNK_PIECES, high))
                yield pieces._taken(chosen, np.zeros_like(chosen), pieces.length[chosen])

    def _taken(self, which: Ints, within: Ints, length: Ints) -> Located:
        """length[i] bytes of piece which[i] from byte within[i] on."""
        return Located(
            device=self.device,
            tensor=self.tensor[which],
            offset=self.offset[which] + within,
            length=length,
            address=self.address[which] + within,
            memory=self.memory,
        )


class Load:
    """One chunk of located pieces, as it is said and as it is brought together; the same in every push."""

    def __init__(self, located: Located) -> None:
        moves = importlib.import_module(".cuda", __package__).Moves
        self.device, self.memory = located.device, located.memory
        self.pieces = located.tensor.astype("<u4"), located.offset.astype("<u8"), located.length.astype("<u4")
        begins = np.cumsum(located.length) - located.length
        self._moves = moves(located.address, begins, located.length, located.device)

    def gather(self, address: int) -> None:
        """Bring the pieces to an address of the same device, or of one that it reaches, a multiple of 16: on the
        current stream."""
        self._moves.run(address)


class Gathered(Packet):
    """One push's chunk of a load. ready: an event after which its bytes are there, None where they are."""

    def __init__(self, sequence: int, load: Load, ready: Any, stream: torch.cuda.Stream) -> None:
        super().__init__(sequence, *load.pieces, ())
        self.device, self._load, self._ready, self.stream = load.device, load, ready, stream
        self._arrived: Any = None  # an event behind the last launch: of several streams, the later one's is both's

    def gather(self, address: int) -> None:
        """Begin to bring the payload to an address; `arrive` waits for it."""
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            if self._ready is not None:
                self.stream.wait_event(self._ready)
            self._load.gather(address)
            arrived.record()
        self._arrived = arrived

    def arrive(self) -> None:
        if self._arrived is not None:
            self._arrived.synchronize()

    @cached_property
    def _on_host(self) -> list[memoryview]:
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            payload = torch.empty(self.payload_bytes, dtype=torch.uint8, device=self.device)
            self.gather(payload.data_ptr())
            host = torch.empty(self.payload_bytes, dtype=torch.uint8, pin_memory=True)
            host.copy_(payload, non_blocking=True)
            self.stream.synchronize()
        return [host.numpy().data]
