"""`python -m tests.bench.status`: how long `transfuse status` takes with 64 ranks, and what of it is the service.

Ranks are simulated: a real gRPC server that answers greetings as a rank of a model of 5,000 tensors would, without
weights.
The coordinator is the real one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from quant.formats import TensorSpec
from service.control_server import ControlServer
from service.coordinator import CoordinatorShell
from service.guard import Guard
from service.wire import bind, make_server
from tests.test_cli import byte_tokenizer
from weight_update.manifest import Manifest
from weight_update.transport import CONTROL_MESSAGE_BYTES, connect
from weight_update.values import to_digests_proto, to_manifest_proto

REPLICAS, RANKS, TENSORS, CALLS = 8, 8, 5_000, 200


class SimulatedRank(pb_grpc.MemberServicer):
    """One rank without weights: it holds whatever version it is told to adopt."""

    def __init__(self, manifest: Manifest, replica: int, rank: int) -> None:
        self._manifest, self._replica, self._rank = to_manifest_proto(manifest), replica, rank
        self._version = 0

    def Hello(self, request: pb.HelloRequest, context: Any) -> pb.HelloReply:
        in_full = bool(request.epoch) and not request.brief
        rows = [0] * len(self._manifest.tensors) if in_full else []
        return pb.HelloReply(
            manifest=self._manifest if in_full else None,
            spec=pb.RankSpec(replica=self._replica, rank=self._rank, row_start=rows, row_stop=rows),
            version=self._version,
            state="idle",
            serves=True,
            pid=1,
            layout="trtllm_linear, trtllm_moe",
            format="nvfp4",
            token=time.monotonic(),
            gauges=pb.RankGauges(reserved_bytes=1 << 30, digest="0" * 32),
        )

    def Digest(self, request: pb.MemberRequest, context: Any) -> pb.MemberDigests:
        digests = np.zeros((len(self._manifest.tensors), 2), np.uint64)
        return pb.MemberDigests(digests=to_digests_proto(digests), token=time.monotonic())

    def Adopt(self, request: pb.MemberRequest, context: Any) -> pb.MemberReply:
        self._version = request.version
        return pb.MemberReply(version=self._version, token=time.monotonic())

    Publish = Resume = Adopt


@contextmanager
def simulated(replicas: int, ranks: int, tensors: int) -> Iterator[str]:
    """A coordinator over so many ranks; its address."""
    specs = tuple(TensorSpec(name=f"layer.{i}.weight", dtype="BF16", shape=(8, 8)) for i in range(tensors))
    manifest, servers, addresses = Manifest(tensors=specs, parameters=()), [], list[str]()
    guards: list[Guard] = []
    for replica in range(replicas):
        for rank in range(ranks):
            guards.append(Guard())
            services = [pb.DESCRIPTOR.services_by_name["Member"]]
            server, _ = make_server(services, max_message_bytes=CONTROL_MESSAGE_BYTES, guard=guards[-1])
            pb_grpc.add_MemberServicer_to_server(SimulatedRank(manifest, replica, rank), server)
            addresses.append(bind(server, "127.0.0.1:0"))
            servers.append(server)
    with tempfile.TemporaryDirectory() as folder:
        byte_tokenizer().save(f"{folder}/tokenizer.json")
        shell = CoordinatorShell(addresses=addresses, state_file=Path(folder) / "state.sqlite", source="simulated")
        control = ControlServer(shell, listen="127.0.0.1:0", tokenizer_dir=Path(folder))
        try:
            yield control.address
        finally:
            control.stop()
            shell.stop()
            for server in servers:
                server.stop(None)
            for each in guards:
                each.stop()


def measure(address: str, calls: int) -> dict[str, float]:
    """Milliseconds of one call, and seconds of the command."""
    with connect(address) as channel:
        stub = pb_grpc.ControlStub(channel)
        replies = [stub.Status(pb.StatusRequest(), timeout=10)]
        assert len(replies[0].ranks) == REPLICAS * RANKS
        took = []
        for _ in range(calls):
            start_s = time.perf_counter()
            stub.Status(pb.StatusRequest(), timeout=10)
            took.append(time.perf_counter() - start_s)
    commands, cpu = [], []
    for _ in range(5):
        start_s, used_s = time.perf_counter(), _children_s()
        subprocess.run(
            [sys.executable, "-c", "from launch.cli import main; main()", "status", "--json", "--to", address],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        commands.append(time.perf_counter() - start_s)
        cpu.append(_children_s() - used_s)
    return {
        "call_median_ms": 1e3 * float(np.median(took)),
        "call_p99_ms": 1e3 * float(np.quantile(took, 0.99)),
        "reply_bytes": float(replies[0].ByteSize()),
        "command_best_s": min(commands),
        "command_cpu_s": min(cpu),
    }


def _children_s() -> float:
    """CPU seconds of all processes that were started here and have ended."""
    used = os.times()
    return used.children_user + used.children_system


def main() -> None:
    """One JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=CALLS)
    calls = parser.parse_args().calls
    try:
        with simulated(REPLICAS, RANKS, TENSORS) as address:
            found = measure(address, calls)
    except grpc.RpcError as error:
        raise SystemExit(f"no answer: {error}") from None
    sys.stdout.write(json.dumps({"ranks": REPLICAS * RANKS, "tensors": TENSORS} | found) + "\n")


if __name__ == "__main__":
    main()
