"""What the CPU kernels cost on one thread, over `torch.Tensor.copy_` of the same bytes in the same run.

    python -m tests.bench.encode [--json] [--runs N] [--case PART_OF_A_NAME]

encode counts BF16 input bytes and includes amax, decode BF16 output bytes. Medians over the runs, each next to a copy
of its own. scratch: nvfp4's loops take 24 KiB, the rows in torch a few tensors of PIECE_ELEMENTS in FP32 or FP64.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from quant.formats import FORMATS, Format, Parts, amax, decode, encode, global_scale

SHAPE = (8192, 4096)  # 64 MiB of BF16: beyond the caches


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


def format_rows(runs: int, only: str) -> Iterator[Row]:
    """Encoding, amax included, and decoding, for every row of the table."""
    weight = torch.randn(SHAPE).bfloat16()
    target = torch.zeros_like(weight)

    def case(name: str, work: Callable[[], object]) -> Row:
        return measure(name, weight.nbytes, lambda: target.copy_(weight), work, runs)

    yield case("amax", lambda: amax(weight))
    for fmt in (row for row in FORMATS.values() if only in row.name and row.rows_dtype is weight.dtype):
        given = {name: torch.ones(1) for name in fmt.needs}
        scale = global_scale(fmt, amax(weight)) if fmt.has_global_scale else None
        parts = encode(fmt, weight, scale, given=given)
        part = fmt.component("global_scale")
        tensors = {**parts, **given} if part is None or scale is None else {**parts, part.suffix: scale}

        def encode_with_amax(fmt: Format = fmt, parts: Parts = parts, given: Parts = given) -> None:
            bits = amax(weight)
            encode(fmt, weight, global_scale(fmt, bits) if fmt.has_global_scale else None, parts, given)

        def decode_all(fmt: Format = fmt, tensors: Parts = tensors) -> None:
            decode(fmt, tensors, target)

        yield case(f"{fmt.name} encode with amax", encode_with_amax)
        yield case(f"{fmt.name} decode", decode_all)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--case", default="", help="rows whose name holds this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [*format_rows(options.runs, options.case)]
    if options.json:
        print(json.dumps({"threads": 1, "rows": [asdict(row) for row in rows]}))
        return
    for row in rows:
        print(f"{row.case:32} {row.mb:7.1f} MB  {row.gb_s:6.2f} GB/s = {row.over_copy:.3f} of a copy")


if __name__ == "__main__":
    main()
