"""The plan of the last push, for the next one: a trainer's tensors seldom change their names, shapes and placement.

    last = LastPlan.of(key, given, plan)     # None where a source is more than one tensor as it is
    plan = last.again(key, given)            # the same with today's rows; None where anything is not as it was

No row is kept: a trainer may free or move its weights between two pushes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from quant.names import canonical_name

from .adapters import Adapted
from .inplace import local_of
from .source import PushPlan, Source

NOTHING = torch.empty(0)  # in place of rows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LastPlan:
    """key: of all else that the plan depends on. alike: what the items were like. plan: without rows. item: by source,
    the tensor whose local rows are its own."""

    key: Hashable
    alike: Sequence[object]
    plan: PushPlan
    item: Sequence[int]

    @classmethod
    def of(cls, key: Hashable, given: Adapted, plan: PushPlan) -> LastPlan | None:
        """The plan that these items led to, where every source is one of them as it is, and every one is a source or
        tied to one: nothing but their rows is read in the next push then."""
        locals_ = [local_of(tensor).detach() for _, tensor in given.items]
        numbers = {canonical_name(name): i for i, (name, _) in enumerate(given.items)}
        item = [numbers.get(source.name, -1) for source in plan.sources]
        alike = _alike(given, locals_)
        same = all(i >= 0 and _is(source.rows, locals_[i]) for source, i in zip(plan.sources, item, strict=True))
        held = {_memory(each, i) for i, each in enumerate(locals_)}
        if given.has_adapters or not same or len(held) != len(item) or len(set(item)) != len(item):
            return None
        bare = replace(plan, sources=tuple(replace(source, rows=NOTHING) for source in plan.sources))
        return cls(key=key, alike=alike, plan=bare, item=item)

    def again(self, key: Hashable, given: Adapted) -> PushPlan | None:
        """The plan for these items, None where they are not what they were."""
        if self.key != key or given.has_adapters or len(given.items) != len(self.alike):
            return None
        locals_ = [local_of(tensor).detach() for _, tensor in given.items]
        if _alike(given, locals_) != self.alike:
            return None
        sources = tuple(
            Source(
                name=source.name,
                kind=source.kind,
                parameter=source.parameter,
                specs=source.specs,
                rows=locals_[i],
                runs=source.runs,
                sent=source.sent,
            )
            for source, i in zip(self.plan.sources, self.item, strict=True)
        )
        return replace(self.plan, sources=sources)


def _alike(given: Adapted, locals_: Sequence[Tensor]) -> list[object]:
    """All that a plan reads of items: how each is named, shaped, placed and laid out, and which are tied."""
    first: dict[object, int] = {}
    return [
        (
            name,
            name in given.trainable,
            first.setdefault(_memory(local, i), i),
            local.shape,
            local.stride(),
            local.dtype,
            local.device,
            _placed(tensor) if isinstance(tensor, DTensor) else None,
        )
        for i, ((name, tensor), local) in enumerate(zip(given.items, locals_, strict=True))
    ]


def _placed(tensor: DTensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.placements, tensor.device_mesh


def _memory(local: Tensor, number: int) -> object:
    """What tied tensors have in common, and others have not."""
    return local.data_ptr() if local.numel() else (number,)


def _is(rows: Tensor, local: Tensor) -> bool:
    """Whether the rows of a source are this tensor as it is."""
    same = (rows.shape, rows.stride(), rows.dtype) == (local.shape, local.stride(), local.dtype)
    return same and rows.data_ptr() == local.data_ptr()
