"""Whole pushes of a Qwen3-30B-A3B-shaped model from one GPU into kernel layout on another, beside what others do.

    python -m tests.bench.gpu_push [--layers 48] [--from cuda:0 --to cuda:1] [--rounds 3] [--json FILE]

In the measured path: Pusher.push from its call to its return, over the coordinator, the rank's doors and the receiver
of production in a process of their own (tests.device_service), gRPC on loopback for everything but payloads. Not in it:
Ray, and an engine that runs a model. Weights are random BF16. Every push is verified by the service as always; that
the bytes are those of a push from the host is tests.test_gpu_push's.
Beside it, on the same two GPUs in the same run: NCCL broadcasts of the same BF16 bytes tensor by tensor and in buckets,
and today's calls an expert on the receiving side, of one layer, times the layers. Says so and exits with fewer GPUs.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from tests.bench.gpu import Layer, eager, milliseconds, source_rows
from tests.device_service import Shape, parameters_of, served, weights_of
from weight_update.client import Pusher, PushReport
from weight_update.device_base import FormWhole
from weight_update.gathering import Gathered

PHASES = ("describe", "plan", "begin", "transfer", "prepare", "commit")
CHANGED = 0.0005  # of the weights: each byte of codes holds two
BUCKET_BYTES = 512 << 20
GAP_S = 1.0  # between two pushes, as a trainer's steps make one: what a rank remembers of a commit, it packs meanwhile
Weights = list[tuple[str, Tensor]]


def row_of(what: str, report: PushReport, wall_s: float, service: Any) -> dict[str, Any]:
    """One push, in seconds; pause_device_ms: of the install on the device, by events."""
    memory = service.ask("memory")
    return {
        "what": what,
        "mode": report.mode,
        "seconds": wall_s,
        "phases": {name: round(each, 4) for name, each in report.phases.items()},
        "after_s": wall_s - report.seconds,
        "pause_s": report.pause_s,
        "install_s": report.timings[0]["install_stop_s"] - report.timings[0]["pause_start_s"],
        "pause_device_ms": memory["pause_ms"],
        "rank_peak_gb": memory["peak_bytes"] / 1e9,
        "trainer_peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "logical_gb": report.logical_bytes / 1e9,
        "wire_gb": report.wire_bytes / 1e9,
        "transport": report.transports[0],
        "verified": report.digest_verified,
    }


def pushes(
    what: str, pusher: Pusher, weights: Weights, service: Any, rounds: int, change: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """Some pushes of the same tensors, `change`d before each but the first."""
    rows = []
    for number in range(rounds + 1):
        if number:
            change()
        torch.cuda.synchronize()
        time.sleep(GAP_S)
        start = time.perf_counter()
        report = pusher.push(weights)
        rows.append(row_of(f"{what} #{number}", report, time.perf_counter() - start, service))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def change(weights: Weights, generator: torch.Generator) -> None:
    """Flip the signs of some weights, in place."""
    for _, tensor in weights:
        flat = tensor.view(-1)
        at = torch.randint(0, len(flat), (max(1, int(len(flat) * CHANGED)),), device=flat.device, generator=generator)
        flat[at] = -flat[at]


class Timeline:
    """When steps were encoded and chunks left the trainer, in milliseconds since the first step was enqueued."""

    def __init__(self) -> None:
        self.gathered: list[tuple[float, float]] = []
        self.encoded: list[tuple[float, float]] = []
        self._start_s = 0.0

    def __enter__(self) -> Timeline:
        self._kept = Gathered.gather, Gathered.arrive, FormWhole.settle
        timeline, (gather, arrive, settle) = self, self._kept
        begun: dict[int, float] = {}

        def began(packet: Gathered, address: int) -> None:
            begun[packet.sequence] = time.perf_counter()
            gather(packet, address)

        def arrived(packet: Gathered) -> None:
            arrive(packet)
            timeline.gathered.append((begun[packet.sequence], time.perf_counter()))

        def settled(whole: FormWhole) -> None:
            settle(whole)
            timeline.encoded, timeline._start_s = whole.encode_ms, whole.started_s

        Gathered.gather, Gathered.arrive, FormWhole.settle = began, arrived, settled  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Gathered.gather, Gathered.arrive, FormWhole.settle = self._kept  # type: ignore[method-assign]

    def rows(self, staged: list[tuple[float, float]]) -> dict[str, list[tuple[float, float]]]:
        """By what was done; staged: the rank's chunks, by the same clock."""
        since = [(1e3 * (a - self._start_s), 1e3 * (b - self._start_s)) for a, b in self.gathered]
        there = [(1e3 * (a - self._start_s), 1e3 * (b - self._start_s)) for a, b in staged]
        return {"encode": self.encoded, "transfer": since, "stage": there}


# ---------------------------------------------------------------- what others do


def _rank(rank: int, port: int, sizes: list[tuple[int, ...]], source: str, target: str, found: Any) -> None:
    """Both sides of the broadcasts."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = torch.device(source if rank == 0 else target)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", rank=rank, world_size=2, device_id=device)
    tensors = [torch.empty(size, dtype=torch.bfloat16, device=device) for size in sizes]
    num_bytes = sum(each.nbytes for each in tensors)
    bucket = torch.empty(BUCKET_BYTES, dtype=torch.uint8, device=device)

    def one_by_one() -> None:
        for each in tensors:
            dist.broadcast(each, 0)

    def in_buckets() -> None:
        for _ in range(-(-num_bytes // BUCKET_BYTES)):
            dist.broadcast(bucket, 0)

    for name, work in (("per tensor", one_by_one), ("in buckets", in_buckets)):
        times = []
        for _ in range(3):
            dist.barrier()
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        if rank == 0:
            found.put((name, min(times), num_bytes / 1e9))
    dist.destroy_process_group()


def broadcasts(shape: Shape, source: str, target: str) -> dict[str, float]:
    """Seconds of NCCL broadcasts of the model's BF16 bytes between two processes."""
    context = mp.get_context("spawn")
    found, sizes = context.SimpleQueue(), [row.shape for row in parameters_of(shape)]
    port = 29500 + os.getpid() % 500
    processes = [context.Process(target=_rank, args=(rank, port, sizes, source, target, found)) for rank in range(2)]
    for each in processes:
        each.start()
    for each in processes:
        each.join()
    return {name: seconds for name, seconds, _ in (found.get() for _ in range(2))}


def per_expert_ms(target: str) -> float:
    """Today's calls of one MoE layer, BF16 on the device to kernel layout: quantize each expert, gather rows, swizzle
    scales, stack, copy."""
    with torch.cuda.device(target):
        layer = Layer(1, 128, 2048, 768)
        order = {"w13": source_rows(1536, gated=True), "w2": source_rows(2048, gated=False)}

        def work() -> None:
            for matrix in ("w13", "w2"):
                weights, scales = [], []
                for e in range(128):
                    codes, block = eager(getattr(layer, matrix)[e])
                    weights.append(codes[order[matrix]])
                    rows, columns = block.shape
                    tiles = block.view(torch.uint8)[order[matrix]].view(rows // 128, 4, 32, columns // 4, 4)
                    scales.append(tiles.permute(0, 3, 2, 1, 4).contiguous().view(rows, columns))
                layer.form[f"{matrix}.weight"].copy_(torch.stack(weights))
                layer.form[f"{matrix}.weight_scale"].copy_(torch.stack(scales))

        return milliseconds(work, 2)


# ---------------------------------------------------------------- all of it


def all_pushes(
    service: Any, weights: Weights, options: argparse.Namespace
) -> Iterator[tuple[list[dict[str, Any]], Any]]:
    """Full ones, deltas with what is kept in each place; when what was done in one more full push. After each kind,
    what is known by then."""
    generator = torch.Generator(device=options.source).manual_seed(1)
    places = {
        "full, nothing kept": ("full", "cpu", "auto"),
        "full, nothing kept, over NCCL": ("full", "cpu", "nccl"),
        "delta, kept on the GPU": ("auto", options.source, "auto"),
    }
    places |= {"delta, kept in pinned memory": ("auto", "cpu", "auto")} if options.pinned else {}
    rows, times = [], {}
    for what, (mode, keep, transport) in places.items():
        pusher = Pusher(service.address, mode=mode, keep=keep, transport=transport)  # type: ignore[arg-type]
        gc.collect()
        gc.freeze()
        rows += pushes(what, pusher, weights, service, options.rounds, lambda: change(weights, generator))
        if what == "full, nothing kept":
            with Timeline() as timeline:
                service.ask("chunks")
                pusher.push(weights)
            times = timeline.rows(service.ask("chunks"))
        pusher.close()
        del pusher
        gc.unfreeze()
        gc.collect()
        torch.cuda.empty_cache()
        yield rows, times


def measured(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is known, after each part: a run that is cut short keeps what it has."""
    torch.cuda.set_device(options.source)
    shape = Shape(layers=options.layers)
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "layers": shape.layers}
    if options.baselines:
        found["nccl_s"] = broadcasts(shape, options.source, options.target)
        print(found["nccl_s"], flush=True)
        found["per_expert_s"] = per_expert_ms(options.target) / 1e3 * shape.layers
        print(found["per_expert_s"], flush=True)
        torch.cuda.empty_cache()
        yield found
    with tempfile.TemporaryDirectory() as folder, served(shape, options.target, Path(folder)) as service:
        weights = weights_of(shape, options.source)
        found["weights_gb"] = torch.cuda.memory_allocated() / 1e9
        print(f"served, {found['weights_gb']:.1f} GB of weights", flush=True)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for found["pushes"], found["timeline_ms"] in all_pushes(service, weights, options):
            yield found


def table(found: dict[str, Any]) -> Iterator[str]:
    """Lines of Markdown."""
    yield f"{found['device']}, torch {found['torch']}, {found['weights_gb']:.1f} GB of BF16, seconds:"
    yield ""
    yield f"| push | total | {' | '.join(PHASES)} | pause | of it on the device, ms |"
    yield "| --- " * (len(PHASES) + 4) + "|"
    for each in found["pushes"]:
        phases = " | ".join(f"{each['phases'][name]:.3f}" for name in PHASES)
        what = f"{each['what']}, {each['mode']}"
        yield f"| {what} | {each['seconds']:.3f} | {phases} | {each['pause_s']:.3f} | {each['pause_device_ms']:.1f} |"
    for name, seconds in found.get("nccl_s", {}).items():
        yield f"| NCCL broadcast of the BF16, {name} | {seconds:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--from", dest="source", default="cuda:0")
    parser.add_argument("--to", dest="target", default="cuda:1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-baselines", dest="baselines", action="store_false")
    parser.add_argument("--pinned", action="store_true", help="a retained copy in pinned memory, too")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.device_count() <= int(options.target.rpartition(":")[2]):
        print(f"no {options.target}: nothing measured")
        return
    for found in measured(options):
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    print("", *table(found), sep="\n")


if __name__ == "__main__":
    main()
