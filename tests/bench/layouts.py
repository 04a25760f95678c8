"""What applying and inverting costs for every row of the layout table, over `torch.Tensor.copy_` of the same bytes.

    python -m tests.bench.layouts [--json] [--runs N] [--case PART_OF_A_NAME]

One thread; a whole module at a time, weights and scales together, every expert in one call. Medians over the runs, each
next to a copy of its own. scratch: what the operations allocate at a time; index: row offsets of the stacked tensors,
planned once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from quant.formats import FORMATS
from quant.layouts import LAYOUTS, LayoutPlan, apply_rows, invert_rows, plan_experts, plan_linear
from quant.whole import stacked
from tests.bench.encode import measure
from tests.plans import Allocated, experts_shape, linear_shape, pairs

LINEAR = (4096, 4096)
EXPERTS = (16, 2048, 768)  # an eighth of a layer of Qwen3-30B-A3B
WHOLE_LAYER = (128, 2048, 768)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    case: str
    mb: float
    apply_over_copy: float
    invert_over_copy: float
    scratch_bytes: int
    index_bytes: int


def cases() -> Iterator[tuple[str, Callable[[], LayoutPlan]]]:
    """Every row in every format that it holds, plain linears only where no other row holds them."""
    for name, layout, fmt in pairs():
        if layout.kind != "experts":
            shape = linear_shape(layout, fmt, *LINEAR)
            yield name, lambda a=layout, f=fmt, s=shape: plan_linear(a, f, "a", *s)  # type: ignore[misc]
        if layout.kind == "experts" or (fmt.name == "nvfp4" and layout.kind == "any"):
            sizes = experts_shape(layout, fmt, *EXPERTS)
            yield f"{name} experts", lambda a=layout, f=fmt, s=sizes: plan_experts(a, f, "a", *s)  # type: ignore[misc]
    for layout_name in ("trtllm_moe", "cutlass_moe"):
        row = LAYOUTS[layout_name]
        yield (
            f"{layout_name}-nvfp4 layer of {WHOLE_LAYER[0]} experts",
            lambda a=row: plan_experts(a, FORMATS["nvfp4"], "a", *WHOLE_LAYER),  # type: ignore[misc]
        )


def layout_row(case: str, plan: LayoutPlan, runs: int) -> Row:
    storages = {spec.name: torch.zeros(spec.num_bytes, dtype=torch.uint8) for spec in plan.storages}
    at = stacked(plan)
    rows = [torch.randint(0, 256, (p.tensor.num_rows, p.tensor.row_bytes), dtype=torch.uint8) for p in at]
    copies = [torch.zeros_like(tensor) for tensor in rows]

    def copy() -> None:
        for target, source in zip(copies, rows, strict=True):
            target.copy_(source)

    def apply() -> None:
        for placement, source in zip(at, rows, strict=True):
            apply_rows(placement, source, 0, storages[placement.storage], 0)

    def invert() -> None:
        for placement, target in zip(at, copies, strict=True):
            invert_rows(placement, 0, len(target), storages[placement.storage], 0, out=target)

    num_bytes = sum(tensor.nbytes for tensor in rows)
    return Row(
        case=case,
        mb=num_bytes / 1e6,
        apply_over_copy=measure(case, num_bytes, copy, apply, runs).over_copy,
        invert_over_copy=measure(case, num_bytes, copy, invert, runs).over_copy,
        scratch_bytes=scratch_of(apply, invert) * (2 if LAYOUTS[plan.layout].swap_nibbles else 1),
        index_bytes=sum(placement.located.rows.nbytes for placement in at),
    )


def scratch_of(*works: Callable[[], object]) -> int:
    with Allocated() as allocated:
        for work in works:
            work()
    return max(allocated.sizes, default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--case", default="", help="only cases whose name has this in it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [layout_row(case, plan(), options.runs) for case, plan in cases() if options.case in case]
    if options.json:
        print(json.dumps({"threads": 1, "rows": [asdict(row) for row in rows]}))
        return
    for row in rows:
        print(
            f"{row.case:44} {row.mb:6.1f} MB  apply {row.apply_over_copy:.2f}  invert {row.invert_over_copy:.2f}"
            f" of a copy  scratch {row.scratch_bytes:7}  index {row.index_bytes:8}"
        )


if __name__ == "__main__":
    main()
