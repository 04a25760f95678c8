"""What the ranks of a replica say to each other: the leader names every turn, every rank reports what it did.

    command  leader to each rank   7 int64: kind, step, version, num_forwards, refresh, stay_paused, payload bytes
                                   then, only where there is one, the payload: JSON of starts, cancels, reason
    report   each rank to leader   [1 + rows, 4] int64; row 0: step, number of tokens, bytes of the error text, 0
                                   each further row: key, token id, last, log-probability as float64 bits;
                                   a rank that failed has no tokens, and its rows hold the error text in UTF-8

Each rank has its own exchange with the leader, not a broadcast tree or a gather: an operation that one dead rank breaks
closes gloo's connections to the live ones as well, and those must still hear that the replica failed, and why.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import IntEnum, unique
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .sampling import Sampled, Start

_HEADER = ("kind", "step", "version", "num_forwards", "refresh", "stay_paused")
_MIN_ROWS = 32  # room for 1 KiB of error text where max_batch is small


@unique
class Kind(IntEnum):
    """What all ranks do in this turn."""

    IDLE = 0  # nothing: keeps the followers' receive from timing out
    STEP = 1
    PAUSE = 2
    RESUME = 3
    STOP = 4
    FAIL = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One turn of the replica. `step` is the number of the step run now, or of the last one run."""

    kind: Kind
    step: int
    version: int = 0
    num_forwards: int = 0
    refresh: bool = False
    stay_paused: bool = False
    starts: tuple[Start, ...] = ()
    cancels: tuple[int, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one rank did in a turn; `error` is empty when all went well."""

    step: int
    tokens: tuple[Sampled, ...] = ()
    error: str = ""


def pack_command(command: Command) -> tuple[Tensor, Tensor]:
    """Header and payload (of zero bytes where there is nothing to say) of a command."""
    says = bool(command.starts or command.cancels or command.reason)
    body = {"starts": [asdict(s) for s in command.starts], "cancels": command.cancels, "reason": command.reason}
    payload = json.dumps(body).encode() if says else b""
    words = [*(int(getattr(command, name)) for name in _HEADER), len(payload)]
    return torch.tensor(words, dtype=torch.int64), torch.frombuffer(bytearray(payload or b"\0"), dtype=torch.uint8)


def unpack_command(header: Tensor, payload: bytes) -> Command:
    """Inverse of pack_command; `payload` as long as the header says."""
    kind, step, version, num_forwards, refresh, stay_paused, _ = header.tolist()
    body: dict[str, Any] = json.loads(payload) if payload else {"starts": [], "cancels": [], "reason": ""}
    return Command(
        kind=Kind(kind),
        step=step,
        version=version,
        num_forwards=num_forwards,
        refresh=bool(refresh),
        stay_paused=bool(stay_paused),
        starts=tuple(unpack_start(start) for start in body["starts"]),
        cancels=tuple(body["cancels"]),
        reason=body["reason"],
    )


def unpack_start(fields: dict[str, Any]) -> Start:
    """A Start from its JSON object, whose lists become tuples again."""
    tuples = {name: tuple(fields[name]) for name in ("keys", "seeds")}
    return Start(**{**fields, **tuples, "prompts": tuple(map(tuple, fields["prompts"]))})


def pack_report(report: Report, rows: int) -> Tensor:
    """Report as a tensor of fixed size; an error text is cut to the room there is."""
    packed = torch.zeros(1 + rows, 4, dtype=torch.int64)
    if report.error:
        text = report.error.encode()[: rows * 32]
        packed[1:].view(-1).view(torch.uint8)[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
        packed[0] = torch.tensor([report.step, 0, len(text), 0])
        return packed
    count = len(report.tokens)
    packed[0] = torch.tensor([report.step, count, 0, 0])
    if count:
        packed[1 : 1 + count, :3] = torch.tensor([(t.key, t.token_id, t.last) for t in report.tokens])
        packed.view(torch.float64)[1 : 1 + count, 3] = torch.tensor(
            [t.logprob for t in report.tokens], dtype=torch.float64
        )
    return packed


def unpack_report(packed: Tensor) -> Report:
    """Inverse of pack_report."""
    step, count, length, _ = packed[0].tolist()
    if length:
        text = bytes(packed[1:].view(-1).view(torch.uint8)[:length].tolist())
        return Report(step=step, error=text.decode(errors="replace"))
    logprobs = packed.view(torch.float64)[1 : 1 + count, 3].tolist()
    tokens = tuple(
        Sampled(key, token_id, logprob, bool(last))
        for (key, token_id, last), logprob in zip(packed[1 : 1 + count, :3].tolist(), logprobs, strict=True)
    )
    return Report(step=step, tokens=tokens)


class Link:
    """One rank's end. `group` must carry CPU tensors and be used by this engine alone: its followers wait in it.

    lost: on the leader, peers that the group no longer reaches, and why. They are left out of all further exchanges.
    """

    def __init__(self, group: dist.ProcessGroup | None, *, rank: int, world: int, max_batch: int) -> None:
        self._group, self._rank, self._world = group, rank, world
        self._rows = max(max_batch, _MIN_ROWS)
        self.lost: dict[int, str] = {}
        if world > 1:
            check_group(group, rank, world)

    def exchange(self, command: Command | None) -> Command:
        """Leader: send `command` to all. Follower (None): wait for the leader's. Returns the command of this turn."""
        if command is None:
            return self._receive()
        header, payload = pack_command(command)
        parts = [header, payload] if int(header[-1]) else [header]
        self._with_each(lambda peer: [dist.isend(part, group=self._group, group_dst=peer) for part in parts])
        return command

    def _receive(self) -> Command:
        header = torch.zeros(len(_HEADER) + 1, dtype=torch.int64)
        dist.recv(header, group=self._group, group_src=0)
        payload = torch.zeros(int(header[-1]), dtype=torch.uint8)
        if len(payload):
            dist.recv(payload, group=self._group, group_src=0)
        return unpack_command(header, bytes(payload.numpy()))

    def collect(self, report: Report) -> Sequence[Report]:
        """Reports of all ranks, in order, on the leader; nothing elsewhere. A lost rank's is an error."""
        if self._rank:
            dist.send(pack_report(report, self._rows), group=self._group, group_dst=0)
            return []
        packed = torch.zeros(self._world, 1 + self._rows, 4, dtype=torch.int64)
        self._with_each(lambda peer: [dist.irecv(packed[peer], group=self._group, group_src=peer)])
        lost = {peer: Report(step=report.step, error=why) for peer, why in self.lost.items()}
        return [report, *(lost.get(peer) or unpack_report(packed[peer]) for peer in range(1, self._world))]

    def _with_each(self, post: Callable[[int], list[dist.Work | None]]) -> None:
        """Start an operation with every rank still reached, and end all of them, whichever fails."""
        posted: dict[int, list[dist.Work | None]] = {}
        peers = [peer for peer in range(1, self._world) if peer not in self.lost]
        for peer in peers:
            with self._noting(peer):
                posted[peer] = post(peer)
        for peer, works in posted.items():
            with self._noting(peer):
                for work in works:
                    if work is not None:
                        work.wait()

    @contextmanager
    def _noting(self, peer: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.lost[peer] = f"no longer reached: {describe(error)}"


def check_group(group: dist.ProcessGroup | None, rank: int, world: int) -> None:
    """Refuse a group of another size or rank, and one that cannot carry CPU tensors."""
    if (dist.get_rank(group), dist.get_world_size(group)) != (rank, world):
        raise ValueError(
            f"engine group: expected rank {rank} of {world}, "
            f"got rank {dist.get_rank(group)} of {dist.get_world_size(group)}; pass the replica's own group"
        )
    backends = dist.get_backend_config(group)
    if "cpu:" not in backends:
        raise ValueError(
            f"engine group: expected a backend for CPU tensors, got {backends}; "
            'make one beside it with torch.distributed.new_group(ranks, backend="gloo")'
        )


def describe(error: BaseException) -> str:
    """An error on one line of ASCII: its type and its text."""
    return " ".join(f"{type(error).__name__}: {error}".encode("ascii", "ignore").decode().split())
