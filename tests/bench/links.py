"""What each transport carries: chunks in checkpoint form from one process into the kernel layout of another.

    python -m tests.bench.links [--layers 1] [--experts 128] [--from cuda:0 --to cuda:1] [--only cuda-ipc] [--json]

Two processes of this host: a rank (a Receiver behind the stream that every rank has) and a sender. Bytes are those of
MoE layers of Qwen3-30B-A3B in NVFP4, random; they are staged, digested, installed in TRT-LLM's layout and read back,
and both digests are compared with the sender's. Not in here: encoding, and what a push plans and agrees on before its
bytes move (see `push`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import torch
from torch import Tensor

from quant.formats import FORMATS, TensorSpec
from quant.layouts import LAYOUTS, LayoutPlan, plan_experts
from service.data import DataServicer
from service.faults import Faults
from service.gauges import Gauges
from service.guard import Guard
from service.metrics import RankMetrics
from sharding.routes import Destination
from weight_update.channels import PLAINTEXT
from weight_update.device_rings import DEVICE_RING_BYTES
from weight_update.digest import digest_rows, name_key
from weight_update.door import Door
from weight_update.groups import Groups
from weight_update.links import CUDA_IPC, GRPC, NCCL, SHARED_MEMORY, allowed_of, choose, here
from weight_update.receiver import Receiver
from weight_update.rings import RING_BYTES
from weight_update.stream import StageStream
from weight_update.transport import CHANNEL_OPTIONS, connect

HIDDEN, INTER = 2048, 768
GROUPS = Groups()
RING_OF = {CUDA_IPC: DEVICE_RING_BYTES, NCCL: DEVICE_RING_BYTES, SHARED_MEMORY: RING_BYTES, GRPC: 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One transport; medians over the rounds after the first."""

    transport: str
    device: str
    tensors: int
    gb: float
    copy_gb_s: float  # of a one-thread memcpy, or of a copy from one GPU to the other
    send_s: float
    send_over_copy: float
    prepare_s: float
    install_s: float
    peak_gb: float  # of the rank's GPU, above the live weights


def plans_of(layers: int, experts: int) -> list[LayoutPlan]:
    layout, fmt = LAYOUTS["trtllm_moe"], FORMATS["nvfp4"]
    return [plan_experts(layout, fmt, f"m{i}", experts, HIDDEN, INTER) for i in range(layers)]


def specs_of(layers: int, experts: int) -> list[TensorSpec]:
    return [placement.tensor for plan in plans_of(layers, experts) for placement in plan.placements]


def receiver_of(layers: int, experts: int, device: str) -> Receiver:
    """The layers in TRT-LLM's layout, all zeros."""
    plans = plans_of(layers, experts)
    storages = {
        each.name: torch.zeros(each.shape, dtype=each.dtype, device=device) for plan in plans for each in plan.storages
    } | {each.name: torch.zeros(each.shape, device=device) for plan in plans for each in plan.derived}
    placements = [placement for plan in plans for placement in plan.placements]
    return Receiver(storages, placements, [each for plan in plans for each in plan.derived])


# ---------------------------------------------------------------- the rank


def serve(layers: int, experts: int, device: str) -> None:
    """Does what standard input says, a word a line, and answers each with a line of JSON."""
    torch.set_num_threads(1)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    receiver = receiver_of(layers, experts, device)
    rank: Any = SimpleNamespace(
        receiver=receiver,
        place=here(receiver.device),
        faults=Faults(),
        timing=SimpleNamespace(staged_bytes=0),
        member=SimpleNamespace(state="open", transaction=0),
        guard=Guard(PLAINTEXT),
        gauges=Gauges(),
        recorder=None,
    )
    rank.metrics = RankMetrics(rank)
    data = DataServicer(rank)
    options = [*CHANNEL_OPTIONS, ("grpc.max_receive_message_length", 64 << 20)]
    server = grpc.server(ThreadPoolExecutor(4), options=options)
    server.add_generic_rpc_handlers((data.handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    rank.address = f"127.0.0.1:{port}"
    print(json.dumps({"address": rank.address, "place": asdict(rank.place)}), flush=True)
    live_bytes = torch.cuda.memory_allocated(receiver.device) if receiver.device.type == "cuda" else 0

    def begin() -> dict[str, Any]:
        rank.member.transaction += 1
        indices = range(len(receiver.manifest.tensors))
        plan = receiver.begin(rank.member.transaction, receiver.version + 1, receiver.version, indices)
        return {"planned_bytes": plan.peak_bytes}

    def prepare() -> dict[str, Any]:
        data.end_streams(whole=True)
        return {"digests": receiver.prepare().tolist()}

    def install() -> dict[str, Any]:
        return {"digests": receiver.install().tolist()}

    def publish() -> dict[str, Any]:
        receiver.publish()
        on_gpu = receiver.device.type == "cuda"
        return {"peak_bytes": torch.cuda.max_memory_allocated(receiver.device) - live_bytes if on_gpu else 0}

    for line in sys.stdin:
        start = time.perf_counter()
        answer = {"begin": begin, "prepare": prepare, "install": install, "publish": publish}[line.strip()]()
        print(json.dumps(answer | {"seconds": time.perf_counter() - start}), flush=True)
    server.stop(0).wait()


@contextmanager
def rank_process(layers: int, experts: int, device: str) -> Iterator[Any]:
    """Ask it with `ask("begin")`; `said` is what it said of itself."""
    command = [sys.executable, "-m", "tests.bench.links", "--serve", str(layers), str(experts), device]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    said = json.loads(process.stdout.readline())

    def ask(word: str) -> Any:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(word + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    try:
        yield SimpleNamespace(ask=ask, **said)
    finally:
        process.communicate(timeout=60)


# ---------------------------------------------------------------- the sender


def content(specs: Sequence[TensorSpec], device: str) -> list[Tensor]:
    """Random rows of every tensor, uint8 [rows, row_bytes], out of one buffer; scalars are 1.0."""
    sizes = [-(-spec.num_bytes // 64) * 64 for spec in specs]
    memory = torch.randint(0, 256, (sum(sizes),), dtype=torch.uint8, device=device)
    one, rows, at = torch.ones(1).view(torch.uint8).to(device), [], 0
    for spec, size in zip(specs, sizes, strict=True):
        part = memory[at : at + spec.num_bytes]
        if spec.num_bytes == 4:
            part.copy_(one)
        rows.append(part.view(spec.num_rows, spec.row_bytes))
        at += size
    return rows


def _seconds(function: Any) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def copy_s(rows: list[Tensor], target: Tensor) -> float:
    """Of a plain copy of the same bytes: one thread on the host, or from GPU to GPU; caches as cold as for a push."""

    def copy() -> None:
        at = 0
        for each in rows:
            target[at : at + each.numel()].copy_(each.view(-1))
            at += each.numel()
        if target.is_cuda:
            torch.cuda.synchronize(target.device)

    return _seconds(copy)


def send(
    rank: Any, transport: str, source: str, transaction: int, specs: Sequence[TensorSpec], rows: list[Tensor]
) -> str:
    """All rows through one stream; returns how they went."""
    place = here(torch.device(source))
    link = choose(place, type(place)(**rank.place), allowed_of(transport), rank.address)
    with connect(rank.address) as channel:
        stream = StageStream(
            channel,
            target=rank.address,
            transaction=transaction,
            epoch=1,
            trainer_rank=0,
            retry_s=0.0,
            link=link,
            device=torch.device(source),
            groups=GROUPS,
            ring_bytes=RING_OF[transport],
        )
        stops = np.array([spec.num_rows for spec in specs], np.int64)
        door = Door(Destination(ranks=(0,), row_start=np.zeros_like(stops), row_stop=stops), [stream])
        for i, data in enumerate(rows):
            flat = data.reshape(-1)
            door.add(i, 0, flat if flat.is_cuda else flat.numpy().data)
        door.flush()
        stream.finish()
    return str(stream.link)


def measure(transport: str, layers: int, experts: int, source: str, target: str, rounds: int) -> Row:
    """`rounds` + 1 times all bytes of the layers; every digest is compared."""
    specs = specs_of(layers, experts)
    rows = content(specs, source)
    there = torch.zeros(sum(spec.num_bytes for spec in specs), dtype=torch.uint8, device=target)
    wanted = [list(digest_rows(name_key(spec.name), data, 0)) for spec, data in zip(specs, rows, strict=True)]
    found: dict[str, list[float]] = {"copy": [], "send": [], "prepare": [], "install": []}
    with rank_process(layers, experts, target) as rank:
        for transaction in range(1, rounds + 2):
            rank.ask("begin")
            found["copy"].append(copy_s(rows, there))
            start = time.perf_counter()
            went = send(rank, transport, source, transaction, specs, rows)
            found["send"].append(time.perf_counter() - start)
            assert went.startswith(transport), went
            for word in ("prepare", "install"):
                answer = rank.ask(word)
                assert answer["digests"] == wanted, f"{transport}, {word}: digests differ"
                found[word].append(answer["seconds"])
            peak_bytes = rank.ask("publish")["peak_bytes"]
    seconds = {word: statistics.median(each[1:]) for word, each in found.items()}
    num_bytes = sum(spec.num_bytes for spec in specs)
    return Row(
        transport=transport,
        device=f"{source} to {target}",
        tensors=len(specs),
        gb=num_bytes / 1e9,
        copy_gb_s=num_bytes / seconds["copy"] / 1e9,
        send_s=seconds["send"],
        send_over_copy=seconds["copy"] / seconds["send"],
        prepare_s=seconds["prepare"],
        install_s=seconds["install"],
        peak_gb=peak_bytes / 1e9,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--from", dest="source", default="cpu")
    parser.add_argument("--to", dest="target", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", action="append", help="a transport, repeatable")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(int(options.serve[0]), int(options.serve[1]), options.serve[2])
        return
    torch.set_num_threads(1)
    on_gpus = options.source != "cpu" and options.target != "cpu"
    chosen = options.only or [*([CUDA_IPC, NCCL] if on_gpus else []), SHARED_MEMORY, GRPC]
    rows = [
        measure(each, options.layers, options.experts, options.source, options.target, options.rounds)
        for each in chosen
    ]
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    for row in rows:
        print(f"{row.transport}, {row.device}: {row.gb:.2f} GB in {row.tensors} tensors")
        print(f"  sent in {row.send_s:.3f} s = {row.send_over_copy:.3f} of a plain copy ({row.copy_gb_s:.1f} GB/s)")
        print(f"  digested in {row.prepare_s:.3f} s, installed and read back in {row.install_s:.3f} s")


if __name__ == "__main__":
    main()
