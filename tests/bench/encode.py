"""What the CPU kernels cost on one thread, over `torch.Tensor.copy_` of the same bytes in the same run.

    python -m tests.bench.encode [--json] [--runs N]

encode counts BF16 input bytes and includes amax, decode BF16 output bytes, apply and invert checkpoint bytes:
weights and block scales together. Medians over the runs, each next to a copy of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from quant.formats import FORMATS, amax, decode, encode, global_scale
from quant.layouts import LAYOUTS, LayoutPlan, apply_rows, invert_rows, plan_experts, plan_linear

NVFP4 = FORMATS["nvfp4"]
SHAPE = (8192, 4096)  # 64 MiB of BF16: beyond the caches
EXPERTS, HIDDEN, INTER = 32, 2048, 768  # a quarter of a layer of Qwen3-30B-A3B

PLANS: dict[str, Callable[[], LayoutPlan]] = {
    "trtllm_linear": lambda: plan_linear(LAYOUTS["trtllm_linear"], NVFP4, "a", *SHAPE),
    "cutlass_linear": lambda: plan_linear(LAYOUTS["cutlass_linear"], NVFP4, "a", *SHAPE),
    "trtllm_moe": lambda: plan_experts(LAYOUTS["trtllm_moe"], NVFP4, "a", EXPERTS, HIDDEN, INTER),
    "cutlass_moe": lambda: plan_experts(LAYOUTS["cutlass_moe"], NVFP4, "a", EXPERTS, HIDDEN, INTER),
    "plain experts": lambda: plan_experts(LAYOUTS["plain"], NVFP4, "a", EXPERTS, HIDDEN, INTER),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    case: str
    mb: float
    gb_s: float
    over_copy: float


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(case: str, num_bytes: int, copy: Callable[[], object], work: Callable[[], object], runs: int) -> Row:
    """Work and copy in turn; the first of each touches pages and compiles."""
    pairs = [(_seconds(copy), _seconds(work)) for _ in range(runs + 1)][1:]
    seconds = statistics.median(worked for _, worked in pairs)
    ratio = statistics.median(copied / worked for copied, worked in pairs)
    return Row(case=case, mb=num_bytes / 1e6, gb_s=num_bytes / seconds / 1e9, over_copy=ratio)


def format_rows(runs: int) -> Iterator[Row]:
    """Encoding, amax included, and decoding."""
    weight = torch.randn(SHAPE).bfloat16()
    target = torch.zeros_like(weight)
    parts = encode(NVFP4, weight, global_scale(NVFP4, amax(weight)))
    tensors = {**parts, "weight_scale_2": global_scale(NVFP4, amax(weight))}

    def encode_with_amax() -> None:
        encode(NVFP4, weight, global_scale(NVFP4, amax(weight)), parts)

    for case, work in (
        ("nvfp4 amax", lambda: amax(weight)),
        ("nvfp4 encode with amax", encode_with_amax),
        ("nvfp4 decode", lambda: decode(NVFP4, tensors, target)),
    ):
        yield measure(case, weight.nbytes, lambda: target.copy_(weight), work, runs)


def layout_rows(case: str, plan: LayoutPlan, runs: int) -> Iterator[Row]:
    """Applying and inverting a whole module."""
    storages = {spec.name: torch.zeros(spec.num_bytes, dtype=torch.uint8) for spec in plan.storages}
    rows = [torch.randint(0, 256, (p.tensor.num_rows, p.tensor.row_bytes), dtype=torch.uint8) for p in plan.placements]
    copies = [torch.zeros_like(tensor) for tensor in rows]

    def copy() -> None:
        for target, source in zip(copies, rows, strict=True):
            target.copy_(source)

    def apply() -> None:
        for placement, source in zip(plan.placements, rows, strict=True):
            apply_rows(placement, source, 0, storages[placement.storage], 0)

    def invert() -> None:
        for placement, target in zip(plan.placements, copies, strict=True):
            invert_rows(placement, 0, len(target), storages[placement.storage], 0, out=target)

    num_bytes = sum(tensor.nbytes for tensor in rows)
    yield measure(f"{case} apply", num_bytes, copy, apply, runs)
    yield measure(f"{case} invert", num_bytes, copy, invert, runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--runs", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [*format_rows(options.runs)]
    for case, plan in PLANS.items():
        rows += layout_rows(case, plan(), options.runs)
    if options.json:
        print(json.dumps({"threads": 1, "rows": [asdict(row) for row in rows]}))
        return
    for row in rows:
        print(f"{row.case:24} {row.mb:7.1f} MB  {row.gb_s:6.2f} GB/s = {row.over_copy:.3f} of a copy")


if __name__ == "__main__":
    main()
