"""What a tensor costs: full pushes of 50,000 tiny tensors beside the same bytes in a few large ones.

    python -m tests.bench.tiny [--json] [--tensors 50000] [--pushes 5]

One process holds two services that are alike but for their tensors, each a rank and a coordinator; a trainer in another
process pushes to them in turn, over gRPC control and shared memory. Prints the seconds that a tensor adds to a push,
both ends together, and the CPU seconds of either end; each again of the few tensors alone, pushed twice in turn: that
is what the machine's other work makes of it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.formats import TensorSpec
from quant.parameters import ParameterRow
from quant.placements import place_row_major
from service.control_server import ControlServer
from service.coordinator import CoordinatorShell
from service.hosts.member import Membership, serve
from weight_update.client import Pusher
from weight_update.holdings import Holdings

SHAPE = (16, 16)  # 512 bytes of BF16
FEW = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """us: microseconds a tensor, above the push of the same bytes in few tensors; medians. control_us: between two
    pushes of those."""

    tensors: int
    mb: float
    push_s: float
    few_s: float
    us: float
    trainer_cpu_us: float
    service_cpu_us: float
    control_us: float
    phases_us: dict[str, float]


class Engine:
    """An engine that holds weights and computes nothing."""

    name = "holder"

    def pause(self) -> None: ...

    def renew(self, version: int) -> None: ...

    def resume(self) -> None: ...


def weights(tensors: int, num_bytes: int) -> list[tuple[str, Tensor]]:
    """So many BF16 tensors of so many bytes in all, ten to a layer, each of memory of its own."""
    rows = num_bytes // tensors // (2 * SHAPE[1])
    return [
        (f"model.layers.{i // 10}.part{i % 10}.weight", torch.full((rows, SHAPE[1]), i % 7, dtype=torch.bfloat16))
        for i in range(tensors)
    ]


@contextmanager
def service(held: Sequence[tuple[str, Tensor]], scratch: Path) -> Iterator[str]:
    """A coordinator and a rank that holds these tensors; its address."""
    storages = dict(held)
    specs = [TensorSpec(name=name, dtype="BF16", shape=tuple(tensor.shape)) for name, tensor in held]
    holdings = Holdings(
        storages=lambda: storages,
        placements=[place_row_major(spec, spec.name) for spec in specs],
        parameters=[ParameterRow(name=spec.name, shape=spec.shape, format="bf16") for spec in specs],
    )
    rank = serve(holdings, Engine(), Membership(control_url=""), format="bf16", layout="plain")
    shell = CoordinatorShell(addresses=[rank.address], state_file=scratch / f"{len(held)}.sqlite", source="weights")
    server = ControlServer(shell, listen="127.0.0.1:0", tokenizer_dir=scratch)
    try:
        yield server.address
    finally:
        server.stop()
        shell.stop()
        rank.stop()


def serve_both(tensors: int) -> None:
    """Print both addresses, then this process's CPU seconds for every line of standard input, until it ends."""
    torch.set_num_threads(1)
    num_bytes = 2 * tensors * math.prod(SHAPE)
    with (
        tempfile.TemporaryDirectory() as scratch,
        service(weights(tensors, num_bytes), Path(scratch)) as many,
        service(weights(FEW, num_bytes), Path(scratch)) as few,
    ):
        print(many, few, flush=True)
        for _ in sys.stdin:
            print(_cpu_s(), flush=True)


def _cpu_s() -> float:
    used = os.times()
    return used.user + used.system


def measure(tensors: int, pushes: int) -> Row:
    """Push in turn; the first pushes, which plan and compile, are left out."""
    num_bytes = 2 * tensors * math.prod(SHAPE)
    held = {"many": weights(tensors, num_bytes), "few": weights(FEW, num_bytes), "again": weights(FEW, num_bytes)}
    command = [sys.executable, "-m", "tests.bench.tiny", "--serve", str(tensors)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    many, few = process.stdout.readline().split()
    pushers = {"many": Pusher(many, mode="full"), "few": Pusher(few, mode="full")}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in held}

    def service_cpu_s() -> float:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    for _ in range(pushes + 1):
        for name, items in held.items():
            items[0][1].add_(1)
            cpu_s, service_s = time.process_time(), service_cpu_s()
            report = pushers["many" if name == "many" else "few"].push(items)
            used = {"trainer": time.process_time() - cpu_s, "service": service_cpu_s() - service_s}
            found[name].append({**report.phases, **used, "s": report.seconds})
    for pusher in pushers.values():
        pusher.close()
    process.communicate(timeout=60)

    def us(key: str, of: str = "many", over: str = "few") -> float:
        of_s, over_s = (statistics.median(each[key] for each in found[name][1:]) for name in (of, over))
        return 1e6 * (of_s - over_s) / (tensors - FEW)

    return Row(
        tensors=tensors,
        mb=num_bytes / 1e6,
        push_s=statistics.median(each["s"] for each in found["many"][1:]),
        few_s=statistics.median(each["s"] for each in found["few"][1:]),
        us=us("s"),
        trainer_cpu_us=us("trainer"),
        service_cpu_us=us("service"),
        control_us=us("s", "again"),
        phases_us={key: us(key) for key in found["few"][0] if key not in ("s", "trainer", "service")},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--tensors", type=int, default=50_000)
    parser.add_argument("--pushes", type=int, default=5)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve_both(options.serve)
        return
    torch.set_num_threads(1)
    row = measure(options.tensors, options.pushes)
    if options.json:
        print(json.dumps({"cores": os.cpu_count(), "rows": [asdict(row)]}))
        return
    print(f"{row.tensors} tensors, {row.mb:.1f} MB: a push in {row.push_s:.2f} s; in {FEW} tensors {row.few_s:.2f} s")
    print(f"  {row.us:.1f} us a tensor, both ends together; control {row.control_us:.1f}")
    print(f"  CPU: trainer {row.trainer_cpu_us:.1f}, service {row.service_cpu_us:.1f} us a tensor")
    print("  " + ", ".join(f"{name} {us:.1f}" for name, us in row.phases_us.items()))


if __name__ == "__main__":
    main()
