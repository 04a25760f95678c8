"""Which rows of which tensors ranks hold, who of them sends a row, and in what order: the placement as a value.

A model has many tensors and few ways in which they are cut: what ranks hold is kept by cut, not by tensor, and every
function here works on kinds, tensors that lie alike, with arithmetic on arrays.

    held = Tiles.joined(Tiles.of(rank, tensors, starts, stops) for ...)     # on either side
    sent = senders(held, num_rows)                                          # every row once
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

Ints = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.uint32]

STEP_ROWS = 128  # rows that several ranks hold are dealt out at multiples of this; no scale block has more rows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tiles:
    """Entry i: rank[i] holds rows [start[i], stop[i]) of every tensor in tensors[i] (sorted numbers, uint32)."""

    rank: Ints
    start: Ints
    stop: Ints
    tensors: tuple[Numbers, ...]

    @classmethod
    def of(cls, rank: int, tensors: npt.ArrayLike, start: npt.ArrayLike, stop: npt.ArrayLike) -> Tiles:
        """What one rank holds, given tensor by tensor; a tensor may come several times. Empty ranges are left out."""
        numbers, begin, end = (np.asarray(each, np.int64) for each in (tensors, start, stop))
        some = begin < end
        order = np.lexsort((numbers[some], end[some], begin[some]))
        numbers, begin, end = (each[some][order] for each in (numbers, begin, end))
        first = np.flatnonzero(np.diff(begin, prepend=-1) | np.diff(end, prepend=-1))
        return cls(
            rank=np.full(len(first), rank, np.int64),
            start=begin[first],
            stop=end[first],
            tensors=tuple(part.astype(np.uint32) for part in np.split(numbers, first[1:])) if len(first) else (),
        )

    @classmethod
    def joined(cls, parts: Iterable[Tiles]) -> Tiles:
        """All of them, in this order."""
        given = list(parts)
        empty = np.empty(0, np.int64)
        rank, start, stop = (
            np.concatenate([empty, *(getattr(part, name) for part in given)]) for name in ("rank", "start", "stop")
        )
        return cls(rank=rank, start=start, stop=stop, tensors=tuple(each for part in given for each in part.tensors))

    @property
    def digest(self) -> str:
        """32 hex digits over everything."""
        content = xxhash.xxh3_128()
        columns: list[npt.NDArray[Any]] = [self.rank, self.start, self.stop, *self.tensors]
        for each in columns:
            content.update(len(each).to_bytes(8, "little"))
            content.update(np.ascontiguousarray(each).data)
        return content.hexdigest()

    def of_rank(self, rank: int) -> Iterator[tuple[int, int, int]]:
        """(tensor, start, stop) of one rank."""
        for i in np.flatnonzero(self.rank == rank).tolist():
            start, stop = int(self.start[i]), int(self.stop[i])
            yield from ((tensor, start, stop) for tensor in self.tensors[i].tolist())

    def only(self, tensors: Ints) -> Tiles:
        """What is held of these tensors; a rank that plans its own part needs no more."""
        kept = [np.intersect1d(each, tensors, assume_unique=True) for each in self.tensors]
        some = np.flatnonzero([len(each) for each in kept])
        return Tiles(
            rank=self.rank[some],
            start=self.start[some],
            stop=self.stop[some],
            tensors=tuple(kept[i].astype(np.uint32) for i in some.tolist()),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kind:
    """Tensors that lie alike. entries: of each side's tiles, those that hold them."""

    tensors: Ints
    entries: tuple[Ints, ...]


def kinds(num_tensors: int, *sides: Tiles, also: Ints | None = None) -> list[Kind]:
    """Group tensors by what holds them. also: a number by tensor that tells kinds apart, such as its rows."""
    mixed = np.zeros(num_tensors, np.uint64) if also is None else _mix(also.astype(np.uint64))
    for number, side in enumerate(sides):
        keys = _mix(np.arange(len(side.tensors), dtype=np.uint64) + np.uint64((number + 1) << 40))
        for key, tensors in zip(keys, side.tensors, strict=True):
            mixed[tensors] += key  # a tensor is in an entry once; sums wrap
    _, first, kind_of = np.unique(mixed, return_index=True, return_inverse=True)
    order = np.argsort(kind_of, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(kind_of[order])) + 1)
    entries = [_entries_of(side, first, num_tensors) for side in sides]
    return [
        Kind(tensors=tensors, entries=tuple(each[i] for each in entries))
        for i, tensors in enumerate(members)
        if len(tensors)
    ]


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """64 well-mixed bits of each number (the finalizer of splitmix64), so that sums of few tell sets apart."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _entries_of(side: Tiles, representatives: Ints, num_tensors: int) -> list[Ints]:
    """The entries that hold each representative."""
    place = np.full(num_tensors, -1, np.int64)
    place[representatives] = np.arange(len(representatives))
    found: list[list[int]] = [[] for _ in representatives]
    for entry, tensors in enumerate(side.tensors):
        places = place[tensors]
        for i in places[places >= 0].tolist():
            found[i].append(entry)
    return [np.array(each, np.int64) for each in found]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Rows [start, stop) of a tensor that no rank holds."""

    tensor: int
    start: int
    stop: int


def senders(held: Tiles, num_rows: Ints) -> tuple[Tiles, list[Gap]]:
    """Of rows that several ranks hold, each gets its part to send: every row once. And the rows that nobody holds.

    num_rows: by tensor. Parts begin at multiples of STEP_ROWS; what is too small to be shared goes in turn to each.
    """
    sent: list[tuple[int, int, int, Numbers]] = []
    gaps: list[Gap] = []
    for kind in kinds(len(num_rows), held, also=num_rows):
        entries, rows = kind.entries[0], int(num_rows[kind.tensors[0]])
        tensors = kind.tensors.astype(np.uint32)
        ranks, starts, stops = (each[entries] for each in (held.rank, held.start, held.stop))
        for start, stop in _cuts(starts, stops, rows):
            holders = np.unique(ranks[(starts <= start) & (stop <= stops)])
            if not len(holders):
                gaps += [Gap(tensor=int(tensor), start=start, stop=stop) for tensor in kind.tensors]
                continue
            sent += _dealt(start, stop, holders, tensors)
    rank, begin, end = (np.array([each[i] for each in sent], np.int64) for i in range(3))
    return Tiles(rank=rank, start=begin, stop=end, tensors=tuple(each[3] for each in sent)), gaps


def _cuts(starts: Ints, stops: Ints, num_rows: int) -> list[tuple[int, int]]:
    """Rows [0, num_rows) between all boundaries."""
    edges = np.unique(np.concatenate([starts, stops, np.array([0, num_rows])]))
    edges = edges[(edges >= 0) & (edges <= num_rows)]
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


def _dealt(start: int, stop: int, holders: Ints, tensors: Numbers) -> list[tuple[int, int, int, Numbers]]:
    """Rows that all holders hold: an equal part for each where there are enough, else to one holder a tensor."""
    count = len(holders)
    if count == 1:
        return [(int(holders[0]), start, stop, tensors)]
    steps = (stop - start) // STEP_ROWS
    if steps < count:
        return [
            (int(holder), start, stop, tensors[turn::count])
            for turn, holder in enumerate(holders)
            if len(tensors[turn::count])
        ]
    edges = start + (stop - start) * np.arange(1, count) // count
    inner = np.clip((edges + STEP_ROWS // 2) // STEP_ROWS * STEP_ROWS, start, stop)
    bounds: Sequence[int] = [start, *inner.tolist(), stop]
    parts = zip(holders.tolist(), bounds[:-1], bounds[1:], strict=True)
    return [(holder, a, b, tensors) for holder, a, b in parts if a < b]


def as_tensors(sent: Tiles, parameter: Ints, rows: Ints, num_rows: Ints | None = None) -> Tiles:
    """From rows of parameters to rows of the tensors that hold them.

    parameter: by tensor, the number of its parameter in `sent`. rows: by tensor, how many rows of the parameter one of
    its own stands for; 0 of what goes by no row, comes from whoever sends row 0, and has num_rows rows of its own
    (default: 1).
    """
    own = np.ones_like(rows) if num_rows is None else np.where(rows == 0, num_rows, 1)
    order = np.argsort(parameter, kind="stable")
    found: list[Tiles] = []
    for stands_for, count in np.unique(np.stack([rows, own]), axis=1).T.tolist():
        children = order[(rows[order] == stands_for) & (own[order] == count)]
        parents = parameter[children]
        some = np.flatnonzero(sent.start == 0) if stands_for == 0 else np.arange(len(sent.tensors))
        step = max(1, stands_for)
        held = {id(sent.tensors[i]): sent.tensors[i] for i in some.tolist()}  # what lies alike shares one array
        made = {key: np.sort(children[_places(parents, each)]).astype(np.uint32) for key, each in held.items()}
        entries = [made[id(sent.tensors[i])] for i in some.tolist()]
        kept = [n for n, each in enumerate(entries) if len(each)]
        at = some[kept]
        found.append(
            Tiles(
                rank=sent.rank[at],
                start=sent.start[at] // step,
                stop=-(-sent.stop[at] // step) if stands_for else np.full(len(at), count, np.int64),
                tensors=tuple(entries[n] for n in kept),
            )
        )
    return Tiles.joined(found)


def _places(ordered: Ints, wanted: Numbers) -> Ints:
    """Where the wanted numbers stand in an ordered array, all of them, however often each does."""
    first, last = np.searchsorted(ordered, wanted, "left"), np.searchsorted(ordered, wanted, "right")
    counts = last - first
    starts = np.repeat(first - np.cumsum(counts) + counts, counts)
    return starts + np.arange(int(counts.sum()))
