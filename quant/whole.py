"""Whole modules: all tensors of a plan into its storages and back, with a tag that says in which order bytes are.

    kernel = apply_plan(plan, Tagged(tag=CHECKPOINT, tensors=tensors))
    apply_plan(plan, kernel)       # LayoutTagError: applied already
    invert_plan(plan, kernel)      # the tensors again

Experts come stacked, [experts, rows, ...] under the name without the number, and go in one call for all of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .layouts import LayoutPlan, LayoutTagError, Placement, apply_rows, invert_rows, stack

CHECKPOINT = "checkpoint"
_EXPERT = re.compile(r"\.\d+(?=\.[a-z]+_proj\.[a-z0-9_]+$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tagged:
    """Tensors by name, and the order of their bytes: CHECKPOINT, or the name of the layout that they lie in."""

    tag: str
    tensors: Mapping[str, Tensor]


def stacked(plan: LayoutPlan) -> tuple[Placement, ...]:
    """The placements of a plan with every expert's tensors as one."""
    groups: dict[str, list[Placement]] = {}
    for placement in plan.placements:
        groups.setdefault(_EXPERT.sub("", placement.tensor.name), []).append(placement)
    return tuple(stack(name, group) if len(group) > 1 else group[0] for name, group in groups.items())


def apply_plan(
    plan: LayoutPlan, source: Tagged, storages: Mapping[str, Tensor] | None = None, at: tuple[Placement, ...] = ()
) -> Tagged:
    """Write every tensor into its storage, given as 1-D uint8 by name or made here; at: stacked(plan), if at hand."""
    _require(plan, source, CHECKPOINT, "apply")
    made = {spec.name: torch.zeros(spec.num_bytes, dtype=torch.uint8) for spec in plan.storages}
    storages = made if storages is None else storages
    for placement in at or stacked(plan):
        rows = _rows(placement, source.tensors[placement.tensor.name])
        apply_rows(placement, rows, 0, storages[placement.storage], 0)
    return Tagged(tag=plan.layout, tensors=storages)


def invert_plan(plan: LayoutPlan, source: Tagged, at: tuple[Placement, ...] = ()) -> Tagged:
    """Every tensor again, as uint8 [rows, row_bytes]."""
    _require(plan, source, plan.layout, "invert")
    tensors = {
        placement.tensor.name: invert_rows(
            placement, 0, placement.tensor.num_rows, source.tensors[placement.storage], 0
        )
        for placement in at or stacked(plan)
    }
    return Tagged(tag=CHECKPOINT, tensors=tensors)


def _rows(placement: Placement, tensor: Tensor) -> Tensor:
    spec = placement.tensor
    return tensor.contiguous().view(-1).view(torch.uint8).view(spec.num_rows, spec.row_bytes)


def _require(plan: LayoutPlan, source: Tagged, tag: str, what: str) -> None:
    if source.tag != tag:
        raise LayoutTagError(
            f"{plan.storages[0].name}: cannot {what} layout {plan.layout}: the bytes are in order {source.tag!r}, "
            f"expected {tag!r}; {'invert it first' if what == 'apply' else 'apply it first'}"
        )
