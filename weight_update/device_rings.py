"""A ring in a GPU's memory, between two processes of one host: the sender copies payloads in over NVLink or PCIe, the
rank takes them from there. As `rings`, but for where the memory is; `said` and `open` are the two ends of CUDA IPC.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .chunks import Packet
from .errors import TransferError
from .gathering import Gathered
from .links import gpu_of
from .rings import TOKEN_BYTES, RingWriter

DEVICE_CHUNK_BYTES = 256 << 20  # NVLink needs pieces of tens of MiB, and each chunk costs its messages
DEVICE_RING_BYTES = 4 * DEVICE_CHUNK_BYTES


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceRing:
    """The rank's end. payload: uint8 [num_bytes]."""

    num_bytes: int
    token: bytes
    payload: Tensor

    @classmethod
    def create(cls, num_bytes: int, device: torch.device) -> DeviceRing:
        """Memory of the device; torch.OutOfMemoryError where there is none to be had."""
        payload = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        return cls(num_bytes=num_bytes, token=secrets.token_bytes(TOKEN_BYTES), payload=payload)

    def said(self) -> dict[str, Any]:
        """What the other process needs, by the names of the wire's DeviceMemory."""
        storage: Any = self.payload.untyped_storage()
        _, handle, storage_bytes, storage_at, counter, counter_at, event, waits = storage._share_cuda_()
        return {
            "gpu": gpu_of(self.payload.device),
            "handle": handle,
            "storage_bytes": storage_bytes,
            "storage_at": storage_at,
            "counter": counter,
            "counter_at": counter_at,
            "event": event,
            "waits_for_event": waits,
            "at": self.payload.storage_offset(),
        }

    def close(self) -> None:
        """The memory goes with the last view of it."""


class DeviceWriter(RingWriter):
    """The sender's end."""

    def __init__(self, memory: Tensor, token: bytes) -> None:
        self._memory: Any = memory
        self._begin(token)

    @classmethod
    def open_device(cls, said: Any, num_bytes: int, token: bytes, device: torch.device) -> DeviceWriter:
        """The ring that a rank speaks of (DeviceMemory), opened by the sender's own device: what runs there then writes
        over the link between the two, whether or not this process may use the other one; opened by that one instead,
        copies go through the host at a tenth of the rate. TransferError says why it cannot be had."""
        try:
            new: Any = torch.UntypedStorage._new_shared_cuda
            torch.zeros(1, device=device)  # CUDA is up, on that device
            storage = new(
                device.index, said.handle, said.storage_bytes, said.storage_at, said.counter, said.counter_at,
                said.event, said.waits_for_event,
            )  # fmt: skip
        except RuntimeError as error:
            raise TransferError(f"cuda ipc: memory of GPU {said.gpu} cannot be opened: {error}") from None
        memory = torch.empty(0, dtype=torch.uint8, device=device).set_(storage, said.at, (num_bytes,), (1,))
        return cls(memory, token)

    @property
    def num_bytes(self) -> int:
        return int(self._memory.numel())

    def put(self, packet: Packet, at: int) -> bytes:
        """One launch that brings the pieces of a load across; else one copy on the sender's GPU, of the pieces to one
        another, and one across."""
        if isinstance(packet, Gathered):
            packet.gather(self._memory.data_ptr() + at)
            return packet.in_ring(at)
        pieces = [piece if isinstance(piece, Tensor) else _tensor(piece) for piece in packet.pieces]
        device = next((piece.device for piece in pieces if piece.is_cuda), torch.device("cpu"))
        joined = pieces[0] if len(pieces) == 1 else torch.cat([piece.to(device) for piece in pieces])
        self._memory[at : at + packet.payload_bytes].copy_(joined)
        if joined.is_cuda:
            torch.cuda.current_stream(joined.device).synchronize()
        return packet.in_ring(at)


def _tensor(piece: memoryview) -> Tensor:
    return torch.frombuffer(bytearray(piece), dtype=torch.uint8)
