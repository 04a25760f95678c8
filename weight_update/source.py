"""What a trainer brings, matched with what the service holds: the plan of one push on one trainer rank.

Everything that can be refused is refused here, before a byte is sent, all of it in one message. Nothing here talks to
anyone.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from quant.formats import FORMATS, NON_FINITE, TensorSpec, dtype_name
from quant.names import canonical_name, expert_parts
from quant.parameters import ParameterRow
from sharding.routes import LocalRows, local_rows

from .errors import ManifestError, raise_all
from .manifest import Manifest

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})

Scope = str | Sequence[str]
Items = nn.Module | Iterable[tuple[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Rows of one parameter to encode, or of one tensor that already is in checkpoint form.

    specs: the tensors that these rows become, in the format's component order; one for checkpoint form.
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
    """The (name, tensor) pairs of a trainer's model, tied names included, and the names that are trainable."""
    if not isinstance(model, nn.Module):
        items = list(model)
        return items, frozenset(name for name, _ in items)
    parameters = list(model.named_parameters(remove_duplicate=False))
    return [*parameters], frozenset(name for name, parameter in parameters if parameter.requires_grad)


def plan_push(
    manifest: Manifest, model: Items, scope: Scope, *, is_first_rank: bool
) -> tuple[PushPlan | None, list[str]]:
    """Match a model with the manifest: the plan, or every problem found (the caller raises, so that all ranks do)."""
    items, trainable = named_items(model)
    if not items:
        return None, ["the model or iterable holds no tensor; pass the model whose weights are to be pushed"]
    problems: list[str] = []
    found: dict[str, Source] = {}
    chosen: dict[str, bool] = {}
    seen: set[str] = set()
    in_scope = _selector(scope)
    aliases = {alias: row for row in manifest.parameters for alias in row.aliases}
    rows = {row.name: row for row in manifest.parameters}
    owners = {spec.name: row for row in manifest.parameters for spec in manifest.tensors_of(row)}
    for trainer_name, tensor in items:
        wanted = in_scope(trainer_name, trainer_name in trainable)
        try:
            local = local_rows(tensor, is_first_rank=is_first_rank)
        except ValueError as error:
            problems.append(f"{trainer_name}: {error}; reshard it, or push full tensors")
            continue
        for name, part in _parts(canonical_name(trainer_name), local):
            if name in seen:
                problems.append(f"{name}: given twice; give every name once")
                continue
            seen.add(name)
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
            known = found.get(source.name)
            if known is None:
                found[source.name] = source
            elif not _same(known, source):
                problems.append(f"{name}: tied to {row.name} and its bytes differ; give one of them")
            chosen[source.name] = chosen.get(source.name, False) or wanted_part
    if not any(chosen.values()) and not problems:
        problems.append(f"scope {scope!r} selects none of {len(items)} tensors; use 'all', 'trainable' or patterns")
    plan, missing = _select(manifest, found, chosen, scope)
    problems += missing
    return (None if problems else plan), problems


def _parts(name: str, local: LocalRows) -> list[tuple[str, LocalRows]]:
    """One item as checkpoint parameters: itself, or the experts of a stacked one (those held elsewhere with no
    rows)."""
    parts = expert_parts(name, local.shape)
    if not parts:
        return [(name, local)]
    held = range(local.first, local.first + local.rows.shape[0])
    empty = local.rows.new_empty((0, local.shape[2]))
    return [
        (
            part.name,
            LocalRows(
                rows=local.rows[part.expert - local.first, part.row0 : part.row1] if part.expert in held else empty,
                first=0,
                shape=(part.row1 - part.row0, local.shape[2]),
                sends=local.sends and part.expert in held,
            ),
        )
        for part in parts
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
    manifest: Manifest, found: Mapping[str, Source], chosen: Mapping[str, bool], scope: Scope
) -> tuple[PushPlan, list[str]]:
    """Sources in manifest order, the scope widened to whole fused groups; names what is missing."""
    given = {source.parameter.name for name, source in found.items() if chosen[name]}
    groups = {row.group for row in manifest.parameters if row.group and row.name in given}
    everything = scope == "all"
    wanted = [row for row in manifest.parameters if everything or row.name in given or row.group in groups]
    brought = {source.parameter.name for source in found.values()}
    why = "the scope is 'all'" if everything else "its fused group is pushed as a whole"
    missing = [f"{row.name}: missing, and {why}; add it" for row in wanted if row.name not in brought]
    names = {row.name for row in wanted}
    sources = sorted(
        (source for source in found.values() if source.parameter.name in names),
        key=lambda source: manifest.index[source.specs[0].name],
    )
    plan = PushPlan(
        sources=tuple(sources),
        specs=tuple(spec for source in sources for spec in source.specs),
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
