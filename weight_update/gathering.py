"""Chunks of what lies in a GPU's memory, many pieces at a time: tables of addresses, one launch a chunk.

    for packet in gathered(Located(...), chunk_bytes, packer.number): stream.send(packet)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
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
    """Pieces of tensors of a push in the memory of one device: length[i] bytes at an address, for byte offset[i] of
    tensor[i]. ready: an event after which they are there. memory: what must not go meanwhile."""

    device: torch.device
    tensor: Ints
    offset: Ints
    length: Ints
    address: Ints
    ready: Any
    memory: Tensor

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
            ready=self.ready,
            memory=self.memory,
        )


class Gathered(Packet):
    """One chunk of located pieces."""

    def __init__(self, sequence: int, located: Located, stream: torch.cuda.Stream) -> None:
        tensor, length = located.tensor.astype(np.uint32), located.length.astype(np.uint32)
        super().__init__(sequence, tensor, located.offset.astype(np.uint64), length, ())
        self.device, self._located, self._stream = located.device, located, stream

    def gather(self, address: int) -> None:
        """The payload at an address of the same device, or of one that it reaches; complete when it returns."""
        located = self._located
        moves = importlib.import_module(".cuda", __package__).Moves
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            if located.ready is not None:
                self._stream.wait_event(located.ready)
            targets = address + np.cumsum(located.length) - located.length
            moves(located.address, targets, located.length, self.device).run()
            self._stream.synchronize()

    def joined(self) -> Tensor:
        """The payload in memory of its own, uint8 on the device."""
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            payload = torch.empty(self.payload_bytes, dtype=torch.uint8, device=self.device)
        self.gather(payload.data_ptr())
        return payload

    def copy_to(self, target: Tensor) -> None:
        """The payload to memory of another device; complete when it returns."""
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            target.copy_(self.joined(), non_blocking=True)
            self._stream.synchronize()

    @cached_property
    def _on_host(self) -> list[memoryview]:
        payload = self.joined()
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            host = torch.empty(self.payload_bytes, dtype=torch.uint8, pin_memory=True)
            host.copy_(payload, non_blocking=True)
            self._stream.synchronize()
        return [host.numpy().data]


def gathered(
    located: Located, chunk_bytes: int, number: Callable[[], int], stream: torch.cuda.Stream
) -> Iterator[Gathered]:
    """Chunks of these pieces. number: gives the next chunk's."""
    for part in located.ordered().cut(chunk_bytes):
        yield Gathered(number(), part, stream)
