"""How a payload gets from a trainer to a rank: a table of transports, and which one two processes can use.

Chunks, checksums, credits, acknowledgements and resuming are the same for all; they differ in where a payload lies.
Control messages go over gRPC always, and so does every payload that no other way takes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from .errors import TransferError, raise_all

CUDA_IPC, NCCL, SHARED_MEMORY, GRPC = "cuda-ipc", "nccl", "shared-memory", "grpc"
ON_DEVICE = frozenset({CUDA_IPC, NCCL})  # from a GPU's memory to a GPU's memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a process is. host: of one start of one kernel, "" where it cannot share memory. processes: the namespace
    in which its process id means something. user: by whom the kernel lets it be read. gpu: UUID of the one whose memory
    holds what is sent or served, "" for host memory. nccl: its version, "" for none."""

    host: str = ""
    processes: str = ""
    user: int = 0
    gpu: str = ""
    nccl: str = ""


def here(device: torch.device | None = None) -> Place:
    """Of this process. device: where what it sends or serves is."""
    return _here(os.getpid(), os.geteuid(), device)


@lru_cache(maxsize=16)
def _here(pid: int, user: int, device: torch.device | None) -> Place:
    host = processes = ""
    if hasattr(os, "memfd_create"):
        with suppress(OSError):
            processes = os.readlink("/proc/self/ns/pid")
            host = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return Place(host=host, processes=processes, user=user, gpu=gpu_of(device), nccl=_nccl_of(device))


def gpu_of(device: torch.device | None) -> str:
    """The UUID of a CUDA device, "" of any other."""
    return str(torch.cuda.get_device_properties(device).uuid) if device is not None and device.type == "cuda" else ""


def _nccl_of(device: torch.device | None) -> str:
    if device is None or device.type != "cuda" or not torch.distributed.is_nccl_available():
        return ""
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True, kw_only=True)
class Transport:
    """barrier: why it cannot go from the first place to the second; "" where it can. concerns: whether anybody would
    expect it there, and so wants to know why it was not taken."""

    name: str
    barrier: Callable[[Place, Place], str]
    concerns: Callable[[Place, Place], bool] = lambda ours, theirs: True


def _shares_no_memory(ours: Place, theirs: Place) -> str:
    barriers = (
        (not ours.host or not theirs.host, "one end has no memory to share"),
        (ours.host != theirs.host, "another host"),
        (ours.processes != theirs.processes, "another container: process ids of one mean nothing in the other"),
        (ours.user != theirs.user, f"another user: {theirs.user} there, {ours.user} here"),
    )
    return next((said for stands, said in barriers if stands), "")


def _shares_no_gpu(ours: Place, theirs: Place) -> str:
    if not ours.gpu or not theirs.gpu:
        return f"what {'this end sends' if theirs.gpu else 'that end serves'} is in host memory"
    return _shares_no_memory(ours, theirs)


def _shares_no_group(ours: Place, theirs: Place) -> str:
    barriers = (
        (not ours.gpu or not theirs.gpu, "one end is in host memory"),
        (ours.gpu == theirs.gpu, "both ends are on one GPU"),
        (ours.nccl != theirs.nccl, f"NCCL {theirs.nccl or 'none'} there, {ours.nccl or 'none'} here"),
        (not ours.nccl, "there is no NCCL"),
    )
    return next((said for stands, said in barriers if stands), "")


# In the order of preference.
TRANSPORTS = (
    Transport(
        name=CUDA_IPC, barrier=_shares_no_gpu, concerns=lambda ours, theirs: bool(ours.gpu or theirs.gpu)
    ),
    Transport(name=NCCL, barrier=_shares_no_group, concerns=lambda ours, theirs: bool(ours.gpu and theirs.gpu)),
    Transport(name=SHARED_MEMORY, barrier=_shares_no_memory),
    Transport(name=GRPC, barrier=lambda ours, theirs: ""),
)
AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The way to one rank. reasons: why not the ones that would be better. only: nothing else may be used."""

    transport: str
    reasons: tuple[str, ...] = ()
    only: bool = False

    def __str__(self) -> str:
        return f"{self.transport} ({'; '.join(self.reasons)})" if self.reasons else self.transport


def allowed_of(transport: str | Sequence[str], *, encrypted: bool = False) -> tuple[str, ...]:
    """What the option of a push stands for: "auto" for every transport, or the names of those that may be used.
    encrypted: connections are; NCCL's, which are not, must be asked for by name."""
    names = tuple(each.name for each in TRANSPORTS)
    automatic = tuple(name for name in names if not encrypted or name != NCCL)
    given = automatic if transport == AUTO else (transport,) if isinstance(transport, str) else tuple(transport)
    unknown = [f"{name!r} is none of {', '.join(names)}" for name in given if name not in names]
    raise_all(TransferError, "transport", unknown or ([] if given else ["none is allowed; name one or more"]))
    return given


def choose(ours: Place, theirs: Place, allowed: Sequence[str], where: str = "") -> Link:
    """The best allowed transport between two places; TransferError where none can be used."""
    reasons: list[str] = []
    for each in TRANSPORTS:
        said = each.barrier(ours, theirs) if each.name in allowed else "not allowed"
        if not said:
            return Link(transport=each.name, reasons=tuple(reasons), only=GRPC not in allowed)
        if each.concerns(ours, theirs) or allowed == (each.name,):
            reasons.append(f"{each.name}: {said}")
    raise TransferError(f"no transport to {where or 'the rank'}: {'; '.join(reasons)}; allow another one")
