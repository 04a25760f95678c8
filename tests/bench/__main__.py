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
    print("measuring, about a minute ...", file=sys.stderr)
    encode, push = results("tests.bench.encode"), results("tests.bench.push")
    if "--json" in sys.argv:
        print(json.dumps({"encode": encode, "push": push}))
        return
    print("| what | bytes | measured | over |")
    print("| --- | --- | --- | --- |")
    for row in encode["rows"]:
        print(f"| {row['case']} | {row['mb']:.0f} MB | **{row['over_copy']:.2f}** | torch.copy_, one thread |")
    for row in push["rows"]:
        size, case = f"{row['wire_mb']:.0f} MB", row["case"]
        print(
            f"| push of {case}: transfer rate | {size} | **{row['transfer_over_memcpy']:.3f}** | memcpy, one thread |"
        )
        print(
            f"| - its pause, {row['pause_ms']:.0f} ms | {size} | {row['pause_over_copy']:.1f} | plain copy of the bytes |"
        )
        print(f"| - actor memory above idle | {size} | {row['memory_over_planned']:.2f} | planned |")
        print(f"| - the whole push, a tensor | {row['tensors']} tensors | {row['us_per_tensor']:.0f} us | |")


if __name__ == "__main__":
    main()
