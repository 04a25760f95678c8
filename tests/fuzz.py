"""What comes from outside, broken on purpose: chunks, manifests, deltas, checkpoint configs, safetensors headers.

    for target in targets(scratch): target.run(range(10_000))       # input i is always the same
"""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from google.protobuf.message import DecodeError
from safetensors.torch import save

from protos import transfuse_pb2 as pb
from quant.checkpoint import Checkpoint, CheckpointError
from quant.formats import TensorSpec
from tests.rig import Rig, random_content
from weight_update.chunks import StageOpen, decode_request, encode_chunk
from weight_update.delta import BlobSize, Patch, pack, unpack
from weight_update.errors import ManifestError, TransferError
from weight_update.manifest import check_push
from weight_update.values import from_manifest_proto, from_spec_proto, to_manifest_proto

DELTA_BUDGET = 1 << 20  # what a rank would have had room for when the delta was announced
EDGES = [b"\xff" * 8, b"\x00" * 8, b"\xff\xff\xff\xff\x0f", b"\x80" * 10, b"\xff" * 9 + b"\x01", b"\x7f", b"[" * 2000]
VALUES = [None, True, -1, 0, 2**63, 1e308, "", "*" * 40, "nvfp4", [], {}, [[]], {"a": {}}, "\ud800", "NVFP4", "../x"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """feed: takes one input, and raises nothing but `declared`. bound_bytes: beyond this and 32 times the input nothing
    may be allocated."""

    name: str
    seeds: Sequence[bytes]
    feed: Callable[[bytes], object]
    declared: tuple[type[Exception], ...]
    bound_bytes: int = 2 << 20

    def input(self, number: int) -> bytes:
        """The input of this number."""
        return mutated(random.Random(f"{self.name} {number}"), self.seeds)

    def run(self, numbers: Iterable[int]) -> int:
        """Feed these inputs; returns how many were taken. AssertionError names the first that is not handled."""
        taken = 0
        tracemalloc.start(1)
        try:
            for number in numbers:
                data = self.input(number)
                tracemalloc.reset_peak()
                before = tracemalloc.get_traced_memory()[0]
                try:
                    self.feed(data)
                    taken += 1
                except self.declared:
                    pass
                except Exception as error:
                    raise AssertionError(f"input {number} of {self.name}, {data[:80]!r}: {error!r}") from error
                grown = tracemalloc.get_traced_memory()[1] - before
                assert grown <= self.bound_bytes + 32 * len(data), f"input {number} of {self.name}: {grown} bytes"
        finally:
            tracemalloc.stop()
        return taken


def mutated(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """A valid input with one to four things wrong, seldom none, seldom noise; JSON also as a tree."""
    data = bytearray(rng.choice(seeds))
    if data[:1] == b"{" and rng.random() < 0.5:
        return json.dumps(_grown(rng, json.loads(bytes(data)))).encode("utf-8", "surrogatepass")
    if rng.random() < 0.05:
        return rng.randbytes(rng.randrange(200))
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        stop = min(len(data), at + rng.choice((1, 1, 2, 8, 64)))
        piece = bytes(data[at:stop])
        data[at:stop] = rng.choice(
            [
                bytes(each ^ 1 << rng.randrange(8) for each in piece),
                b"",
                piece * 2,
                rng.randbytes(len(piece)),
                rng.choice(EDGES),
                bytes(rng.choice(seeds)[at:stop]),
            ]
        )
        if rng.random() < 0.1:
            del data[rng.randrange(len(data) + 1) :]
    return bytes(data)


def _grown(rng: random.Random, value: object) -> object:
    """The same JSON with some values replaced, dropped or put elsewhere."""
    if rng.random() < 0.1:
        return rng.choice(VALUES)
    if isinstance(value, dict):
        return {key: _grown(rng, each) for key, each in value.items() if rng.random() > 0.05}
    if isinstance(value, list):
        return [_grown(rng, each) for each in value if rng.random() > 0.1]
    return value


# ---------------------------------------------------------------- the targets


def targets(scratch: Path, rig: Rig) -> list[Target]:
    """All of them. scratch: for files. rig: ranks with an open transaction over all tensors, which chunks are for."""
    return [_chunks(rig), _manifests(rig), _deltas(), _configs(scratch), _headers(scratch)]


def _chunks(rig: Rig) -> Target:
    receiver = rig.receivers[0]
    content = random_content(rig.specs, seed=7)
    seeds = [pb.StageRequest(open=pb.StageOpen(transaction=1, epoch=2, ticket=b"x" * 32)).SerializeToString()]
    for position in (0, 1, 3, len(rig.specs) - 1):
        row = rig.specs[position].row_bytes
        data = content[rig.specs[position].name].tobytes()[:row]
        columns = np.array([position], np.uint32), np.array([0], np.uint64), np.array([len(data)], np.uint32)
        seeds.append(encode_chunk(position + 1, *columns, [memoryview(data)]))

    def feed(data: bytes) -> None:
        request = decode_request(data)
        if not isinstance(request, StageOpen):
            receiver.stage(request, transaction=rig.num)

    return Target(name="chunks", seeds=seeds, feed=feed, declared=(TransferError, ManifestError))


def _manifests(rig: Rig) -> Target:
    manifest = rig.receivers[0].manifest
    whole = to_manifest_proto(manifest)
    named = pb.Manifest()
    named.CopyFrom(whole)
    parameter = pb.ParameterSpec(name="d.weight", shape=[200, 80], format="nvfp4", tensors=[2, 3, 4, 5], aliases=["e"])
    named.parameters.append(parameter)

    def feed(data: bytes) -> None:
        message = pb.Manifest.FromString(data)
        try:
            from_manifest_proto(message)
        except (TransferError, ManifestError):
            check_push(manifest, [from_spec_proto(spec) for spec in message.tensors])

    seeds = [whole.SerializeToString(), named.SerializeToString()]
    declared = (TransferError, ManifestError, DecodeError)
    return Target(name="manifests", seeds=seeds, feed=feed, declared=declared, bound_bytes=8 << 20)


def _deltas() -> Target:
    """An input is the four announced counts and the blob."""
    specs = [TensorSpec(name=f"t{i}", dtype="U8", shape=(16, 8 * (i + 1))) for i in range(3)]
    row_start, row_stop = np.array([0, 4, 0]), np.array([16, 12, 16])
    values = np.random.default_rng(3).integers(0, 255, 128, np.uint8)
    seeds = []
    for count in (0, 1, 3):
        patches = [
            Patch(tensor=0, first=0, stop=128, positions=np.array([3, 7, 90]), values=values[:3]),
            Patch(tensor=1, first=64, stop=192, positions=None, values=values),
            Patch(tensor=2, first=0, stop=384, positions=np.array([383]), values=np.array([9], np.uint8)),
        ][:count]
        blob, size = pack(patches)
        announced = (size.num_bytes, size.num_segments, size.num_changes, size.dense_bytes)
        seeds.append(struct.pack("<4Q", *announced) + blob)

    def feed(data: bytes) -> None:
        if len(data) < 32:
            return
        counts = struct.unpack("<4Q", data[:32])
        # The planner refuses at Begin what does not fit; a blob of another length than announced is refused first.
        size = BlobSize(
            num_bytes=len(data) - 32, num_segments=counts[1], num_changes=counts[2], dense_bytes=counts[3]
        )
        if size.unpacked_bytes <= DELTA_BUDGET:
            unpack(memoryview(data)[32:], size, specs, row_start, row_stop)

    return Target(name="deltas", seeds=seeds, feed=feed, declared=(TransferError,), bound_bytes=8 * DELTA_BUDGET)


def _configs(scratch: Path) -> Target:
    """config.json, hf_quant_config.json and a shard index beside valid weights."""
    folder = scratch / "configs"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(_weights())
    flat = {"quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head", "*.norm"], "swap_weight_nibbles": False}
    flat["config_groups"] = {"g": {"weights": {"group_size": 16}}}
    nested = {"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["a*"], "kv_cache_quant_algo": None}}
    index = {"weight_map": {"a.weight": "model.safetensors"}, "metadata": {"total_size": 4}}
    names = ("config.json", "hf_quant_config.json", "model.safetensors.index.json")
    seeds = [json.dumps(each).encode() for each in ({"quantization_config": flat}, nested, index)]

    def feed(data: bytes) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)
        name = names[1] if b"exclude_modules" in data else names[2] if b"weight_map" in data else names[0]
        (folder / name).write_bytes(data)
        with Checkpoint(folder) as checkpoint:
            checkpoint.names()

    return Target(name="configs", seeds=seeds, feed=feed, declared=(CheckpointError,))


def _headers(scratch: Path) -> Target:
    folder = scratch / "headers"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")

    def feed(data: bytes) -> None:
        (folder / "model.safetensors").unlink(missing_ok=True)  # a mapped file must not shrink
        (folder / "model.safetensors").write_bytes(data)
        with Checkpoint(folder) as checkpoint:
            for name in checkpoint.names():
                checkpoint.spec(name)
                checkpoint.rows(name)

    return Target(name="headers", seeds=[_weights()], feed=feed, declared=(CheckpointError,))


def _weights() -> bytes:
    tensors = {
        "a.weight": torch.zeros((4, 8), dtype=torch.uint8),
        "a.weight_scale": torch.zeros((4, 1), dtype=torch.float8_e4m3fn),
        "a.weight_scale_2": torch.ones(()),
        "n.weight": torch.ones(4, dtype=torch.bfloat16),
    }
    return save(tensors, {"format": "pt"})
