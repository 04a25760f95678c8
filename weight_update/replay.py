"""A recorded transaction, done again from its chunks: at which step do the digests part?

    meant       by the trainer                                         coordinator.sqlite
    sent        the chunks that came, put together here                0.0.sqlite, 0.1.sqlite, ...
    staged      as the ranks read them before the commit               the same
    installed   as the ranks read them back through their layouts      the same

Digests of the ranks of a replica add up. A delta's chunks hold changes, which are nothing without the base: its `sent`
is left out, and its checksums are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from .chunks import Chunk, check, decode_request
from .digest import Digests, digest_rows, name_key, unlike
from .errors import PlanError, WeightUpdateError
from .flight import SUFFIX, Flight

STEPS = ("meant", "sent", "staged", "installed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parting:
    """Digests that differ from those of the step before."""

    replica: int
    step: str
    before: str
    tensors: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a replay found. partings: the first of each replica; empty where all digests agree. broken: chunks whose
    checksum is not theirs. missing: ranks and steps that no file speaks of."""

    transaction: int
    version: int
    is_delta: bool
    num_chunks: int
    num_bytes: int
    seconds: float
    partings: tuple[Parting, ...] = ()
    broken: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    outcomes: dict[str, str] = field(default_factory=dict)


def replay(directory: Path) -> Replay:
    """Replay the files of one transaction. Raises PlanError where there are none."""
    paths = sorted(directory.glob(f"*{SUFFIX}")) if directory.is_dir() else []
    flights = {flight.who: flight for flight in map(Flight, paths)}
    coordinator = flights.pop("coordinator", None)
    if not flights:
        raise PlanError(f"{directory}: holds no rank's file; name the folder of a transaction, DIR/TRANSACTION")
    ranks = list(flights.values())
    first, broken, num_bytes, times = ranks[0], [], 0, []
    is_delta = bool(first.facts["is_delta"])
    for rank in ranks:
        sent = Assembly(rank)
        for time_s, trainer_rank, message in rank.chunks():
            times.append(time_s)
            num_bytes += len(message)
            problem = sent.take(message)
            broken += [f"rank {rank.who}, trainer rank {trainer_rank}: {problem}"] if problem else []
        if not is_delta:
            rank.digests["sent"] = sent.digests()
    missing = [] if coordinator else ["coordinator: what the trainer meant"]
    every = [name for rank in ranks for name, _ in rank.facts["tensors"]]  # each has those of which it holds rows
    names = list(dict.fromkeys(every if coordinator is None else coordinator.facts.get("tensors", every)))
    meant = None if coordinator is None else coordinator.digests.get("meant")
    partings = []
    for number in sorted({int(rank.who.split(".")[0]) for rank in ranks}):
        members = [rank for rank in ranks if int(rank.who.split(".")[0]) == number]
        world = members[0].facts["world"]
        if len(members) < world:
            missing.append(f"replica {number}: {world - len(members)} of {world} ranks")
            continue
        steps = {"meant": meant} | {step: _sum(members, step, names) for step in STEPS[1:]}
        parting = _first_parting(number, {step: found for step, found in steps.items() if found is not None}, names)
        partings += [parting] if parting else []
    return Replay(
        transaction=first.facts["transaction"],
        version=first.facts["version"],
        is_delta=is_delta,
        num_chunks=sum(rank.num_chunks for rank in ranks),
        num_bytes=num_bytes,
        seconds=max(times, default=0.0) - min(times, default=0.0),
        partings=tuple(partings),
        broken=tuple(broken),
        missing=tuple(missing),
        outcomes={rank.who: str(rank.facts.get("outcome", "cut short")) for rank in ranks},
    )


class Assembly:
    """The rows of one rank, as its chunks make them."""

    def __init__(self, rank: Flight) -> None:
        facts = rank.facts
        self._names = [name for name, _ in facts["tensors"]]
        self._row_bytes = [row_bytes for _, row_bytes in facts["tensors"]]
        self._row0 = facts["row_start"]
        counts = [stop - start for start, stop in zip(facts["row_start"], facts["row_stop"], strict=True)]
        self._is_delta = bool(facts["is_delta"])
        sizes = [0 if self._is_delta else count * each for count, each in zip(counts, self._row_bytes, strict=True)]
        self._rows = [np.zeros(size, np.uint8) for size in sizes]

    def take(self, message: bytes) -> str:
        """Put one chunk where it belongs; returns what is wrong with it, "" for nothing."""
        try:
            chunk = decode_request(message)
            if not isinstance(chunk, Chunk):
                return "no chunk"
            check(chunk)
        except (WeightUpdateError, ValueError) as error:
            return str(error)
        return "" if self._is_delta else self._place(chunk)

    def _place(self, chunk: Chunk) -> str:
        if not isinstance(chunk.payload, memoryview):
            return f"chunk {chunk.sequence}: its payload is not in the record"
        at, payload = 0, np.frombuffer(chunk.payload, np.uint8)
        pieces = (column.tolist() for column in (chunk.tensor, chunk.offset, chunk.length))
        for tensor, offset, length in zip(*pieces, strict=True):
            if tensor >= len(self._rows):
                return f"chunk {chunk.sequence}: tensor {tensor} of {len(self._rows)}"
            rows, first = self._rows[tensor], offset - self._row0[tensor] * self._row_bytes[tensor]
            if first < 0 or first + length > len(rows):
                return f"chunk {chunk.sequence}: {self._names[tensor]}: bytes at {offset} are not this rank's"
            rows[first : first + length] = payload[at : at + length]
            at += length
        return ""

    def digests(self) -> Digests:
        """Of all rows, [n, 2]."""
        found = [
            digest_rows(name_key(name), torch.from_numpy(rows).reshape(-1, row_bytes), row0) if len(rows) else (0, 0)
            for name, rows, row_bytes, row0 in zip(self._names, self._rows, self._row_bytes, self._row0, strict=True)
        ]
        return np.array(found, np.uint64).reshape(-1, 2)


def _sum(ranks: Sequence[Flight], step: str, names: Sequence[str]) -> Digests | None:
    if not all(step in rank.digests for rank in ranks):
        return None
    total, place = np.zeros((len(names), 2), np.uint64), {name: i for i, name in enumerate(names)}
    for rank in ranks:
        total[[place[name] for name, _ in rank.facts["tensors"]]] += rank.digests[step]
    return total


def _first_parting(replica: int, steps: dict[str, Digests], names: Sequence[str]) -> Parting | None:
    order = [step for step in STEPS if step in steps]
    for before, step in pairwise(order):
        differs = np.flatnonzero(unlike(steps[before], steps[step]))
        if len(differs):
            return Parting(replica=replica, step=step, before=before, tensors=tuple(names[int(i)] for i in differs))
    return None
