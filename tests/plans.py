"""Layout plans of many shapes, and random bytes to put through them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quant.formats import FORMATS, Format
from quant.layouts import LAYOUTS, Layout, LayoutPlan, apply_rows, misfits, plan_experts, plan_linear
from tests import goldens

BF16, NVFP4 = FORMATS["bf16"], FORMATS["nvfp4"]
# Rows that hold NVFP4, which the fixtures and the slow reference are about; PLANS has every row in every format.
LINEAR = [row.name for row in LAYOUTS.values() if row.kind in ("linear", "any") and "nvfp4" in row.formats]
EXPERTS = [row.name for row in LAYOUTS.values() if row.kind in ("experts", "any") and "nvfp4" in row.formats]

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


class Allocated(TorchDispatchMode):
    """The sizes of the tensors that operations make; views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given:
            self.sizes.append(made.nbytes)
        return made


def up_to(size: int, *multiples: int) -> int:
    """The next size that is a multiple of all."""
    step = math.lcm(*multiples)
    return -(-size // step) * step


def linear_shape(layout: Layout, fmt: Format, num_rows: int, num_elements: int) -> tuple[int, int]:
    """The next shape that a row holds in a format."""
    return (
        up_to(num_rows, layout.multiples.get("rows", 1), fmt.multiples[0]),
        up_to(num_elements, layout.multiples.get("elements", 1), fmt.multiples[1]),
    )


def experts_shape(layout: Layout, fmt: Format, experts: int, hidden: int, inter: int) -> tuple[int, int, int]:
    """The same for experts; both sizes are rows of one matrix and elements of another."""
    return (
        experts,
        up_to(hidden, layout.multiples.get("hidden", 1), *fmt.multiples),
        up_to(inter, layout.multiples.get("inter", 1), *fmt.multiples),
    )


def pairs() -> Iterator[tuple[str, Layout, Format]]:
    """Every row of the table with every format it holds."""
    for layout in LAYOUTS.values():
        for fmt in FORMATS.values():
            if fmt.name in layout.formats:
                yield f"{layout.name}-{fmt.name}", layout, fmt


def _plans() -> Iterator[tuple[str, Callable[[], LayoutPlan]]]:
    for name, layout, fmt in pairs():
        if layout.kind != "experts":
            sizes = (1, 128, 300, 515) if fmt is NVFP4 else (1, 300)
            shapes = {linear_shape(layout, fmt, rows, 80) for rows in sizes}
            # without padding, so that nothing but the nibbles is left to do
            shapes |= {(384, 128)} if layout.swap_nibbles else set()
            for rows, elements in sorted(shapes):
                assert not misfits(layout, "linear", fmt, (rows, elements))
                yield (
                    f"{name}-{rows}x{elements}",
                    lambda a=layout, f=fmt, n=rows, k=elements: plan_linear(a, f, "a", n, k),  # type: ignore[misc]
                )
        if layout.kind != "linear":
            experts, hidden, inter = experts_shape(layout, fmt, 3, 160, 48)
            yield (
                f"{name}-{experts}x{hidden}x{inter}",
                lambda a=layout, f=fmt, e=experts, h=hidden, i=inter: plan_experts(a, f, "a", e, h, i),  # type: ignore[misc]
            )


PLANS: dict[str, Callable[[], LayoutPlan]] = dict(_plans())
