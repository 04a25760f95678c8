"""What a push costs over gRPC and shared memory: one trainer process, one actor process, one host.

    python -m tests.bench.push [--json] [--pushes N]

Prints, each as a ratio to something measured in the same run: payload rate of the transfer phase over a one-thread
memcpy, with the bytes encoded and digested on the way and with all that done before (push_async), pause over a plain
copy of the same bytes, actor memory above idle over what was planned, seconds per tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc
import numpy as np
import psutil
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from quant.checkpoint import open_checkpoint
from tests.local import local_service
from weight_update.chunks import CHUNK_BYTES
from weight_update.client import Pusher, PushReport
from weight_update.links import GRPC, SHARED_MEMORY
from weight_update.transport import CHANNEL_OPTIONS, connect

COPY_BYTES = 256 << 20
NUM_LAYERS_OF_TINY = 400  # 9 parameters each: thousands of tensors of a few hundred bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured case; medians over the pushes after the first, which touches fresh pages."""

    case: str
    transport: str
    tensors: int
    wire_mb: float
    transfer_gb_s: float
    transfer_over_memcpy: float
    transfer_over_raw_grpc: float
    encoded_before_over_memcpy: float
    pause_ms: float
    pause_over_copy: float
    memory_over_planned: float
    us_per_tensor: float


def memcpy_bytes_s() -> float:
    """Bytes a second of one thread copying 256 MiB between touched buffers; the best of seven."""
    source, target = np.ones(COPY_BYTES, np.uint8), np.zeros(COPY_BYTES, np.uint8)
    return COPY_BYTES / min(_seconds(lambda: np.copyto(target, source)) for _ in range(7))


def _seconds(function: object) -> float:
    start = time.perf_counter()
    function()  # type: ignore[operator]
    return time.perf_counter() - start


@contextmanager
def actor_process(model_dir: Path, format: str, layout: str) -> Iterator[tuple[str, psutil.Process, int]]:
    """A service of one rank in its own process: its address, the process, bytes of the buffer that it keeps."""
    command = [sys.executable, "-m", "tests.bench.push", "--serve", str(model_dir), format, layout]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address, reserved_bytes = process.stdout.readline().split()
        yield address, psutil.Process(process.pid), int(reserved_bytes)
    finally:
        process.communicate("stop\n", timeout=60)


def serve(model_dir: str, format: str, layout: str) -> None:
    """The actor process: serve until standard input says stop."""
    with (
        tempfile.TemporaryDirectory() as state,
        local_service(Path(model_dir), Path(state), (layout,), format) as service,
    ):
        print(service.address, service.ranks[0].receiver.reserved_bytes, flush=True)
        sys.stdin.readline()


def peak_bytes(process: psutil.Process) -> int:
    """The largest resident size since `reset_peak`."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


def reset_peak(process: psutil.Process) -> None:
    """Linux: start a new peak of the resident size."""
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")


def serve_raw() -> None:
    """A gRPC stream that takes messages and drops them: what gRPC itself costs."""

    def drop(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        return (b"" for _ in messages)

    handler = grpc.stream_stream_rpc_method_handler(drop)
    server = grpc.server(ThreadPoolExecutor(4), options=CHANNEL_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("raw.Raw", {"Drop": handler}),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    sys.stdin.readline()


def raw_grpc_bytes_s() -> float:
    """Bytes a second of chunks of the same size through a stream that drops them; the best of five."""
    command = [sys.executable, "-m", "tests.bench.push", "--raw"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    message, count = os.urandom(CHUNK_BYTES), COPY_BYTES // CHUNK_BYTES
    with connect(f"127.0.0.1:{process.stdout.readline().strip()}") as channel:
        stream = channel.stream_stream("/raw.Raw/Drop")
        seconds = [_seconds(lambda: list(stream(message for _ in range(count)))) for _ in range(5)]
    process.communicate("stop\n", timeout=60)
    return COPY_BYTES / min(seconds)


def measure(
    case: str, model: torch.nn.Module, model_dir: Path, format: str, layout: str, pushes: int, transport: str
) -> Row:
    """Push `pushes` + 1 times, and as often in the background; every push is a full one."""
    memcpy, raw = memcpy_bytes_s(), raw_grpc_bytes_s()
    reports: list[PushReport] = []
    encoded: list[PushReport] = []
    with actor_process(model_dir, format, layout) as (address, process, reserved_bytes):
        pusher = Pusher(address, mode="full", transport=transport)
        idle = process.memory_info().rss - reserved_bytes  # the cold load has left its buffer for the pushes to come
        reset_peak(process)
        for _ in range(pushes + 1):
            with torch.no_grad():
                next(iter(model.parameters())).view(-1)[:8].add_(1)
            reports.append(pusher.push(model))
            encoded.append(pusher.push_async(model).result())
        above = peak_bytes(process) - idle
        pusher.close()
    warm = reports[1:]
    encoded_s = statistics.median(report.phases["transfer"] for report in encoded[1:])
    transfer_s = statistics.median(report.phases["transfer"] for report in warm)
    pause_s = statistics.median(report.pause_s for report in warm)
    wire = warm[0].wire_bytes
    tensors = len(list(model.parameters()))
    return Row(
        case=case,
        transport=transport,
        tensors=tensors,
        wire_mb=wire / 1e6,
        transfer_gb_s=wire / transfer_s / 1e9,
        transfer_over_memcpy=wire / transfer_s / memcpy,
        transfer_over_raw_grpc=wire / transfer_s / raw,
        encoded_before_over_memcpy=wire / encoded_s / memcpy,
        pause_ms=pause_s * 1e3,
        pause_over_copy=pause_s / (wire / memcpy),
        memory_over_planned=above / max(report.planned_bytes for report in reports),
        us_per_tensor=statistics.median(report.seconds for report in warm) / tensors * 1e6,
    )


def tiny_tensors(directory: Path) -> torch.nn.Module:
    """Thousands of tensors of a few hundred bytes: what a tensor costs, not its bytes."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=NUM_LAYERS_OF_TINY,
        num_attention_heads=1,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--pushes", type=int, default=3)
    parser.add_argument("--raw", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--serve", nargs=3, metavar=("DIR", "FORMAT", "LAYOUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve)
        return
    if options.raw:
        serve_raw()
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        tiny = tiny_tensors(Path(scratch))
        with open_checkpoint("smollm2") as checkpoint:
            real_dir = checkpoint.config_dir
        real = AutoModelForCausalLM.from_pretrained(real_dir, dtype=torch.bfloat16)
        rows = [
            measure(case, model, model_dir, format, layout, options.pushes, transport)
            for case, model, model_dir, format, layout in (
                ("SmolLM2-135M as bf16", real, real_dir, "bf16", "plain"),
                ("SmolLM2-135M to nvfp4, trtllm", real, real_dir, "nvfp4", "trtllm"),
                ("3,602 tiny tensors as bf16", tiny, Path(scratch), "bf16", "plain"),
            )
            for transport in (GRPC, SHARED_MEMORY)
        ]
    if options.json:
        print(json.dumps({"cores": os.cpu_count(), "rows": [asdict(row) for row in rows]}))
        return
    for row in rows:
        print(f"{row.case} over {row.transport} ({row.tensors} tensors, {row.wire_mb:.1f} MB on the wire)")
        print(f"  transfer {row.transfer_gb_s:.2f} GB/s = {row.transfer_over_memcpy:.3f} of a one-thread memcpy,")
        print(f"    {row.encoded_before_over_memcpy:.3f} with all bytes encoded before,")
        print(f"    {row.transfer_over_raw_grpc:.2f} of a raw gRPC stream that drops its messages")
        print(f"  pause {row.pause_ms:.1f} ms = {row.pause_over_copy:.1f} times a plain copy of the same bytes")
        print(f"  actor memory above idle = {row.memory_over_planned:.2f} of planned")
        print(f"  whole push {row.us_per_tensor:.1f} us a tensor")


if __name__ == "__main__":
    main()
