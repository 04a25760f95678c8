"""Who of the trainer's ranks sends what: from the placements that all of them state, the same plan on each.

    offer = offer_of(manifest, model, scope)
    holding = holding_of(manifest, offer, rank)                   # small, and all that the others need to know
    shared = share_out(manifest, all_holdings, holding)           # pure; may be kept while the digests stay the same
    plan, problems = plan_of(manifest, offer, shared, rank, scope)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import xxhash

from quant.expert_maps import ExpertMaps
from quant.formats import TensorSpec
from quant.names import IDENTITY, NameMap
from quant.parameters import ParameterRow
from sharding.routes import Runs
from sharding.tiles import Gap, Tiles, senders

from .columns import Columns
from .encoder import is_sent_as_is, is_small
from .manifest import Manifest
from .source import NO_MAPS, Items, Offer, PushPlan, Scope, Source, offer_of

Ints = npt.NDArray[np.int64]

MAX_GAPS = 20  # of one push that are told
UNMERGED = (
    "the model has adapters, and none of them would be merged: they are disabled, merged already, or outside the scope;"
    " enable them, or push the model without (unload)"
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Holding:
    """What one trainer rank can send; tensors are numbers of the manifest, sorted.

    A parameter to encode stands under its first tensor, whose rows are its own; what is in checkpoint form under
    itself. tiles: the rows. chosen: in the scope on this rank. encode, raw: to encode, in checkpoint form.
    """

    tiles: Tiles
    chosen: Ints
    encode: Ints
    raw: Ints

    @property
    def digest(self) -> str:
        """Equal for equal holdings."""
        others = (xxhash.xxh3_128_hexdigest(each.tobytes()) for each in (self.chosen, self.raw))
        return " ".join([self.tiles.digest, *others])


def holding_of(manifest: Manifest, offer: Offer, rank: int) -> Holding:
    """The placement of one trainer rank."""
    numbered = [(manifest.index[source.specs[0].name], source) for source in offer.sources.values()]
    table = np.array([(number, *run) for number, source in numbered for run in source.runs], np.int64).reshape(-1, 3)
    return Holding(
        tiles=Tiles.of(rank, table[:, 0], table[:, 1], table[:, 2]),
        chosen=_sorted(number for number, source in numbered if source.name in offer.chosen),
        encode=_sorted(number for number, source in numbered if source.kind == "encode"),
        raw=_sorted(number for number, source in numbered if source.kind == "checkpoint"),
    )


def _sorted(numbers: Iterator[int]) -> Ints:
    return np.unique(np.fromiter(numbers, np.int64))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shared:
    """What all trainer ranks have together. sent: every row of what is sought once. gaps: rows that nobody has."""

    chosen: Ints
    encode: Ints
    raw: Ints
    sent: Tiles
    gaps: Sequence[Gap]


def share_out(manifest: Manifest, holdings: Sequence[Holding], own: Holding | None = None) -> Shared:
    """Who sends what; the same on every rank that is given the same.

    own: of the tensors of this holding alone senders are sought, so that a rank's plan is no larger for what others
    have; gaps are then found on the ranks that hold a part.
    """
    chosen, encode, raw = (
        np.unique(np.concatenate([getattr(each, name) for each in holdings])) for name in ("chosen", "encode", "raw")
    )
    sought = np.union1d(encode, raw) if own is None else np.union1d(own.encode, own.raw)
    num_rows = np.array([spec.num_rows for spec in manifest.tensors], np.int64)
    sought_rows = np.zeros_like(num_rows)
    sought_rows[sought] = num_rows[sought]
    sent, gaps = senders(Tiles.joined(each.tiles for each in holdings).only(sought), sought_rows)
    return Shared(chosen=chosen, encode=encode, raw=raw, sent=sent, gaps=gaps)


def plan_of(
    manifest: Manifest,
    offer: Offer,
    shared: Shared,
    rank: int,
    scope: Scope,
    moved: frozenset[str] = frozenset(),
) -> tuple[PushPlan | None, list[str]]:
    """The plan of one trainer rank, in the same order on all, the scope widened to whole fused groups and to what a new
    map of experts has moved; or every problem found (the caller raises, so that all ranks do)."""
    tensors, everything = manifest.tensors, scope == "all"
    problems = [] if len(shared.chosen) or offer.problems else [_nothing(offer, scope)]
    problems += [
        f"{tensors[number].name}: to encode on some trainer ranks, in checkpoint form on others; push one of them"
        for number in np.intersect1d(shared.encode, shared.raw).tolist()
    ]
    held = _held(manifest, shared)
    given = {held[number].name for number in shared.chosen.tolist()}
    sought = given | moved
    groups = {row.group for row in manifest.parameters if row.group and row.name in sought}
    wanted = [row for row in manifest.parameters if everything or row.name in sought or row.group in groups]
    names = {row.name for row in wanted}
    brought = {row.name for row in held.values()}
    why = "the scope is 'all'" if everything else "its fused group is pushed as a whole"
    reasons = dict.fromkeys(moved, "the new map of experts moves it")
    problems += [
        f"{row.name}: missing, and {reasons.get(row.name, why)}; add it" for row in wanted if row.name not in brought
    ]
    problems += list(_absent(manifest, shared, held, names))
    if problems:
        return None, problems
    encode = set(shared.encode.tolist())
    pushed = [(number, row) for number, row in held.items() if row.name in names]
    sources = _own(manifest, offer, shared, rank, names)
    specs = tuple(
        spec for number, row in pushed for spec in (_encoded(manifest, row) if number in encode else (tensors[number],))
    )
    order = tuple((row.name, row) if number in encode else (tensors[number].name, None) for number, row in pushed)
    plan = PushPlan(
        sources=sources,
        specs=specs,
        logical_bytes=sum(2 * math.prod(row.shape) for row in wanted),
        carried_over=len(manifest.parameters) - len(wanted),
        widened=tuple(row.name for row in wanted if row.name not in given),
        order=order,
        columns=_columns(manifest, specs, order, sources),
    )
    return (None, [UNMERGED]) if offer.has_adapters and not plan.merged_adapters else (plan, [])


def _columns(
    manifest: Manifest,
    specs: Sequence[TensorSpec],
    order: Sequence[tuple[str, ParameterRow | None]],
    sources: Sequence[Source],
) -> Columns:
    small = [i for i, source in enumerate(sources) if is_small(source)]
    return Columns.of(manifest, specs, order, sources, small, (i for i in small if is_sent_as_is(sources[i])))


def plan_push(
    manifest: Manifest, model: Items, scope: Scope, *, names: NameMap = IDENTITY, experts: ExpertMaps = NO_MAPS
) -> tuple[PushPlan | None, list[str]]:
    """The plan of a trainer of one rank, or every problem found."""
    offer = offer_of(manifest, model, scope, names=names, experts=experts)
    plan, problems = plan_of(manifest, offer, share_out(manifest, [holding_of(manifest, offer, 0)]), 0, scope)
    problems = [*offer.problems, *problems]
    return (None if problems else plan), problems


def _held(manifest: Manifest, shared: Shared) -> dict[int, ParameterRow]:
    """Everything that some trainer rank has, in the manifest's order, and the parameters it is of."""
    owners = {manifest.index[spec.name]: row for row in manifest.parameters for spec in manifest.tensors_of(row)}
    return {number: owners[number] for number in np.union1d(shared.encode, shared.raw).tolist()}


def _encoded(manifest: Manifest, row: ParameterRow) -> Iterator[TensorSpec]:
    required = manifest.required_of(row)  # an input scale is calibration: it comes by itself or is carried over
    return (spec for spec in manifest.tensors_of(row) if spec.name in required)


def _absent(manifest: Manifest, shared: Shared, held: dict[int, ParameterRow], names: set[str]) -> Iterator[str]:
    gaps = [gap for gap in shared.gaps if held[gap.tensor].name in names]
    for gap in gaps[:MAX_GAPS]:
        name = manifest.tensors[gap.tensor].name
        yield (
            f"{name}: only a part of its rows is there, no trainer rank has {gap.start}:{gap.stop}; push tensors that"
            " make up the whole of it"
        )
    if len(gaps) > MAX_GAPS:
        yield f"and {len(gaps) - MAX_GAPS} more: only a part of the rows is there"


def _own(manifest: Manifest, offer: Offer, shared: Shared, rank: int, names: set[str]) -> tuple[Source, ...]:
    """This rank's sources, with what it sends of them."""
    sent: dict[int, list[tuple[int, int]]] = {}
    for number, start, stop in shared.sent.of_rank(rank):
        sent.setdefault(number, []).append((start, stop))
    numbered = [(manifest.index[each.specs[0].name], each) for each in offer.sources.values()]
    return tuple(
        replace(source, sent=_common(source.runs, sent.get(number, [])))
        for number, source in sorted(numbered, key=lambda pair: pair[0])
        if source.parameter.name in names
    )


def _common(runs: Runs, sent: Sequence[tuple[int, int]]) -> Runs:
    """The rows in both, in the order of the runs."""
    both = ((max(start, a), min(stop, b)) for start, stop in runs for a, b in sorted(sent))
    return tuple((start, stop) for start, stop in both if start < stop)


def _nothing(offer: Offer, scope: Scope) -> str:
    return f"scope {scope!r} selects none of {len(offer.sources)} tensors; use 'all', 'trainable' or patterns"
