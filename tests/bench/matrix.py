"""Full and delta pushes from M trainer ranks to replicas of N ranks: plain processes of one machine, gRPC and shared
memory as in production.

    python -m tests.bench.matrix [--json | --markdown] [--ranks 1,2,4] [--replicas 1,2,3] [--seconds 900]

Prints a table, the page docs/ranks.md with --markdown: bytes sent over bytes needed, streams opened over pairs of
ranks, seconds against the push of one rank to one rank in the same run, the coordinator's CPU seconds, and peak memory
of a process. The ranks share the machine's cores, so more of them take turns: what this shows is that the bytes stay
the same and that nobody does more than a part. All cells take 10 to 15 minutes on two idle cores, most of it for
starting processes: smaller services come first, what is done is told meanwhile, and no other is begun after so many
seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from launch.tables import decimal_bytes, markdown
from tests.processes import Fleet, fleet, trainer
from weight_update.links import AUTO
from weight_update.transport import ControlClient
from weight_update.values import from_manifest_proto

PUSHES = 3  # of each mode; the first one touches fresh pages and compiles, and is left out
CHANGED = 0.002  # share of the elements that a delta changes


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One cell. needed: of a full push, what the ranks of all replicas own. Medians over the pushes."""

    trainer_ranks: int
    actor_ranks: int
    replicas: int
    sent_bytes: int
    needed_bytes: int
    delta_bytes: int
    streams: int
    full_s: float
    delta_s: float
    coordinator_cpu_s: float
    trainer_peak_bytes: int
    actor_peak_bytes: int


def save_model(directory: Path) -> Path:
    """A Llama of 40 million weights."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def needed_bytes(address: str) -> int:
    """What one replica owns of a full push."""
    control = ControlClient(address)
    try:
        manifest = from_manifest_proto(control.describe().manifest)
    finally:
        control.close()
    names = {name for row in manifest.parameters for name in manifest.required_of(row)}
    return sum(spec.num_bytes for spec in manifest.tensors if spec.name in names)


def measure(service: Fleet, model_dir: Path, trainer_ranks: int, actor_ranks: int, replicas: int) -> Row:
    """Push in full, then what changed."""
    with trainer(service.address, model_dir, ranks=trainer_ranks, transport=AUTO) as push:
        push(1.0, True)
        before_s = service.coordinator("cpu_s")
        full = [push(CHANGED, True)[0] for _ in range(PUSHES)]
        push(CHANGED, False)  # the first one after full pushes is full again: they keep nothing
        delta = [push(CHANGED, False) for _ in range(PUSHES)]
        cpu_s = (service.coordinator("cpu_s") - before_s) / (2 * PUSHES + 1)
    assert all(each["mode"] == "full" for each in full) and all(each[0]["mode"] == "delta" for each in delta)
    assert all(each["digest_verified"] for each in full)
    return Row(
        trainer_ranks=trainer_ranks,
        actor_ranks=actor_ranks,
        replicas=replicas,
        sent_bytes=full[-1]["wire_bytes"],
        needed_bytes=replicas * needed_bytes(service.address),
        delta_bytes=delta[-1][0]["wire_bytes"],
        streams=len(full[-1]["transports"]),
        full_s=statistics.median(each["seconds"] for each in full),
        delta_s=statistics.median(each[0]["seconds"] for each in delta),
        coordinator_cpu_s=cpu_s,
        trainer_peak_bytes=max(each["peak_bytes"] for each in delta[-1]),
        actor_peak_bytes=max(_peak(rank.process.pid) for rank in service.ranks),
    )


def _peak(pid: int | None) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


def shown(row: Row, first: Row) -> dict[str, Any]:
    """A row for people; seconds are ratios to the first cell of the run."""
    return {
        "M": row.trainer_ranks,
        "N": row.actor_ranks,
        "replicas": row.replicas,
        "sent over needed": f"{row.sent_bytes / row.needed_bytes:.3f}",
        "streams": f"{row.streams} of {row.trainer_ranks * row.actor_ranks * row.replicas}",
        "full, of one to one": f"{row.full_s / first.full_s:.2f}",
        "delta, of one to one": f"{row.delta_s / first.delta_s:.2f}",
        "delta bytes": decimal_bytes(row.delta_bytes),
        "coordinator CPU": f"{1e3 * row.coordinator_cpu_s:.0f} ms",
        "trainer peak": decimal_bytes(row.trainer_peak_bytes),
        "actor peak": decimal_bytes(row.actor_peak_bytes),
    }


def page(rows: list[Row]) -> str:
    """docs/ranks.md."""
    first = rows[0]
    return "\n".join(
        [
            "# M trainer ranks, replicas of N ranks",
            "",
            "Written by `python -m tests.bench.matrix --markdown`: a Llama of 40 million weights in NVFP4,",
            "laid out for TRT-LLM; plain processes on one machine, control over gRPC, bytes in shared memory. Full",
            f"pushes, and deltas that change {100 * CHANGED:g} % of all elements; medians of {PUSHES}. The ranks take",
            f"turns on {len(os.sched_getaffinity(0))} cores: what more ranks cost here they would not cost on machines",
            "of their own. Peak memory is a process's, with about 0.5 GB of Python and torch in it.",
            "",
            f"One to one: full {first.full_s:.2f} s, delta {first.delta_s:.2f} s, {first.needed_bytes / 1e6:.1f} MB.",
            "",
            markdown([shown(row, first) for row in rows]),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--markdown", action="store_true", help="print docs/ranks.md")
    parser.add_argument("--ranks", default="1,2,4", help="of either side")
    parser.add_argument("--replicas", default="1,2,3")
    parser.add_argument("--seconds", type=float, default=900.0)
    options = parser.parse_args()
    ranks, replicas = ([int(each) for each in given.split(",")] for given in (options.ranks, options.replicas))
    services = sorted(((count, n) for count in replicas for n in ranks), key=lambda each: each[0] * each[1])
    rows: list[Row] = []
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        model_dir = save_model(Path(scratch))
        for count, n in services:
            if time.monotonic() - start_s > options.seconds:
                print(f"no time for {count} x {n}", file=sys.stderr)
                continue
            with fleet(model_dir, replicas=count, ranks=n) as service:
                for m in ranks:
                    rows.append(measure(service, model_dir, m, n, count))
                    told = f"{m} to {count} x {n}: full {rows[-1].full_s:.2f} s, delta {rows[-1].delta_s:.2f} s"
                    print(f"{len(rows)} cells, {time.monotonic() - start_s:.0f} s: {told}", file=sys.stderr)
    if options.json:
        print(json.dumps({"cores": len(os.sched_getaffinity(0)), "rows": [asdict(row) for row in rows]}))
    else:
        print(page(rows) if options.markdown else markdown([shown(row, rows[0]) for row in rows]))


if __name__ == "__main__":
    main()
