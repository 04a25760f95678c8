"""One service, replicas of several formats: the names of what only some of them hold.

    fp8:model.layers.0.mlp.up_proj.weight       a variant: what the replicas in fp8 hold of this parameter
    model.norm.weight                           alike in all formats: one tensor, encoded and compared once

A trainer and a checkpoint know bare names. A tensor's digest is that of its bare name, so that the digest of a version
in one format is the same whether other replicas are in that format or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from .parameters import ParameterRow
from .specs import TensorSpec

MARK = ":"

Held = Mapping[ParameterRow, tuple[TensorSpec, ...]]  # of one format, in the order of its model


def bare(name: str) -> str:
    """The name as a trainer knows it."""
    return name.rpartition(MARK)[2]


def format_of(name: str) -> str:
    """The format of the replicas that hold it; "" where all do."""
    return name.rpartition(MARK)[0]


def variant(format: str, name: str) -> str:
    """The name of what replicas of one format hold."""
    return f"{format}{MARK}{name}"


def by_bare_name(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Bare name -> the names that it has in the service."""
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        found[bare(name)] = (*found.get(bare(name), ()), name)
    return found


def together(formats: Mapping[str, Held]) -> tuple[tuple[ParameterRow, ...], tuple[TensorSpec, ...]]:
    """The parameters and tensors of a service of these formats, in the same order on every rank."""
    rows: dict[ParameterRow, None] = {}
    tensors: dict[TensorSpec, None] = {}
    for format, held in sorted(formats.items()):
        for row, specs in held.items():
            is_shared = all(other.get(row) == specs for other in formats.values())
            own_row, own_specs = (row, specs) if is_shared else _varied(format, row, specs)
            rows[own_row] = None
            tensors |= dict.fromkeys(own_specs)
    return tuple(rows), tuple(tensors)


def _varied(
    format: str, row: ParameterRow, specs: tuple[TensorSpec, ...]
) -> tuple[ParameterRow, tuple[TensorSpec, ...]]:
    group = variant(format, row.group) if row.group else ""
    own = replace(row, name=variant(format, row.name), group=group)
    return own, tuple(replace(spec, name=variant(format, spec.name)) for spec in specs)
