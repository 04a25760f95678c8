"""Groups of two processes, a trainer's and a rank's, in which torch.distributed moves payloads: NCCL from GPU to GPU,
of one host or of two. A group serves one push after the other; what is sent in it is not encrypted.

    rank      group = Group.host("10.0.0.7", device)       # others join at group.address
    trainer   group = Group.join(address, device)
    trainer   group.send(data)       rank   group.receive(data)       # in the same order on both ends
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from .chunks import Chunk, Packet
from .device_rings import DeviceWriter
from .errors import TransferError
from .gathering import Gathered
from .rings import TOKEN_BYTES

dist: Any = torch.distributed  # its stubs leave out stores and backends

JOIN_S = 30.0  # for both ends to be there; a firewall between them is noticed then
NEVER = timedelta(days=365)  # who waits is woken by `abort`: a watchdog's timeout would end the process
TRAINER = 1  # the rank is 0
# NCCL's watchdog ends a process whose peer died. A rank goes on serving, and a trainer decides by itself.
QUIET = dict.fromkeys(
    (
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
        "TORCH_NCCL_ENABLE_MONITORING",
        "TORCH_NCCL_DUMP_ON_TIMEOUT",
        "TORCH_NCCL_PROPAGATE_ERROR",
    ),
    "0",
)

_making = threading.Lock()  # environment variables are the process's


@contextmanager
def _quiet() -> Iterator[None]:
    with _making:
        before = {name: os.environ.get(name) for name in QUIET}
        os.environ.update(QUIET)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def _nccl(store: Any, rank: int) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = NEVER
    with _quiet():
        return dist.ProcessGroupNCCL(store, rank, 2, options)


def _gloo(store: Any, rank: int) -> Any:
    return dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=JOIN_S))


# By type of device. No transport asks for gloo: it lets a machine without a GPU run all the rest of this.
BACKENDS: Mapping[str, Callable[[Any, int], Any]] = {"cuda": _nccl, "cpu": _gloo}


class Group:
    """One end."""

    def __init__(self, store: Any, rank: int, device: torch.device) -> None:
        self.address = f"{store.host}:{store.port}"
        self._store, self._rank, self._device = store, rank, device
        self._backend: Any = None
        self._failed = ""
        self._met = threading.Event()
        threading.Thread(target=self._meet, name="group", daemon=True).start()

    @classmethod
    def host(cls, host: str, device: torch.device) -> Group:
        """The rank's end, which listens on a port of its own at this address, and at no other."""
        listening = socket.create_server((host, 0))
        port = listening.getsockname()[1]
        return cls(_store(host, port, is_master=True, master_listen_fd=listening.detach()), 1 - TRAINER, device)

    @classmethod
    def join(cls, address: str, device: torch.device) -> Group:
        """The trainer's end; TransferError where the rank cannot be reached, or does not come."""
        host, _, port = address.rpartition(":")
        try:
            group = cls(_store(host, int(port), is_master=False), TRAINER, device)
        except RuntimeError as error:
            raise TransferError(f"nccl: {address} of the rank cannot be reached: {error}") from None
        group.wait()
        return group

    def wait(self) -> None:
        """Return once both ends are there; TransferError where that does not happen."""
        if not self._met.wait(JOIN_S):
            self.abort()
            raise TransferError(f"nccl: the other end did not join within {JOIN_S:.0f} s; open the ports between them")
        if self._failed:
            raise TransferError(f"nccl: {self._failed}")

    def send(self, data: Tensor) -> Any:
        """Enqueue bytes behind the current stream's work; they, and what is returned, must live until they arrived."""
        return self._backend.send([data], 1 - self._rank, 0)

    def receive(self, data: Tensor) -> None:
        """Return once the next bytes are there."""
        self._backend.recv([data], 1 - self._rank, 0).wait()
        if data.is_cuda:
            torch.cuda.current_stream(data.device).synchronize()

    def abort(self) -> None:
        """End it here: whoever waits in it goes on, with no bytes or half of them."""
        self._failed = self._failed or "the group was ended"
        if self._backend is not None:
            with suppress(RuntimeError):  # gloo cannot
                self._backend.abort()

    def _meet(self) -> None:
        """Say a byte: communicators are made at the first one."""
        try:
            with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
                backend = BACKENDS[self._device.type](dist.PrefixStore("transfuse", self._store), self._rank)
                self._backend = backend
                byte = torch.zeros(1, dtype=torch.uint8, device=self._device)
                self.send(byte).wait() if self._rank == TRAINER else self.receive(byte)
        except RuntimeError as error:
            self._failed = self._failed or str(error).splitlines()[0]
        finally:
            self._met.set()


def _store(host: str, port: int, **options: Any) -> Any:
    wait = timedelta(seconds=JOIN_S)
    return dist.TCPStore(host, port, world_size=2, timeout=wait, wait_for_workers=False, **options)


class Groups:
    """A trainer rank's groups, by the rank's address; kept from one push to the next."""

    def __init__(self) -> None:
        self._guard = threading.Lock()  # guards the rest; nothing blocks under it
        self._tokens: dict[str, bytes] = {}
        self._joined: dict[str, Group] = {}

    def token(self, target: str) -> bytes:
        """Of the group with this rank, or of the one that is to be made."""
        with self._guard:
            return self._tokens.setdefault(target, secrets.token_bytes(TOKEN_BYTES))

    def of(self, target: str, address: str, device: torch.device) -> Group:
        """The group with this rank. address: where to join the one that it made, "" where it has the token's."""
        with self._guard:
            known = self._joined.get(target)
        if not address and known is not None:
            return known
        if not address:
            self.drop(target)
            raise TransferError(f"nccl: {target} has a group that this end left; push again")
        group = Group.join(address, device)
        with self._guard:
            self._joined[target] = group
        if known is not None:
            known.abort()
        return group

    def drop(self, target: str) -> None:
        """The two ends may differ in what was sent: this group is over."""
        with self._guard:
            self._tokens.pop(target, None)
            group = self._joined.pop(target, None)
        if group is not None:
            group.abort()

    def close(self) -> None:
        """End them all."""
        for target in [*self._joined]:
            self.drop(target)


# ---------------------------------------------------------------- rings


@dataclass(slots=True, kw_only=True, eq=False)
class GroupRing:
    """The rank's end of a ring whose payloads come in a group. address: where the trainer joins it, "" where it has.

    received: the last chunk whose payload came. After a reconnection chunks are said again, and not sent again."""

    num_bytes: int
    token: bytes
    payload: Tensor
    group: Group
    address: str
    received: int = 0

    @classmethod
    def create(cls, num_bytes: int, device: torch.device, group: Group, address: str) -> GroupRing:
        """Memory of the device; torch.OutOfMemoryError where there is none to be had."""
        payload = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        token = secrets.token_bytes(TOKEN_BYTES)
        return cls(num_bytes=num_bytes, token=token, payload=payload, group=group, address=address)

    def bring(self, chunk: Chunk) -> None:
        """Return once the payload of a chunk is in the ring."""
        if chunk.in_ring and chunk.sequence > self.received:
            self.group.wait()
            assert isinstance(chunk.payload, Tensor)
            self.group.receive(chunk.payload)
            self.received = chunk.sequence

    def close(self) -> None:
        """The memory goes with the last view of it; the group is its owner's."""


class GroupWriter(DeviceWriter):
    """The sender's end: memory of its own, out of which payloads are sent."""

    def __init__(self, num_bytes: int, token: bytes, group: Group, device: torch.device) -> None:
        super().__init__(torch.empty(num_bytes, dtype=torch.uint8, device=device), token)
        self._group = group
        self._sent: deque[Any] = deque()

    def put(self, packet: Packet, at: int) -> bytes:
        """Bring the pieces together, and send them behind that."""
        message = super().put(packet, at)
        with torch.cuda.stream(packet.stream) if isinstance(packet, Gathered) else nullcontext():
            self._sent.append(self._group.send(self._memory[at : at + packet.payload_bytes]))
        return message

    def free(self) -> None:
        super().free()
        self._sent.popleft()
