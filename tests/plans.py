"""Layout plans of many shapes, and random bytes to put through them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from quant.formats import FORMATS
from quant.layouts import LAYOUTS, LayoutPlan, apply_rows, plan_experts, plan_linear
from tests import goldens

BF16, NVFP4 = FORMATS["bf16"], FORMATS["nvfp4"]
LINEAR = [row.name for row in LAYOUTS.values() if row.kind in ("linear", "any")]
EXPERTS = [row.name for row in LAYOUTS.values() if row.kind in ("experts", "any")]

Storages = dict[str, Tensor]


def empty(plan: LayoutPlan) -> Storages:
    """Bytes of every storage of a plan."""
    return {spec.name: torch.zeros(spec.num_bytes, dtype=torch.uint8) for spec in plan.storages}


def rows_of(tensor: Tensor) -> Tensor:
    """uint8 [rows, row bytes]; a scalar is one row."""
    return goldens.bytes_of(tensor).view(len(tensor) if tensor.ndim else 1, -1)


def apply_all(plan: LayoutPlan, tensors: Mapping[str, Tensor]) -> Storages:
    storages = empty(plan)
    for placement in plan.placements:
        apply_rows(placement, tensors[placement.tensor.name], 0, storages[placement.storage], 0)
    return storages


def random_tensors(plan: LayoutPlan, seed: int) -> dict[str, Tensor]:
    """Bytes 1..255 for every tensor of a plan, so that padding shows."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {p.tensor.name: (p.tensor.num_rows, p.tensor.row_bytes) for p in plan.placements}
    return {
        name: torch.randint(1, 256, shape, dtype=torch.uint8, generator=generator) for name, shape in shapes.items()
    }


PLANS: dict[str, Callable[[], LayoutPlan]] = {
    **{f"{n}-{rows}": lambda n=n, rows=rows: plan_linear(LAYOUTS[n], NVFP4, "a", rows, 80)  # type: ignore[misc]
       for n in LINEAR for rows in (1, 128, 300, 515)},
    **{n: lambda n=n: plan_experts(LAYOUTS[n], NVFP4, "a", 5, 192, 64) for n in EXPERTS},  # type: ignore[misc]
    "bf16-linear": lambda: plan_linear(LAYOUTS["plain"], BF16, "a", 300, 24),
    "bf16-experts": lambda: plan_experts(LAYOUTS["plain"], BF16, "a", 3, 24, 40),
}  # fmt: skip
