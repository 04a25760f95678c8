"""What the ranks of a replica say to each other: the leader names every turn, every rank reports what it did.

    command  leader to each rank   7 int64: kind, step, version, plan, refresh, stay_paused, payload bytes
                                   then, only where there is one, the payload: JSON of starts, cancels, reason; a zero
                                   byte; the bytes objects in it, one after the other, at offsets that the JSON names
    report   each rank to leader   [1 + rows, 4] int64; row 0: step, number of entries, bytes of the error text, kind
                                   of the entries (see ENTRIES); each further row is one entry:
                                       Sampled    key, token id, last, log-probability as float64 bits
                                       Denoised   key, step, last, bytes of its latents
                                   a rank that failed has no entries, and its rows hold the error text in UTF-8
                                   then, only where there are any, the latents of all entries

Each rank has its own exchange with the leader, not a broadcast tree or a gather: an operation that one dead rank breaks
closes gloo's connections to the live ones as well, and those must still hear that the replica failed, and why.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import IntEnum, unique
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .requests import Sampled, Start
from .samples import Denoised, SampleStart
from .work import Entry
from .work import Start as AnyStart

_HEADER = ("kind", "step", "version", "plan", "refresh", "stay_paused")
_MIN_ROWS = 32  # room for 1 KiB of error text where max_batch is small
_STARTS: Mapping[str, Callable[..., AnyStart]] = {each.__name__: each for each in (Start, SampleStart)}
ENTRIES = (Sampled, Denoised)


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
    plan: int = 0  # of the worker, for this step
    refresh: bool = False
    stay_paused: bool = False
    starts: tuple[AnyStart, ...] = ()
    cancels: tuple[int, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one rank did in a turn; `error` is empty when all went well."""

    step: int
    entries: tuple[Entry, ...] = ()
    error: str = ""


def pack_command(command: Command) -> tuple[Tensor, Tensor]:
    """Header and payload (of zero bytes where there is nothing to say) of a command."""
    says = bool(command.starts or command.cancels or command.reason)
    payload = _pack_body(command) if says else b""
    words = [*(int(getattr(command, name)) for name in _HEADER), len(payload)]
    return torch.tensor(words, dtype=torch.int64), torch.frombuffer(bytearray(payload or b"\0"), dtype=torch.uint8)


def _pack_body(command: Command) -> bytes:
    blobs: list[bytes] = []

    def aside(value: bytes) -> dict[str, list[int]]:
        start = sum(map(len, blobs))
        blobs.append(value)
        return {"bytes": [start, start + len(value)]}

    starts = [{"start": type(each).__name__, **asdict(each)} for each in command.starts]  # type: ignore[call-overload]
    text = json.dumps({"starts": starts, "cancels": command.cancels, "reason": command.reason}, default=aside)
    return b"\0".join([text.encode(), b"".join(blobs)])


def unpack_command(header: Tensor, payload: bytes) -> Command:
    """Inverse of pack_command; `payload` as long as the header says."""
    kind, step, version, plan, refresh, stay_paused, _ = header.tolist()
    text, _, blobs = payload.partition(b"\0")  # JSON holds no zero byte

    def restored(fields: dict[str, Any]) -> Any:
        return blobs[slice(*fields["bytes"])] if fields.keys() == {"bytes"} else fields

    body: dict[str, Any] = json.loads(text, object_hook=restored) if text else {}
    return Command(
        kind=Kind(kind),
        step=step,
        version=version,
        plan=plan,
        refresh=bool(refresh),
        stay_paused=bool(stay_paused),
        starts=tuple(_STARTS[fields.pop("start")](**_tuples(fields)) for fields in body.get("starts", ())),
        cancels=tuple(body.get("cancels", ())),
        reason=body.get("reason", ""),
    )


def _tuples(value: Any) -> Any:
    """JSON knows lists only; the fields of a start are tuples."""
    if isinstance(value, dict):
        return {name: _tuples(each) for name, each in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def pack_report(report: Report, rows: int) -> tuple[Tensor, bytes]:
    """The table of fixed size and the latents behind it; an error text is cut to the room there is."""
    packed = torch.zeros(1 + rows, 4, dtype=torch.int64)
    if report.error:
        text = report.error.encode()[: rows * 32]
        packed[1:].view(-1).view(torch.uint8)[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
        packed[0] = torch.tensor([report.step, 0, len(text), 0])
        return packed, b""
    if not report.entries:
        packed[0] = torch.tensor([report.step, 0, 0, 0])
        return packed, b""
    kind, count = ENTRIES.index(type(report.entries[0])), len(report.entries)
    packed[0] = torch.tensor([report.step, count, 0, kind])
    words, latents = _PACK[kind](report.entries)
    packed[1 : 1 + count] = words
    return packed, latents


def _pack_tokens(tokens: Sequence[Any]) -> tuple[Tensor, bytes]:
    words = torch.tensor([(token.key, token.token_id, token.last, 0) for token in tokens])
    words.view(torch.float64)[:, 3] = torch.tensor([token.logprob for token in tokens], dtype=torch.float64)
    return words, b""


def _pack_steps(steps: Sequence[Any]) -> tuple[Tensor, bytes]:
    words = torch.tensor([(each.key, each.step, each.last, len(each.latents)) for each in steps])
    return words, b"".join(each.latents for each in steps)


def payload_bytes(packed: Tensor) -> int:
    """Bytes of latents that follow a packed report."""
    _, count, length, kind = packed[0].tolist()
    return 0 if length or ENTRIES[kind] is not Denoised else int(packed[1 : 1 + count, 3].sum())


def unpack_report(packed: Tensor, latents: bytes = b"") -> Report:
    """Inverse of pack_report."""
    step, count, length, kind = packed[0].tolist()
    if length:
        text = bytes(packed[1:].view(-1).view(torch.uint8)[:length].tolist())
        return Report(step=step, error=text.decode(errors="replace"))
    return Report(step=step, entries=tuple(_UNPACK[kind](packed[1 : 1 + count], latents)))


def _unpack_tokens(words: Tensor, _: bytes) -> Iterator[Entry]:
    for (key, token_id, last, _), logprob in zip(words.tolist(), words.view(torch.float64)[:, 3].tolist(), strict=True):
        yield Sampled(key, token_id, logprob, bool(last))


def _unpack_steps(words: Tensor, latents: bytes) -> Iterator[Entry]:
    ends = accumulate(words[:, 3].tolist(), initial=0)
    for (key, step, last, _), (start, stop) in zip(words.tolist(), pairwise(ends), strict=True):
        yield Denoised(key, step, bool(last), latents[start:stop])


# In the order of ENTRIES.
_PACK: tuple[Callable[[Sequence[Any]], tuple[Tensor, bytes]], ...] = (_pack_tokens, _pack_steps)
_UNPACK: tuple[Callable[[Tensor, bytes], Iterator[Entry]], ...] = (_unpack_tokens, _unpack_steps)


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
        return unpack_command(header, payload.numpy().tobytes())

    def collect(self, report: Report) -> Sequence[Report]:
        """Reports of all ranks, in order, on the leader; nothing elsewhere. A lost rank's is an error."""
        if self._rank:
            table, latents = pack_report(report, self._rows)
            dist.send(table, group=self._group, group_dst=0)
            if latents:
                dist.send(torch.frombuffer(bytearray(latents), dtype=torch.uint8), group=self._group, group_dst=0)
            return []
        packed = torch.zeros(self._world, 1 + self._rows, 4, dtype=torch.int64)
        self._with_each(lambda peer: [dist.irecv(packed[peer], group=self._group, group_src=peer)])
        behind = [torch.zeros(payload_bytes(table), dtype=torch.uint8) for table in packed]
        self._with_each(
            lambda peer: [dist.irecv(behind[peer], group=self._group, group_src=peer)] if len(behind[peer]) else []
        )
        lost = {peer: Report(step=report.step, error=why) for peer, why in self.lost.items()}
        return [
            report,
            *(lost.get(i) or unpack_report(packed[i], behind[i].numpy().tobytes()) for i in range(1, self._world)),
        ]

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
