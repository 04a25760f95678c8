"""A service of one rank over named storages of a Qwen3-MoE-shaped model, on a device of its own process, without Ray.

    with served(Shape(), "cuda:1", folder) as service:
        Pusher(service.address).push(weights_of(Shape(), "cuda:0"))
        service.ask("storages")       # xxh3 of every storage's bytes

The coordinator, the rank's doors and its receiver are those of production (`service.hosts.member`); the engine is one
that runs no model, so that it stops and goes on at once.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import xxhash
from torch import Tensor

from quant.formats import FORMATS, TensorSpec
from quant.layouts import LAYOUTS, Placement, place_row_major, plan_experts, plan_linear
from quant.parameters import ParameterRow
from service.control_server import ControlServer
from service.coordinator import CoordinatorShell
from service.hosts.member import Membership, serve
from service.rank import RankServer
from weight_update.cuda_install import DeviceStaging
from weight_update.holdings import Holdings


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a model; by default those of Qwen3-30B-A3B."""

    layers: int = 48
    experts: int = 128
    hidden: int = 2048
    inter: int = 768
    query: int = 4096
    key: int = 512
    head: int = 128
    vocab: int = 151936


def parameters_of(shape: Shape) -> list[ParameterRow]:
    """Every weight, in NVFP4 but for embeddings, norms and routers. Gate and up share a scale, and q, k and v do."""
    rows = [_row("model.embed_tokens.weight", (shape.vocab, shape.hidden))]
    for i in range(shape.layers):
        at = f"model.layers.{i}"
        for name, size in (("q", shape.query), ("k", shape.key), ("v", shape.key)):
            rows.append(_row(f"{at}.self_attn.{name}_proj.weight", (size, shape.hidden), "nvfp4", f"{at}.qkv"))
        rows.append(_row(f"{at}.self_attn.o_proj.weight", (shape.hidden, shape.query), "nvfp4"))
        rows += [_row(f"{at}.self_attn.{name}_norm.weight", (shape.head,)) for name in ("q", "k")]
        rows += [_row(f"{at}.{name}_layernorm.weight", (shape.hidden,)) for name in ("input", "post_attention")]
        rows.append(_row(f"{at}.mlp.gate.weight", (shape.experts, shape.hidden)))
        for e in range(shape.experts):
            expert = f"{at}.mlp.experts.{e}"
            half = (shape.inter, shape.hidden)
            rows += [_row(f"{expert}.{name}_proj.weight", half, "nvfp4", f"{expert}.w13") for name in ("gate", "up")]
            rows.append(_row(f"{expert}.down_proj.weight", (shape.hidden, shape.inter), "nvfp4"))
    return [*rows, _row("model.norm.weight", (shape.hidden,)), _row("lm_head.weight", (shape.vocab, shape.hidden))]


def _row(name: str, size: tuple[int, ...], format: str = "bf16", group: str = "") -> ParameterRow:
    return ParameterRow(name=name, shape=size, format=format, group=group)


def weights_of(shape: Shape, device: str, seed: int = 0) -> list[tuple[str, Tensor]]:
    """Random BF16 weights, one after the other in one piece of memory, as a flat optimizer keeps them."""
    torch.manual_seed(seed)
    rows = parameters_of(shape)
    sizes = [math.prod(row.shape) for row in rows]
    ends = list(accumulate(-(-size // 64) * 64 for size in sizes))
    memory = torch.empty(ends[-1], dtype=torch.bfloat16, device=device)
    for part in memory.split(1 << 30):
        part.normal_(0, 0.02)
    begins = [0, *ends[:-1]]
    return [
        (row.name, memory[at : at + size].view(row.shape)) for row, at, size in zip(rows, begins, sizes, strict=True)
    ]


def holdings_of(shape: Shape, device: str) -> Holdings:
    """Storages on a device, all zeros, in TRT-LLM's layouts."""
    nvfp4, rows = FORMATS["nvfp4"], parameters_of(shape)
    moe, linear, sizes = LAYOUTS["trtllm_moe"], LAYOUTS["trtllm_linear"], (shape.experts, shape.hidden, shape.inter)
    plans = [plan_experts(moe, nvfp4, f"model.layers.{i}.mlp.experts", *sizes) for i in range(shape.layers)]
    dense = [row for row in rows if row.format == "nvfp4" and ".experts." not in row.name]
    plans += [plan_linear(linear, nvfp4, row.name.removesuffix(".weight"), *row.shape) for row in dense]
    plain = [TensorSpec(name=row.name, dtype="BF16", shape=row.shape) for row in rows if row.format == "bf16"]
    placements: list[Placement] = [place_row_major(spec, spec.name) for spec in plain]
    storages = {spec.name: torch.zeros(spec.shape, dtype=torch.bfloat16, device=device) for spec in plain}
    for plan in plans:
        placements += plan.placements
        storages |= {each.name: torch.zeros(each.shape, dtype=each.dtype, device=device) for each in plan.storages}
        storages |= {each.name: torch.zeros(each.shape, device=device) for each in plan.derived}
        for each in plan.storages:  # calibration, which no push of these brings
            if each.name.endswith("input_scale"):
                storages[each.name].fill_(1.0)
    derived = [each for plan in plans for each in plan.derived]
    return Holdings(storages=lambda: storages, placements=placements, derived=derived, parameters=rows)


# ---------------------------------------------------------------- its process


def _serve(shape: Shape, device: str, folder: Path) -> None:
    torch.set_num_threads(1)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    _watch(CHUNKS)
    nothing = SimpleNamespace(name="idle", pause=lambda: None, renew=lambda version: None, resume=lambda: None)
    rank = serve(holdings_of(shape, device), nothing, Membership(control_url=""), format="nvfp4", layout="trtllm")
    shell = CoordinatorShell(addresses=[rank.address], state_file=folder / "state.sqlite", source="zeros")
    server = ControlServer(shell, listen="127.0.0.1:0", tokenizer_dir=folder)
    print(json.dumps({"address": server.address}), flush=True)
    live_bytes = torch.cuda.memory_allocated(device) if device.startswith("cuda") else 0
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(ANSWERS[line.strip()](rank, live_bytes)), flush=True)
    server.stop()
    shell.stop()
    rank.stop()


def _memory(rank: RankServer, live_bytes: int) -> dict[str, Any]:
    """Bytes of the device above the weights, and milliseconds of the last install there."""
    device: Any = rank.receiver._device
    peak = torch.cuda.max_memory_allocated(rank.receiver.device) - live_bytes
    return {"peak_bytes": peak, "pause_ms": device.pause_ms, "live_bytes": live_bytes}


def _watch(chunks: list[tuple[float, float]]) -> None:
    """Note when chunks are staged on a device, by the clock that all processes of a host share."""
    copy = DeviceStaging._copy

    def timed(staging: DeviceStaging, *arguments: Any) -> None:
        start_s = time.perf_counter()
        copy(staging, *arguments)
        chunks.append((start_s, time.perf_counter()))

    DeviceStaging._copy = timed  # type: ignore[method-assign]


CHUNKS: list[tuple[float, float]] = []


def _chunks(rank: RankServer, _: int) -> list[tuple[float, float]]:
    """Seconds in which chunks were staged since this was asked before."""
    found = list(CHUNKS)
    CHUNKS.clear()
    return found


ANSWERS: dict[str, Callable[[RankServer, int], Any]] = {
    "storages": lambda rank, _: {
        name: xxhash.xxh3_128_hexdigest(data) for name, data in rank.receiver.storage_bytes().items()
    },
    "addresses": lambda rank, _: rank.receiver.storage_addresses(),
    "memory": _memory,
    "chunks": _chunks,
}


@contextmanager
def served(shape: Shape, device: str, folder: Path) -> Iterator[Any]:
    """Such a service in a process of its own: `address` of Control; `ask` is answered by ANSWERS."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.device_service", json.dumps(asdict(shape)), device, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    pipe, answers = process.stdin, process.stdout

    def ask(word: str) -> Any:
        pipe.write(word + "\n")
        pipe.flush()
        return json.loads(answers.readline())

    try:
        said = json.loads(answers.readline())
        yield SimpleNamespace(ask=ask, **said)
    finally:
        process.communicate(timeout=60)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    _serve(Shape(**json.loads(sys.argv[1])), sys.argv[2], Path(sys.argv[3]))
