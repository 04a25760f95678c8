"""What the benchmarks of a GPU have in common: timing by events, and the table that docs/performance.md shows.

    python -m tests.bench.gpu_table        writes the tables of docs/performance.md from docs/performance_gpu.json

A section is a name, the device that measured it, and rows: what, milliseconds, ratio, over what. The page holds each
table between two comments that name its first words; what lies between them is rewritten.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

DOCS = Path(__file__).parents[2] / "docs"
PAGE, FIGURES = DOCS / "performance.md", DOCS / "performance_gpu.json"

# what, milliseconds (or the figure itself), over what ("" for nothing), milliseconds of that
Measured = tuple[str, float, str, float]
Row = dict[str, Any]
Section = dict[str, Any]

# The least ratio that was asked for.
TARGETS = {
    "encode and lay out": 0.90,
    "encode, amax not given": 0.60,
    "install, full": 0.85,
    "digest of what arrived": 0.75,
    "digest through the layout": 0.75,
    "diff, 0.1 % of the codes: compare and note": 0.85,
    "diff, sorted into positions and values": 0.85,
    "the sequence of calls, layout alone": 40,
    "the sequence of calls, quantizing first": 200,
}
MARK = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def milliseconds(work: Callable[[], object], runs: int = 15) -> float:
    """The median by events; caches are flushed before each run."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(runs + 3):
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return float(np.median(times[3:]))


def row_of(measured: Measured) -> Row:
    """How many times faster than the other; of what is over "our ..." how many times slower."""
    what, took, over, other = measured
    ratio = (took / other if over.startswith("our") else other / took) if over else took
    return {"what": what, "ms": round(took, 4) if over else None, "ratio": round(ratio, 4), "over": over}


def line(section: str, row: Row) -> str:
    """A row of the table."""
    ms = "" if row["ms"] is None else f"{row['ms']:.3f}"
    cells = section, row["what"], ms, f"**{row['ratio']:.2f}**", row["over"], TARGETS.get(row["what"], "")
    return f"| {' | '.join(map(str, cells))} |"


HEAD = "| case | what | ms | ratio | over | target |\n| --- | --- | --- | --- | --- | --- |"


def tables(sections: Mapping[str, Section], start: str) -> str:
    """The table of all sections whose names begin so, a device at a time."""
    chosen = {name: each for name, each in sections.items() if name.startswith(tuple(start.split(", ")))}
    devices = dict.fromkeys(each["device"] for each in chosen.values())
    return "\n".join(_table(device, chosen) for device in devices)


def _table(device: str, sections: Mapping[str, Section]) -> str:
    rows = [
        line(name, row) for name, each in sections.items() if each["device"] == device for row in each["rows"]
    ]
    return "\n".join([f"{device}:\n", HEAD, *rows, ""])


def page(text: str, sections: Mapping[str, Section]) -> str:
    """The page with its tables as the figures have them."""
    return MARK.sub(lambda match: f"{match[1]}{tables(sections, match[2])}{match[3]}", text)


def read() -> dict[str, Section]:
    found: dict[str, Section] = json.loads(FIGURES.read_text())
    return found


def write(sections: Mapping[str, Section]) -> None:
    """Put new sections into the figures, and all of them into the page."""
    merged = {**(read() if FIGURES.exists() else {}), **sections}
    FIGURES.write_text(json.dumps(merged, indent=1) + "\n")
    PAGE.write_text(page(PAGE.read_text(), merged))


if __name__ == "__main__":
    write({})
