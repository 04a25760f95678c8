"""checkpoint-engine moving BF16 bytes between two GPUs of one host, to set beside `gpu_push`.

    torchrun --nproc-per-node 2 -m tests.bench.peers [--layers 24] [--updates 3]

Needs `pip install checkpoint-engine` (0.4.2 was measured). The expert matrices of so many MoE layers of Qwen3-30B-A3B,
tensor by tensor, half of them registered by each rank in pinned memory; an update broadcasts all of them to a process
beside each rank, which copies every tensor into a live one. Nothing is quantized and nothing verified. The weights are
one random tensor over and over: what they are makes no difference to a copy.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

EXPERTS, HIDDEN, INTER = 128, 2048, 768


def sizes_of(layers: int) -> Iterator[tuple[str, tuple[int, int]]]:
    for layer in range(layers):
        for expert in range(EXPERTS):
            at = f"model.layers.{layer}.mlp.experts.{expert}"
            yield f"{at}.gate_proj.weight", (INTER, HIDDEN)
            yield f"{at}.up_proj.weight", (INTER, HIDDEN)
            yield f"{at}.down_proj.weight", (HIDDEN, INTER)


def receive(rank: int, gpu: str, layers: int, asked: Any, done: Any) -> None:
    """The process beside a rank: live tensors, filled at every update."""
    import zmq
    from checkpoint_engine.worker import update_weights_from_ipc

    torch.cuda.set_device(rank)
    live = {name: torch.zeros(size, dtype=torch.bfloat16, device="cuda") for name, size in sizes_of(layers)}

    def copy(weights: list[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            live[name].copy_(tensor)

    context = zmq.Context()
    done.put(True)
    for paths in iter(asked.get, None):
        update_weights_from_ipc(
            context, dict(paths)[gpu], device_id=rank, run=copy, post_hook=torch.cuda.synchronize
        )
        done.put(True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--updates", type=int, default=3)
    options = parser.parse_args()
    from checkpoint_engine.device_utils import DeviceManager
    from checkpoint_engine.ps import ParameterServer, _get_physical_gpu_id

    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    context = mp.get_context("spawn")
    asked, done = context.Queue(), context.Queue()
    gpu = _get_physical_gpu_id(DeviceManager(), rank)
    process = context.Process(target=receive, args=(rank, gpu, options.layers, asked, done))
    process.start()
    done.get()
    server = ParameterServer(auto_pg=True)
    sizes = list(sizes_of(options.layers))
    num_bytes = sum(2 * rows * columns for _, (rows, columns) in sizes)
    pool = torch.randn(INTER * HIDDEN, generator=torch.Generator().manual_seed(rank)).bfloat16()
    start = time.perf_counter()
    server.register_checkpoint("c", named_tensors={name: pool.view(size).clone() for name, size in sizes[rank::2]})
    registered = time.perf_counter()
    server.gather_metas("c")
    gathered = time.perf_counter()
    if rank == 0:
        took = f"registered in {registered - start:.2f} s, told in {gathered - registered:.2f} s"
        print(f"{num_bytes / 1e9:.1f} GB, {len(sizes)} tensors: {took}", flush=True)
    for number in range(options.updates):
        server.store_based_barrier()
        start = time.perf_counter()
        server.update("c", asked.put, ranks=[])
        seconds = time.perf_counter() - start
        done.get()
        if rank == 0:
            print(f"update {number}: {seconds:.2f} s, {num_bytes / seconds / 1e9:.1f} GB/s", flush=True)
    asked.put(None)
    process.join()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
