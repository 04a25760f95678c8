"""A ring of memory between two processes of one host: the sender copies payloads in, the rank reads them there.

    rank    ring = Ring.create(8 << 20)              # anonymous: no name, no file, gone with its last process
    sender  writer = RingWriter.open(ring.pid, ring.fd, ring.num_bytes, ring.token)
            at = writer.take(1000)                   # None while the rank has not read enough
            writer.view(at, 1000)[:] = payload       # what is sent is only where it lies
            writer.free()                            # once the rank has acknowledged it

The memory is the rank's: its size is sealed, so that nobody's mistake is a bus error here, and the kernel lets only a
process of the same user and process namespace open it. Every page is touched when the ring is made: fresh pages are ten
times slower than reused ones.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .chunks import Packet
from .errors import TransferError

RING_CHUNK_BYTES = 8 << 20  # a chunk costs its messages, about 0.3 ms together: four times the bytes as over gRPC
RING_BYTES = 4 * RING_CHUNK_BYTES  # payload
PAGE_BYTES = 4096  # before the payload: the token
TOKEN_BYTES = 16
ALIGN_BYTES = 64

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL if hasattr(fcntl, "F_SEAL_SHRINK") else 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ring:
    """The rank's end. payload: read-only here. Close it once no chunk of it is being read."""

    pid: int
    fd: int
    num_bytes: int
    token: bytes
    payload: memoryview

    @classmethod
    def create(cls, num_bytes: int) -> Ring:
        """Memory of this process, in whole pages; OSError where there is none to be had."""
        num_bytes = -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
        fd = os.memfd_create("transfuse-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.fchmod(fd, 0o600)
            os.posix_fallocate(fd, 0, PAGE_BYTES + num_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
            mapped = _map(fd, PAGE_BYTES + num_bytes)
        except OSError:
            os.close(fd)
            raise
        token = secrets.token_bytes(TOKEN_BYTES)
        mapped[:TOKEN_BYTES] = token
        payload = memoryview(mapped).toreadonly()[PAGE_BYTES:]
        return cls(pid=os.getpid(), fd=fd, num_bytes=num_bytes, token=token, payload=payload)

    def close(self) -> None:
        """Nobody can open it from now on; the memory goes with the last view of it."""
        os.close(self.fd)


class RingWriter:
    """The sender's end. One thread takes and writes, any may free."""

    def __init__(self, memory: npt.NDArray[np.uint8], token: bytes) -> None:
        self._memory = memory  # keeps the mapping
        self._begin(token)

    def _begin(self, token: bytes) -> None:
        self.token = token
        self._taken: deque[tuple[int, int]] = deque()  # (at, stop) in the order in which they were taken

    @classmethod
    def open(cls, pid: int, fd: int, num_bytes: int, token: bytes) -> RingWriter:
        """The ring of another process; TransferError says why it cannot be had."""
        path = f"/proc/{pid}/fd/{fd}"
        try:
            own = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise TransferError(f"shared memory: {path} of the rank: {error.strerror}") from None
        try:
            mapped = _map(own, PAGE_BYTES + num_bytes) if _is_sealed(own, PAGE_BYTES + num_bytes) else b""
        except (OSError, ValueError) as error:
            raise TransferError(f"shared memory: {path} of the rank cannot be mapped: {error}") from None
        finally:
            os.close(own)
        if mapped[:TOKEN_BYTES] != token:
            raise TransferError(f"shared memory: {path} is not the rank's ring; it is in another process namespace")
        return cls(np.frombuffer(mapped, np.uint8)[PAGE_BYTES:], token)

    @property
    def num_bytes(self) -> int:
        return self._memory.size

    def take(self, num_bytes: int) -> int | None:
        """Where so many bytes may be written; None while there is no room for them."""
        size = -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES
        first, last = (self._taken[0][0], self._taken[-1][1]) if self._taken else (0, 0)
        if not self._taken or first < last:  # free: from `last` to the end, and from 0 to `first`
            at = last if last + size <= self.num_bytes else 0 if size < first or not self._taken else None
        else:  # it has wrapped; never filled up to `first`, so that full and empty differ
            at = last if last + size < first else None
        if at is None or at + size > self.num_bytes:
            return None
        self._taken.append((at, at + size))
        return at

    def put(self, packet: Packet, at: int) -> bytes:
        """Copy a payload to where it may be; the message that says so."""
        packet.put(self.view(at, packet.payload_bytes))
        return packet.in_ring(at)

    def view(self, at: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Bytes to be written, uint8 [num_bytes]."""
        return self._memory[at : at + num_bytes]

    def free(self) -> None:
        """What was taken first has been read."""
        self._taken.popleft()


def _map(fd: int, num_bytes: int) -> mmap.mmap:
    return mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))


def _is_sealed(fd: int, num_bytes: int) -> bool:
    """Whether it is memory of this size that cannot shrink."""
    return os.fstat(fd).st_size == num_bytes and bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
