"""What a trainer brings, matched with what the service holds: the plan of one push on one trainer rank.

Everything that can be refused is refused here, before a byte is sent, all of it in one message. Nothing here talks to
anyone.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from quant.formats import FORMATS, NON_FINITE, TensorSpec, dtype_name
from quant.names import IDENTITY, Link, NameMap, NameMapError, Share, canonical_name, expert_parts, uncovered
from quant.parameters import ParameterRow
from sharding.routes import LocalRows, local_rows

from .errors import ManifestError, raise_all
from .manifest import Manifest

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})

Scope = str | Sequence[str]
Items = nn.Module | Mapping[str, nn.Module] | Iterable[tuple[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Rows of one parameter to encode, or of one tensor that already is in checkpoint form.

    specs: the tensors that these rows become, in the format's component order; one for checkpoint form. Several sources
    may be rows of one parameter, when the trainer keeps apart what the service packs.
    rows: [n, ...] on this trainer rank, n may be 0. first: index of its first row. sends: another rank sends them if
    False.
    """

    name: str
    kind: Literal["encode", "checkpoint"]
    parameter: ParameterRow
    specs: tuple[TensorSpec, ...]
    rows: Tensor
    first: int
    sends: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PushPlan:
    """What one push sends: sources, and the tensors that they become, in one order on every trainer rank."""

    sources: tuple[Source, ...]
    specs: tuple[TensorSpec, ...]
    logical_bytes: int  # of the pushed parameters in BF16
    carried_over: int  # parameters outside the scope, which keep their bytes
    widened: tuple[str, ...]  # parameters added because their fused group was cut


def named_items(model: Items) -> tuple[list[tuple[str, Tensor]], frozenset[str]]:
    """The (name, tensor) pairs of a trainer's model, tied names included, and the names that are trainable.

    Of several models in a mapping, the components of a pipeline, every name follows the model's own and a dot.
    """
    if not isinstance(model, nn.Module | Mapping):
        items = list(model)
        return items, frozenset(name for name, _ in items)
    modules = {"": model} if isinstance(model, nn.Module) else {f"{name}.": each for name, each in model.items()}
    parameters = [
        (prefix + name, parameter)
        for prefix, module in modules.items()
        for name, parameter in module.named_parameters(remove_duplicate=False)
    ]
    return [*parameters], frozenset(name for name, parameter in parameters if parameter.requires_grad)


def plan_push(
    manifest: Manifest, model: Items, scope: Scope, *, is_first_rank: bool, names: NameMap = IDENTITY
) -> tuple[PushPlan | None, list[str]]:
    """Match a model with the manifest: the plan, or every problem found (the caller raises, so that all ranks do).

    names: from the trainer's names to the service's; a tensor may pack several parameters, or be a part of one.
    """
    items, trainable = named_items(model)
    refused = _refused(manifest, [name for name, _ in items], names)
    if refused:
        return None, [refused]
    problems: list[str] = []
    found: dict[Share, Source] = {}
    chosen: dict[str, bool] = {}
    seen: set[Share] = set()
    in_scope = _selector(scope)
    aliases = {alias: row for row in manifest.parameters for alias in row.aliases}
    rows = {row.name: row for row in manifest.parameters}
    owners = {spec.name: row for row in manifest.parameters for spec in manifest.tensors_of(row)}
    for trainer_name, tensor in items:
        wanted = in_scope(trainer_name, trainer_name in trainable)
        parts, problem = _parts(names, trainer_name, tensor, is_first_rank)
        problems += [problem] if problem else []
        for share, part in parts:
            name = share.name
            if share in seen:
                problems.append(f"{name}: given twice; give every name once")
                continue
            seen.add(share)
            wanted_part = wanted or in_scope(name, False)
            row = rows.get(name) or aliases.get(name) or owners.get(name)
            if row is None:
                if wanted_part:
                    problems.append(_unknown(name, [*rows, *owners]))
                continue
            source, problem = _source(manifest, row, row.name if name in aliases else name, part)
            problems += [problem] if problem else []
            if source is None:
                continue
            key = _held(share, source)
            if not _same(found.setdefault(key, source), source):
                problems.append(f"{name}: tied to {row.name} and its bytes differ; give one of them")
            chosen[source.name] = chosen.get(source.name, False) or wanted_part
    if not any(chosen.values()) and not problems:
        problems.append(f"scope {scope!r} selects none of {len(items)} tensors; use 'all', 'trainable' or patterns")
    plan, missing = _select(manifest, found, chosen, scope)
    problems += missing
    return (None if problems else plan), problems


Parts = list[tuple[Share, LocalRows]]


def _parts(names: NameMap, trainer_name: str, tensor: Tensor, is_first_rank: bool) -> tuple[Parts, str | None]:
    """One item as shares of checkpoint parameters, those held elsewhere with no rows; or why it cannot be any."""
    try:
        local = local_rows(tensor, is_first_rank=is_first_rank)
    except ValueError as error:
        return [], f"{trainer_name}: {error}; reshard it, or push full tensors"
    parts: Parts = []
    for link in names.forward(canonical_name(trainer_name)):
        try:
            linked = _linked(link, local)
        except NameMapError as error:
            return [], str(error)
        parts += _experts(link.target.name, linked) or [(link.target, linked)]
    return parts, None


def _linked(link: Link, local: LocalRows) -> LocalRows:
    """The rows of a share of one tensor as rows of the parameter that they belong to; a single value is everyone's."""
    if (link.source.is_whole and link.target.is_whole) or math.prod(local.shape) == 1:
        return local
    start, stop = link.source.rows(local.shape[0])
    num_rows = link.target.rows_of_whole(stop - start)
    first, last = (min(max(at, start), stop) for at in (local.first, local.first + local.rows.shape[0]))
    return LocalRows(
        rows=local.rows[first - local.first : last - local.first] if first < last else local.rows[:0],
        first=link.target.rows(num_rows)[0] + first - start,
        shape=(num_rows, *local.shape[1:]),
        sends=local.sends,
    )


def _experts(name: str, local: LocalRows) -> Parts:
    """The experts of a stacked parameter; none when it is not one."""
    parts = expert_parts(name, local.shape)
    if not parts:
        return []
    held = range(local.first, local.first + local.rows.shape[0])
    empty = local.rows.new_empty((0, local.shape[2]))
    return [
        (
            Share(name=part.name),
            LocalRows(
                rows=local.rows[part.expert - local.first, part.row0 : part.row1] if part.expert in held else empty,
                first=0,
                shape=(part.row1 - part.row0, local.shape[2]),
                sends=local.sends and part.expert in held,
            ),
        )
        for part in parts
    ]


def _held(share: Share, source: Source) -> Share:
    """What a source fills, under its own name: of a single value always the whole."""
    if all(math.prod(spec.shape) == 1 for spec in source.specs):
        return Share(name=source.name)
    return share if share.name == source.name else replace(share, name=source.name)


def _in_part(found: Iterable[Share]) -> list[str]:
    """Parameters of which the trainer's tensors hold some rows twice, or not at all."""
    shares: dict[str, list[Share]] = {}
    for share in found:
        shares.setdefault(share.name, []).append(share)
    problems = [(name, uncovered(each)) for name, each in shares.items()]
    return [f"{name}: {problem}; push tensors that make up the whole of it" for name, problem in problems if problem]


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
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    hint = f"nearest: {', '.join(near)}" if near else "nothing like it"
    return f"{name}: unknown to the service ({hint}); leave it out with scope patterns"


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
    if spec is not None and quantized and (dtype, local.shape) == (spec.dtype, spec.shape):
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
    start, step = local.first, fmt.row_step
    stop = start + local.rows.shape[0]
    if start < stop and (start % step or (stop % step and stop != row.shape[0])):
        return (
            f"{row.name}: rows {start}:{stop} cut a block of {step} rows that share a scale in {row.format}; shard "
            f"the trainer at multiples of {step} rows, or push from one rank"
        )
    return None


def _made(
    name: str, kind: Literal["encode", "checkpoint"], row: ParameterRow, specs: tuple[TensorSpec, ...], local: LocalRows
) -> Source:
    return Source(
        name=name, kind=kind, parameter=row, specs=specs, rows=local.rows, first=local.first, sends=local.sends
    )


def _same(a: Source, b: Source) -> bool:
    if a.kind != b.kind or a.first != b.first or a.rows.shape != b.rows.shape or a.rows.dtype != b.rows.dtype:
        return False
    same_memory = a.rows.data_ptr() == b.rows.data_ptr() and a.rows.stride() == b.rows.stride()
    return same_memory or torch.equal(a.rows, b.rows)


def _select(
    manifest: Manifest, found: Mapping[Share, Source], chosen: Mapping[str, bool], scope: Scope
) -> tuple[PushPlan, list[str]]:
    """Sources in manifest order, the scope widened to whole fused groups; names what is missing."""
    given = {source.parameter.name for source in found.values() if chosen[source.name]}
    groups = {row.group for row in manifest.parameters if row.group and row.name in given}
    everything = scope == "all"
    wanted = [row for row in manifest.parameters if everything or row.name in given or row.group in groups]
    brought = {source.parameter.name for source in found.values()}
    why = "the scope is 'all'" if everything else "its fused group is pushed as a whole"
    missing = [f"{row.name}: missing, and {why}; add it" for row in wanted if row.name not in brought]
    names = {row.name for row in wanted}
    missing += _in_part(share for share, source in found.items() if source.parameter.name in names)
    sources = sorted(
        (source for source in found.values() if source.parameter.name in names),
        key=lambda source: manifest.index[source.specs[0].name],
    )
    plan = PushPlan(
        sources=tuple(sources),
        specs=tuple(dict.fromkeys(spec for source in sources for spec in source.specs)),
        logical_bytes=sum(2 * math.prod(row.shape) for row in wanted),
        carried_over=len(manifest.parameters) - len(wanted),
        widened=tuple(row.name for row in wanted if row.name not in given),
    )
    return plan, missing


def check_finite(plan: PushPlan, amax_bits: np.ndarray, first_nonfinite: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse NaN and Inf; names each tensor and, where this rank holds it, the index.

    amax_bits: per source, the BF16 bits of its largest magnitude over all trainer ranks; 0x7F80 and above are not
    finite.
    """
    problems = []
    for source, bits in zip(plan.sources, amax_bits, strict=True):
        if bits >= NON_FINITE:
            where = first_nonfinite.get(source.name)
            at = f"index {list(where)}" if where is not None else "in rows of another trainer rank"
            problems.append(f"{source.name}: NaN or Inf at {at}; the weights are not finite, nothing was sent")
    raise_all(ManifestError, "push refused", problems)
