"""The plan of a push as a value: who sends which rows of which tensor to whom.

    plan = plan_routes(sent, owned, row_bytes)                 # Tiles of the trainer (each row once) and of the service
    plan.link_bytes()                                          # [trainer ranks, actor ranks]
    plan.routes_of(tensor)                                     # the routes of one tensor, by row

A pure function of two placements: whoever has both, has the same plan, and its digest says so. Routes are kept by kind
of tensor (sharding.tiles), so a model of a trillion parameters has a few thousand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from .tiles import Ints, Kind, Tiles, kinds


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Rows [start, stop) of a tensor go from a trainer rank to an actor rank."""

    tensor: int
    sender: int
    receiver: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KindRoutes:
    """The routes of every one of some tensors that lie alike: columns."""

    tensors: Ints
    sender: Ints
    receiver: Ints
    start: Ints
    stop: Ints


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutePlan:
    """All routes of a push. num_senders, num_receivers: ranks on either side. row_bytes: by tensor."""

    kinds: tuple[KindRoutes, ...]
    row_bytes: Ints
    num_senders: int
    num_receivers: int

    @property
    def num_routes(self) -> int:
        return sum(len(kind.tensors) * len(kind.sender) for kind in self.kinds)

    @property
    def digest(self) -> str:
        """32 hex digits over all routes."""
        content = xxhash.xxh3_128(np.array([self.num_senders, self.num_receivers]).tobytes())
        for kind in self.kinds:
            for each in (kind.tensors, kind.sender, kind.receiver, kind.start, kind.stop):
                content.update(len(each).to_bytes(8, "little"))
                content.update(each.tobytes())
        return content.hexdigest()

    def link_bytes(self) -> Ints:
        """Bytes from every trainer rank to every actor rank."""
        links = np.zeros(self.num_senders * self.num_receivers, np.int64)
        for kind in self.kinds:
            pairs = kind.sender * self.num_receivers + kind.receiver
            np.add.at(links, pairs, (kind.stop - kind.start) * int(self.row_bytes[kind.tensors].sum()))
        return links.reshape(self.num_senders, self.num_receivers)

    def rank_tensors(self) -> tuple[Ints, Ints]:
        """How many tensors every trainer rank sends rows of, and how many every actor rank gets rows of."""
        counts = np.zeros(self.num_senders, np.int64), np.zeros(self.num_receivers, np.int64)
        for kind in self.kinds:
            for count, ranks in zip(counts, (kind.sender, kind.receiver), strict=True):
                count[np.unique(ranks)] += len(kind.tensors)
        return counts

    def routes(self) -> Iterator[Route]:
        """All of them; of a large model that is a long list."""
        for kind in self.kinds:
            columns = (each.tolist() for each in (kind.sender, kind.receiver, kind.start, kind.stop))
            rows = list(zip(*columns, strict=True))
            for tensor in kind.tensors.tolist():
                for sender, receiver, start, stop in rows:
                    yield Route(tensor=tensor, sender=sender, receiver=receiver, start=start, stop=stop)

    def routes_of(self, tensor: int) -> list[Route]:
        """The routes of one tensor."""
        held = RoutePlan(
            kinds=tuple(
                KindRoutes(
                    tensors=np.array([tensor]),
                    sender=kind.sender,
                    receiver=kind.receiver,
                    start=kind.start,
                    stop=kind.stop,
                )
                for kind in self.kinds
                if tensor in kind.tensors
            ),
            row_bytes=self.row_bytes,
            num_senders=self.num_senders,
            num_receivers=self.num_receivers,
        )
        return list(held.routes())


def plan_routes(
    sent: Tiles,
    owned: Tiles,
    row_bytes: npt.ArrayLike,
    *,
    num_senders: int | None = None,
    num_receivers: int | None = None,
) -> RoutePlan:
    """Intersect what trainer ranks send with what actor ranks own, at row granularity.

    A row goes to every rank that owns it: one of each replica, and more where a replica keeps it twice. sent holds
    every row once (sharding.tiles.senders).
    """
    sizes = np.asarray(row_bytes, np.int64)
    found = (_crossed(kind, sent, owned) for kind in kinds(len(sizes), sent, owned))
    return RoutePlan(
        kinds=tuple(each for each in found if len(each.sender)),
        row_bytes=sizes,
        num_senders=_count(sent) if num_senders is None else num_senders,
        num_receivers=_count(owned) if num_receivers is None else num_receivers,
    )


def _crossed(kind: Kind, sent: Tiles, owned: Tiles) -> KindRoutes:
    """Every range of one side with every range of the other: of one kind there are few."""
    ours, theirs = kind.entries
    start = np.maximum(sent.start[ours][:, None], owned.start[theirs][None, :])
    stop = np.minimum(sent.stop[ours][:, None], owned.stop[theirs][None, :])
    i, j = np.nonzero(start < stop)
    order = np.lexsort((owned.rank[theirs][j], sent.rank[ours][i], start[i, j]))
    i, j = i[order], j[order]
    return KindRoutes(
        tensors=kind.tensors,
        sender=sent.rank[ours][i],
        receiver=owned.rank[theirs][j],
        start=start[i, j],
        stop=stop[i, j],
    )


def _count(tiles: Tiles) -> int:
    return int(tiles.rank.max()) + 1 if len(tiles.rank) else 0
