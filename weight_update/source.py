"""What a trainer brings, matched with what the service holds: the plan of one push on one trainer rank.

Everything that can be refused is refused here, before a byte is sent, all of it in one message. Nothing here talks to
anyone: each trainer rank makes an offer of what it has, and from all offers each makes the same plan.

    offer = offer_of(manifest, model, scope)         # weight_update.sharing makes the plan of it
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from quant.expert_maps import ExpertMaps, module_of
from quant.formats import FORMATS, NON_FINITE, TensorSpec, dtype_name
from quant.names import IDENTITY, Link, NameMap, NameMapError, Share, canonical_name, expert_parts, nearest
from quant.parameters import ParameterRow
from quant.variants import bare, by_bare_name
from sharding.routes import LocalRows, LowRank, Runs, local_rows

from .adapters import Adapted, adapted
from .columns import Columns
from .errors import ManifestError, raise_all
from .inplace import local_of
from .manifest import Manifest

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})

NO_MAPS = ExpertMaps()

Scope = str | Sequence[str]
Items = nn.Module | Mapping[str, nn.Module] | Iterable[tuple[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Rows of one parameter to encode, or of one tensor that already is in checkpoint form.

    specs: the tensors that these rows become, in the format's component order; one for checkpoint form. Several sources
    may be rows of one parameter, when the trainer keeps apart what the service packs.
    rows: [n, ...] on this trainer rank, n may be 0. runs: which rows of the parameter or tensor they are. sent: those
    of them that this rank sends; other ranks hold the rest, too, and send it. updates: of adapters, added to the rows
    when they are encoded.
    """

    name: str
    kind: Literal["encode", "checkpoint"]
    parameter: ParameterRow
    specs: tuple[TensorSpec, ...]
    rows: Tensor
    runs: Runs
    sent: Runs
    updates: tuple[LowRank, ...] = ()

    @property
    def first(self) -> int:
        """Index of the first row; 0 where there is none."""
        return self.runs[0][0] if self.runs else 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Offer:
    """What one trainer rank has for the service, and what is wrong with it. chosen: names in the scope on this rank.
    has_adapters: the model is adapted, so that something must be merged. is_lasting: all rows are views of what was
    given, so that they show what it becomes."""

    sources: Mapping[Share, Source]
    chosen: frozenset[str]
    problems: list[str]
    has_adapters: bool
    is_lasting: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PushPlan:
    """What one push sends: this rank's sources, and on every trainer rank the same tensors, in one order.

    order: name of every parameter to encode, with its row, and of every tensor in checkpoint form, with None.
    columns: the same as arrays.
    """

    sources: tuple[Source, ...]
    specs: tuple[TensorSpec, ...]
    logical_bytes: int  # of the pushed parameters in BF16
    carried_over: int  # parameters outside the scope, which keep their bytes
    widened: tuple[str, ...]  # parameters added because their fused group was cut
    order: tuple[tuple[str, ParameterRow | None], ...]
    columns: Columns

    @property
    def merged_adapters(self) -> int:
        """LoRA adapters, each counted once a weight."""
        return sum(len(source.updates) for source in self.sources)


def named_items(model: Items) -> Adapted:
    """The (name, tensor) pairs of a trainer's model, tied names included; which are trainable; its adapters apart.

    Of several models in a mapping, the components of a pipeline, every name follows the model's own and a dot.
    """
    if not isinstance(model, nn.Module | Mapping):
        items = list(model)
        return Adapted(items=items, trainable=frozenset(name for name, _ in items), low_rank={}, has_adapters=False)
    modules = {"": model} if isinstance(model, nn.Module) else {f"{name}.": each for name, each in model.items()}
    parts = [adapted(prefix, each, each.named_parameters(remove_duplicate=False)) for prefix, each in modules.items()]
    return Adapted(
        items=[item for part in parts for item in part.items],
        trainable=frozenset[str]().union(*(part.trainable for part in parts)),
        low_rank={name: updates for part in parts for name, updates in part.low_rank.items()},
        has_adapters=any(part.has_adapters for part in parts),
    )


def offer_of(
    manifest: Manifest,
    model: Items | Adapted,
    scope: Scope,
    *,
    names: NameMap = IDENTITY,
    experts: ExpertMaps = NO_MAPS,
) -> Offer:
    """Match the tensors of one trainer rank with the manifest.

    names: from the trainer's names to the service's; a tensor may pack several parameters, or be a part of one.
    experts: the maps that are to hold after the push; what a trainer's own tensors say of maps is passed over.
    """
    given = model if isinstance(model, Adapted) else named_items(model)
    given = replace(given, items=[*(each for each in given.items if module_of(each[0]) is None), *experts.tensors()])
    refused = _refused(manifest, [name for name, _ in given.items], names)
    matched = _Matched(manifest, _Known.of(manifest), problems=[refused] if refused else [])
    in_scope = _selector(scope)
    for trainer_name, tensor in given.items if not refused else ():
        wanted = in_scope(trainer_name, trainer_name in given.trainable)
        parts, problem = _parts(names, trainer_name, tensor, given.low_rank.get(trainer_name, ()))
        matched.problems += [problem] if problem else []
        matched.problems += _slotless(parts, experts)
        for share, part in _as_held(parts, experts, matched.known.variants):
            is_wanted = wanted or in_scope(experts.logical(bare(share.name)), False)
            matched.take(share, part, is_wanted, tensor)
    return Offer(
        sources=matched.found,
        chosen=frozenset(name for name, wanted in matched.chosen.items() if wanted),
        problems=[*matched.problems, *_filled_twice(matched.found)],
        has_adapters=given.has_adapters,
        is_lasting=matched.is_lasting,
    )


@dataclass(slots=True)
class _Matched:
    """What was found of a manifest so far. chosen: whether a source is in the scope. is_lasting: sources are the very
    memory of the tensors."""

    manifest: Manifest
    known: _Known
    problems: list[str]
    found: dict[Share, Source] = field(default_factory=dict)
    chosen: dict[str, bool] = field(default_factory=dict)
    seen: set[Share] = field(default_factory=set)
    is_lasting: bool = True

    def take(self, share: Share, part: LocalRows, is_wanted: bool, tensor: Tensor) -> None:
        """One part of a trainer's tensor, under the service's name."""
        name, known = share.name, self.known
        if share in self.seen:
            self.problems.append(f"{name}: given twice; give every name once")
            return
        self.seen.add(share)
        row = known.row_of(name)
        if row is None:
            self.problems += [_unknown(name, [*known.rows, *known.owners])] if is_wanted else []
            return
        source, problem = _source(self.manifest, row, row.name if name in known.aliases else name, part)
        self.problems += [problem] if problem else []
        if source is None:
            return
        held = self.found.setdefault(_held(share, source), source)
        own, rows = local_of(tensor).untyped_storage().data_ptr(), source.rows
        is_view = not rows.numel() or rows.untyped_storage().data_ptr() == own
        self.is_lasting = self.is_lasting and is_view and held.rows.data_ptr() == rows.data_ptr()
        if not _same(held, source):
            self.problems.append(f"{name}: tied to {row.name} and its bytes differ; give one of them")
        self.chosen[source.name] = self.chosen.get(source.name, False) or is_wanted


@dataclass(frozen=True, slots=True)
class _Known:
    """The service's parameters by name, by the names tied to them, and by the names of their tensors."""

    rows: Mapping[str, ParameterRow]
    aliases: Mapping[str, ParameterRow]
    owners: Mapping[str, ParameterRow]
    variants: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, manifest: Manifest) -> _Known:
        rows = {row.name: row for row in manifest.parameters}
        owners = {spec.name: row for row in manifest.parameters for spec in manifest.tensors_of(row)}
        aliases = {alias: row for row in manifest.parameters for alias in row.aliases}
        return cls(rows, aliases, owners, by_bare_name(rows | owners))

    def row_of(self, name: str) -> ParameterRow | None:
        return self.rows.get(name) or self.aliases.get(name) or self.owners.get(name)


Parts = list[tuple[Share, LocalRows]]


def _parts(
    names: NameMap, trainer_name: str, tensor: Tensor, updates: Sequence[LowRank]
) -> tuple[Parts, str | None]:
    """One item as shares of checkpoint parameters, those held elsewhere with no rows; or why it cannot be any."""
    links = names.forward(canonical_name(trainer_name))
    shape = tuple(tensor.shape)
    is_stacked = any(expert_parts(link.target.name, shape) for link in links)
    try:
        local = local_rows(tensor, lead=2 if is_stacked else 1).with_updates(updates)
    except ValueError as error:
        return [], f"{trainer_name}: {error}; reshard it, or push full tensors"
    parts: Parts = []
    for link in links:
        try:
            linked = _linked(link, local)
        except NameMapError as error:
            return [], str(error)
        parts += _experts(link.target.name, shape, linked) if is_stacked else [(link.target, linked)]
    return parts, None


def _as_held(parts: Parts, experts: ExpertMaps, variants: Mapping[str, tuple[str, ...]]) -> Parts:
    """The same under the names of the service: an expert once for every slot that holds it, and all once for every
    format that holds them otherwise."""
    return [
        (replace(share, name=name), part)
        for share, part in parts
        for slot in experts.slots(share.name)
        for name in variants.get(slot, (slot,))
    ]


def _slotless(parts: Parts, experts: ExpertMaps) -> list[str]:
    names = [share.name for share, _ in parts if not experts.slots(share.name)]
    return [f"{name}: its expert is in no slot of the map; give it one" for name in names]


def _linked(link: Link, local: LocalRows) -> LocalRows:
    """The rows of a share of one tensor as rows of the parameter that they belong to; a single value is everyone's."""
    if (link.source.is_whole and link.target.is_whole) or math.prod(local.shape) == 1:
        return local
    start, stop = link.source.rows(local.shape[0])
    num_rows = link.target.rows_of_whole(stop - start)
    return local.cut(start, stop).within(num_rows, link.target.rows(num_rows)[0])


def _experts(name: str, shape: tuple[int, ...], local: LocalRows) -> Parts:
    """The experts of a stacked parameter [E, R, ...], whose rows here are those of [E * R, ...]."""
    parts = expert_parts(name, (local.shape[0] // shape[1], *shape[1:]))
    firsts = ((part, part.expert * shape[1]) for part in parts)
    return [(Share(name=part.name), local.cut(first + part.row0, first + part.row1)) for part, first in firsts]


def _held(share: Share, source: Source) -> Share:
    """What a source fills, under its own name: of a single value always the whole."""
    if all(math.prod(spec.shape) == 1 for spec in source.specs):
        return Share(name=source.name)
    return share if share.name == source.name else replace(share, name=source.name)


def _filled_twice(found: Mapping[Share, Source]) -> list[str]:
    """Parameters of which several of this rank's tensors hold the same rows."""
    runs: dict[str, list[tuple[int, int]]] = {}
    for source in found.values():
        runs.setdefault(source.name, []).extend(source.runs)
    return [
        f"{name}: filled twice; push tensors that make up the whole of it"
        for name, each in runs.items()
        if any(before[1] > after[0] for before, after in pairwise(sorted(each)))
    ]


def _selector(scope: Scope) -> Callable[[str, bool], bool]:
    """Whether a name, trainable or not, is in the scope."""
    named: dict[str, Callable[[str, bool], bool]] = {
        "all": lambda name, trainable: True,
        "trainable": lambda name, trainable: trainable,
    }
    if isinstance(scope, str) and scope in named:
        return named[scope]
    patterns = [scope] if isinstance(scope, str) else list(scope)
    return lambda name, trainable: any(fnmatchcase(name, pattern) for pattern in patterns)


def _refused(manifest: Manifest, items: Sequence[str], names: NameMap) -> str | None:
    """Why nothing of these items can be pushed: there are none, or a pipeline's model came without its component."""
    if not items:
        return "the model or iterable holds no tensor; pass the model whose weights are to be pushed"
    known = {name for row in manifest.parameters for name in (row.name, *row.aliases)}
    given = {canonical_name(name) for name in items}
    components = sorted({name.partition(".")[0] for name in known if name.partition(".")[2] in given})
    if names is not IDENTITY or not components or not given.isdisjoint(known):
        return None
    example = ", ".join(f'"{name}": model' for name in components)
    return (
        f"{items[0]} and all other names lack their component: the service holds {', '.join(components)}; push a"
        f" mapping from component to module, {{{example}}}"
    )


def _unknown(name: str, known: Sequence[str]) -> str:
    return f"{name}: unknown to the service ({nearest(name, known)}); leave it out with scope patterns"


def _source(manifest: Manifest, row: ParameterRow, name: str, local: LocalRows) -> tuple[Source | None, str | None]:
    """The source that one item makes, or why it cannot be one."""
    specs = manifest.tensors_of(row)
    is_float = local.rows.dtype in FLOATS
    if name == row.name and is_float and local.shape == row.shape:
        problem = _not_encodable(row, local)
        required = manifest.required_of(row)  # an input scale is calibration: it comes by itself or is carried over
        encoded = tuple(spec for spec in specs if spec.name in required)
        return (None, problem) if problem else (_made(name, "encode", row, encoded, local), None)
    dtype = dtype_name(local.rows.dtype)
    quantized = FORMATS[row.format].is_quantized
    spec = next((spec for spec in specs if spec.name == name), None)
    if spec is not None and (dtype, local.shape) == (spec.dtype, spec.shape):
        if local.updates:
            return None, f"{name}: adapters over packed weights cannot be merged; push {list(row.shape)} in BF16"
        return _made(name, "checkpoint", row, (spec,), local), None
    if name == row.name and quantized and is_float and spec is not None and local.shape == spec.shape:
        return None, (
            f"{name}: {dtype} values in the packed shape {list(local.shape)}; an implicit float-to-packed cast is"
            f" refused, push {list(row.shape)} in BF16 or FP32"
        )
    expected = [f"{list(row.shape)} of BF16 or FP32"] if name == row.name else []
    expected += [f"{list(spec.shape)} of {spec.dtype}"] if spec is not None and quantized else []
    return None, f"{name}: got {list(local.shape)} of {dtype}, expected {' or '.join(expected)}"


def _not_encodable(row: ParameterRow, local: LocalRows) -> str | None:
    """Why these rows cannot become checkpoint form here: calibration is missing, or rows that share a scale are cut."""
    fmt = FORMATS[row.format]
    if fmt.needs:
        needs = ", ".join(fmt.needs)
        return f"{row.name}: {row.format} needs {needs}, which a trainer has not; push it in checkpoint form"
    step = fmt.row_step
    for start, stop in local.runs:
        if start % step or (stop % step and stop != row.shape[0]):
            return (
                f"{row.name}: rows {start}:{stop} cut a block of {step} rows that share a scale in {row.format}; shard "
                f"the trainer at multiples of {step} rows, or push from one rank"
            )
    return None


def _made(
    name: str, kind: Literal["encode", "checkpoint"], row: ParameterRow, specs: tuple[TensorSpec, ...], local: LocalRows
) -> Source:
    return Source(
        name=name,
        kind=kind,
        parameter=row,
        specs=specs,
        rows=local.rows,
        runs=local.runs,
        sent=local.runs,
        updates=local.updates,
    )


def _same(a: Source, b: Source) -> bool:
    if a.kind != b.kind or a.runs != b.runs or a.rows.shape != b.rows.shape or a.rows.dtype != b.rows.dtype:
        return False
    if a.updates != b.updates:  # by identity: a tied weight that is adapted under one of its names only
        return False
    same_memory = a.rows.data_ptr() == b.rows.data_ptr() and a.rows.stride() == b.rows.stride()
    return same_memory or torch.equal(a.rows, b.rows)


def check_finite(plan: PushPlan, amax_bits: np.ndarray, first_nonfinite: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse NaN and Inf; names each tensor and, where this rank holds it, the index.

    amax_bits: in the plan's order, the BF16 bits of the largest magnitude over all trainer ranks; 0x7F80 and above are
    not finite.
    """
    problems = []
    for i in np.flatnonzero(amax_bits >= NON_FINITE).tolist():
        name = plan.order[i][0]
        where = first_nonfinite.get(name)
        at = f"index {list(where)}" if where is not None else "in rows of another trainer rank"
        problems.append(f"{name}: NaN or Inf at {at}; the weights are not finite, nothing was sent")
    raise_all(ManifestError, "push refused", problems)
