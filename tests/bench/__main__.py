"""Everything that README.md says about speed and memory, measured here, as a Markdown table of ratios.

python -m tests.bench [--json]
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def results(module: str) -> Any:
    """What one benchmark prints with --json, run in a process of its own."""
    done = subprocess.run([sys.executable, "-m", module, "--json"], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    print("measuring, a few minutes ...", file=sys.stderr)
    encode, layouts, push, tiny = (results(f"tests.bench.{name}") for name in ("encode", "layouts", "push", "tiny"))
    if "--json" in sys.argv:
        print(json.dumps({"encode": encode, "layouts": layouts, "push": push, "tiny": tiny}))
        return
    print("| what | bytes | measured | over |")
    print("| --- | --- | --- | --- |")
    for row in encode["rows"]:
        print(f"| {row['case']} | {row['mb']:.0f} MB | **{row['over_copy']:.2f}** | torch.copy_, one thread |")
    for row in layouts["rows"]:
        for what in ("apply", "invert"):
            ratio = row[f"{what}_over_copy"]
            print(f"| {row['case']} {what} | {row['mb']:.0f} MB | **{ratio:.2f}** | a copy of the same bytes |")
    for row in push["rows"]:
        size, pause = f"{row['wire_mb']:.0f} MB", f"{row['pause_ms']:.0f} ms"
        what = f"push of {row['case']} over {row['transport']}: transfer rate"
        lines = (
            (what, f"{row['transfer_over_memcpy']:.3f}", "memcpy, one thread"),
            ("- the same", f"{row['transfer_over_raw_grpc']:.2f}", "a raw gRPC stream that drops its messages"),
            (f"- its pause, {pause}", f"{row['pause_over_copy']:.1f}", "a copy of the same bytes"),
            ("- actor memory above idle", f"{row['memory_over_planned']:.2f}", "what was planned"),
            (f"- the whole push of {row['tensors']} tensors", f"{row['us_per_tensor']:.0f} us", "a tensor"),
        )
        for what, measured, over in lines:
            print(f"| {what} | {size} | **{measured}** | {over} |")
    for row in tiny["rows"]:
        what, measured = f"each of {row['tensors']} tiny tensors in a push", f"{row['us']:.0f} us"
        over = f"the same bytes in few tensors (control {row['control_us']:.1f})"
        print(f"| {what} | {row['mb']:.0f} MB | **{measured}** | {over} |")


if __name__ == "__main__":
    main()
