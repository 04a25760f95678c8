"""Ranks over named storages: a dense linear, experts, a norm and an embedding, and what their bytes must be.

The expected bytes come from tests/reference.py and numpy; they share no code with what they are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quant.formats import FORMATS, TensorSpec
from quant.layouts import LAYOUTS, Derived, Placement, place_row_major, plan_experts, plan_linear
from tests import reference
from weight_update.chunks import Chunk, decode_request, encode_chunk
from weight_update.digest import Digests, digest_rows, name_key
from weight_update.receiver import Receiver

N, K = 200, 80  # two tiles, the second not full; five scale columns, padded to eight
E, H, I = 3, 192, 64  # noqa: E741 - hidden is no multiple of 128: trtllm pads it to 256
LAYOUT_PAIRS = (("plain", "plain"), ("cutlass_linear", "cutlass_moe"), ("trtllm_linear", "trtllm_moe"))
PLAIN = (
    TensorSpec(name="norm.weight", dtype="BF16", shape=(50,)),
    TensorSpec(name="embed.weight", dtype="BF16", shape=(30, 24)),
)
NUM_TENSORS = len(PLAIN) + 4 + 3 * 4 * E

Bytes = NDArray[np.uint8]
Content = dict[str, Bytes]  # tensor name -> [rows, row_bytes]


def random_content(specs: Sequence[TensorSpec], seed: int) -> Content:
    """Random bytes; scales that derived values come from are numbers."""
    rng = np.random.default_rng(seed)
    content = {}
    for spec in specs:
        data = rng.integers(0, 256, (spec.num_rows, spec.row_bytes), np.uint8)
        if spec.dtype == "F32":
            data = rng.uniform(0.1, 9, (1, 1)).astype(np.float32).view(np.uint8)
        content[spec.name] = data
    return content


def expected_storages(layouts: tuple[str, str], content: Content) -> dict[str, bytes]:
    """Every storage, whole, as a cold load must leave it."""
    storages = {spec.name: content[spec.name].tobytes() for spec in PLAIN}
    return storages | _expected_linear(layouts[0], content) | _expected_experts(layouts[1], content)


def _f32(content: Content, name: str) -> np.float32:
    return np.float32(content[name].view(np.float32)[0, 0])


def _expected_linear(layout: str, content: Content) -> dict[str, bytes]:
    weight, scales = reference.linear_storage(layout, content["d.weight"], content["d.weight_scale"])
    scale_2, input_scale = _f32(content, "d.weight_scale_2"), _f32(content, "d.input_scale")
    return {
        "d.weight": weight.tobytes(),
        "d.weight_scale": scales.tobytes(),
        "d.weight_scale_2": scale_2.tobytes(),
        "d.input_scale": input_scale.tobytes(),
        "d.alpha": (input_scale * scale_2).tobytes(),
        "d.input_scale_inv": (np.float32(1) / input_scale).tobytes(),
    }


def _expected_experts(layout: str, content: Content) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for suffix in ("weight", "weight_scale"):
        parts = [[content[f"x.{e}.{p}_proj.{suffix}"] for p in ("gate", "up", "down")] for e in range(E)]
        stored = [reference.expert_storage(layout, *part, scales=suffix == "weight_scale") for part in parts]
        found[f"x.w13_{suffix}"] = b"".join(w13.tobytes() for w13, _ in stored)
        found[f"x.w2_{suffix}"] = b"".join(w2.tobytes() for _, w2 in stored)
    scalars = {
        (p, suffix): np.array([_f32(content, f"x.{e}.{p}_proj.{suffix}") for e in range(E)])
        for p in ("gate", "up", "down")
        for suffix in ("weight_scale_2", "input_scale")
    }
    for suffix in ("weight_scale_2", "input_scale"):
        found[f"x.w13_{suffix}"] = np.stack([scalars["gate", suffix], scalars["up", suffix]], axis=1).tobytes()
        found[f"x.w2_{suffix}"] = scalars["down", suffix].tobytes()
    a13 = max(scalars["gate", "input_scale"].max(), scalars["up", "input_scale"].max())
    a2 = scalars["down", "input_scale"].max()
    one, gate, up = np.float32(1), scalars["gate", "weight_scale_2"], scalars["up", "weight_scale_2"]
    derived = {
        "g1_alphas": a13 * gate,
        "g1_alphas_up": a13 * up,
        "g2_alphas": a2 * scalars["down", "weight_scale_2"],
        "g1_scale_c": one / a2 * (a13 * up),
        "w13_input_scale_quant": one / a13,
        "w2_input_scale_quant": one / a2,
    }
    consumed = {name: value for name, value in derived.items() if name in LAYOUTS[layout].derived}
    return found | {f"x.{name}": value.astype(np.float32).tobytes() for name, value in consumed.items()}


def shard_of(num_units: int, rank: int, world: int) -> tuple[int, int]:
    """torch.chunk's split."""
    parts = torch.arange(num_units).chunk(world)
    return (int(parts[rank][0]), int(parts[rank][-1]) + 1) if rank < len(parts) else (num_units, num_units)


@dataclass
class Rig:
    """One receiver a rank; `committed` is what they must hold."""

    layouts: tuple[str, str]
    world: int = 1
    extra: Sequence[Callable[[Mapping[str, Tensor]], Derived]] = ()
    budget: int | None = None
    storages: list[dict[str, Tensor]] = field(default_factory=list)
    receivers: list[Receiver] = field(default_factory=list)

    def __post_init__(self) -> None:
        nvfp4 = FORMATS["nvfp4"]
        plans = (
            plan_linear(LAYOUTS[self.layouts[0]], nvfp4, "d", N, K),
            plan_experts(LAYOUTS[self.layouts[1]], nvfp4, "x", E, H, I),
        )
        placements: list[Placement] = [place_row_major(spec, spec.name) for spec in PLAIN]
        shapes = {spec.name: (spec.shape, torch.bfloat16) for spec in PLAIN}
        derived: list[Derived] = []
        for plan in plans:
            placements += plan.placements
            derived += plan.derived
            shapes |= {storage.name: (storage.shape, storage.dtype) for storage in plan.storages}
            shapes |= {each.name: (each.shape, torch.float32) for each in plan.derived}
        for rank in range(self.world):
            shards = {name: shard_of(shape[0], rank, self.world) for name, (shape, _) in shapes.items()}
            storages = {
                name: torch.zeros((shards[name][1] - shards[name][0], *shape[1:]), dtype=dtype)
                for name, (shape, dtype) in shapes.items()
            }
            more = [make(storages) for make in self.extra]
            storages |= {each.name: torch.zeros(each.shape) for each in more}
            self.storages.append(storages)
            self.receivers.append(
                Receiver(storages, placements, [*derived, *more], shards=shards, memory_budget_bytes=self.budget)
            )
        self.shapes = {name: shape for name, (shape, _) in shapes.items()}
        self.specs = self.receivers[0].manifest.tensors
        self.num = 0
        self.committed = {spec.name: np.zeros((spec.num_rows, spec.row_bytes), np.uint8) for spec in self.specs}

    # -- steps, on every rank

    def begin(self, tensors: Sequence[int]) -> None:
        self.num += 1
        version = self.receivers[0].version
        for receiver in self.receivers:
            receiver.begin(self.num, version + self.num, version, np.array(tensors))

    def stage(self, tensors: Sequence[int], content: Content, seed: int = 0) -> None:
        for receiver in self.receivers:
            for chunk in chunks_for(receiver, tensors, content, seed):
                receiver.stage(chunk, transaction=self.num)

    def prepare(self) -> Digests:
        return np.sum([receiver.prepare() for receiver in self.receivers], axis=0, dtype=np.uint64)

    def install(self) -> Digests:
        return np.sum([receiver.install() for receiver in self.receivers], axis=0, dtype=np.uint64)

    def publish(self, tensors: Sequence[int], content: Content) -> None:
        for receiver in self.receivers:
            receiver.publish()
        self.committed |= {self.specs[i].name: content[self.specs[i].name] for i in tensors}

    def abort(self) -> None:
        for receiver in self.receivers:
            receiver.abort()

    def push(self, tensors: Sequence[int], content: Content, seed: int = 0) -> None:
        self.begin(tensors)
        self.stage(tensors, content, seed)
        self.prepare()
        self.install()
        self.publish(tensors, content)

    def push_all(self, seed: int) -> None:
        self.push(range(len(self.specs)), random_content(self.specs, seed))

    # -- what must hold

    def expected_digests(self, tensors: Sequence[int], content: Content) -> Digests:
        """Of whole tensors, as the trainer computes them."""
        specs = [self.specs[i] for i in tensors]
        rows = [digest_rows(name_key(spec.name), torch.from_numpy(content[spec.name]), 0) for spec in specs]
        return np.array(rows, np.uint64).reshape(-1, 2)

    def wrong(self) -> list[str]:
        """Storages, by rank, whose bytes are not those of a cold load of what was committed."""
        expected = expected_storages(self.layouts, self.committed)
        found = []
        for rank, storages in enumerate(self.storages):
            for name, shape in self.shapes.items():
                unit_bytes = len(expected[name]) // shape[0]
                start, stop = shard_of(shape[0], rank, self.world)
                want = expected[name][start * unit_bytes : stop * unit_bytes]
                if storages[name].view(-1).view(torch.uint8).numpy().tobytes() != want:
                    found.append(f"rank {rank}: {name}")
        return found

    def addresses(self) -> list[tuple[object, ...]]:
        return [
            (rank, name, each.data_ptr(), each.shape, each.stride(), each.dtype)
            for rank, storages in enumerate(self.storages)
            for name, each in storages.items()
        ]


def chunks_for(receiver: Receiver, tensors: Sequence[int], content: Content, seed: int) -> list[Chunk]:
    """This rank's rows in pieces of random length, in random order, some of them twice."""
    rng = np.random.default_rng(seed)
    pieces: list[tuple[int, int, bytes]] = []
    for position, i in enumerate(tensors):
        row_bytes = receiver.manifest.tensors[i].row_bytes
        first, stop = int(receiver.row_start[i]) * row_bytes, int(receiver.row_stop[i]) * row_bytes
        data = content[receiver.manifest.tensors[i].name].tobytes()
        cuts = sorted({first, stop, *rng.integers(first, stop + 1, 3).tolist()})
        pieces += [(position, a, data[a:b]) for a, b in pairwise(cuts)]
    order = [*rng.permutation(len(pieces)).tolist(), *rng.integers(0, max(1, len(pieces)), 5).tolist()]
    chosen = [pieces[i] for i in order if i < len(pieces)]
    return [chunk_of(chosen[start : start + 7]) for start in range(0, len(chosen), 7)]


def chunk_of(pieces: Sequence[tuple[int, int, bytes]]) -> Chunk:
    """(position in the push, offset, bytes) as they come off the wire."""
    message = encode_chunk(
        1,
        np.array([tensor for tensor, _, _ in pieces], np.uint32),
        np.array([offset for _, offset, _ in pieces], np.uint64),
        np.array([len(data) for _, _, data in pieces], np.uint32),
        [memoryview(data) for _, _, data in pieces],
    )
    chunk = decode_request(message)
    assert isinstance(chunk, Chunk)
    return chunk
