"""The receiver as a library: any named storages, memory as planned, and our own models with FSDP2."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from quant.formats import FORMATS, TensorSpec
from quant.layouts import LAYOUTS, Derived, Placement, place_row_major
from quant.modules import QuantLinear, quantized_modules
from quant.steps import Located
from sharding.fsdp import reshard_all, shard_model
from tests import reference
from tests.rig import LAYOUT_PAIRS, NUM_TENSORS, Rig, chunk_of, chunks_for, random_content
from weight_update.digest import digest_rows, name_key
from weight_update.errors import LayoutError, PlanError
from weight_update.receiver import Receiver, State

# ---------------------------------------------------------------- memory


def resident_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def peak_above(run: Callable[[], object]) -> int:
    """How far resident memory rises while `run` runs (Linux: the high-water mark can be reset)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    run()
    return resident_bytes("VmHWM") - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads the high-water mark of resident memory")
def test_measured_memory_is_at_most_planned_and_an_install_takes_none() -> None:
    spec = TensorSpec(name="w", dtype="BF16", shape=(20_000, 1000))
    small = TensorSpec(name="s", dtype="BF16", shape=(1000, 10))
    storages = {each.name: torch.ones(each.shape, dtype=torch.bfloat16) for each in (spec, small)}
    receiver = Receiver(storages, [place_row_major(each, each.name) for each in (spec, small)])
    data = np.random.default_rng(0).integers(0, 256, spec.num_bytes, np.uint8).tobytes()
    chunks = [chunk_of([(0, at, data[at : at + (2 << 20)])]) for at in range(0, len(data), 2 << 20)]
    rest = chunk_of([(0, 0, bytes(small.num_bytes))])
    receiver.begin(1, 1, 0, [1])
    receiver.stage(rest)
    receiver.prepare(), receiver.install(), receiver.publish()  # compiles kernels, and is small
    planned = []
    measured = {"stage": 0, "install": 0}

    def stage() -> None:
        planned.append(receiver.begin(2, receiver.version + 1, receiver.version, [0]))
        for chunk in chunks:
            receiver.stage(chunk)
        receiver.prepare()

    measured["stage"] = peak_above(stage)
    measured["install"] = peak_above(receiver.install)
    receiver.publish()
    again = peak_above(lambda: (stage(), receiver.install(), receiver.publish()))
    plan = planned[0]
    assert plan.staging_bytes == plan.undo_bytes == spec.num_bytes
    assert spec.num_bytes * 1.9 < measured["stage"] <= plan.peak_bytes  # the floor shows that this measures
    assert measured["install"] < 2 << 20
    assert again < 4 << 20  # the arena is reused
    assert storages["w"].view(torch.uint8).numpy().tobytes() == data


def test_a_push_above_the_budget_is_refused_before_anything_is_reserved() -> None:
    rig = Rig(LAYOUT_PAIRS[2], budget=9_500_000)
    receiver = rig.receivers[0]
    with pytest.raises(PlanError, match=r"needs \d+ bytes above idle .* the budget is 9500000; push fewer tensors"):
        receiver.begin(1, 1, 0, range(NUM_TENSORS))
    assert receiver.state is State.IDLE
    plan = receiver.begin(1, 1, 0, [0])
    assert plan.peak_bytes == plan.staging_bytes + plan.undo_bytes + plan.scratch_bytes <= 9_500_000


def test_a_partial_push_saves_only_the_units_that_it_touches() -> None:
    rig = Rig(("trtllm_linear", "trtllm_moe"))
    names = [spec.name for spec in rig.specs]
    storage = rig.storages[0]
    plan = rig.receivers[0].begin(1, 1, 0, [names.index("x.1.up_proj.weight")])
    assert plan.undo_bytes == storage["x.w13_weight"][0].numel()
    rig.abort()
    plan = rig.receivers[0].begin(2, 2, 0, [names.index("d.weight_scale_2")])
    assert plan.undo_bytes == 4 + 4  # itself and alpha
    assert plan.staging_bytes == 64


# ---------------------------------------------------------------- a library


def test_a_bare_module_is_filled_without_ray_grpc_numba_or_our_model_classes() -> None:
    program = """
import sys
for name in ("ray", "grpc", "numba", "transformers", "quant.models", "quant.modules", "service"):
    sys.modules[name] = None
import numpy as np, torch
from torch import nn
torch.set_num_threads(1)
from quant.formats import TensorSpec, dtype_name
from quant.layouts import Derived, place_row_major
from weight_update.chunks import decode_request, encode_chunk
from weight_update.digest import digest_rows, name_key
from weight_update.receiver import Receiver

model = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)).requires_grad_(False)
held = dict(model.named_parameters())
specs = [TensorSpec(name=n, dtype=dtype_name(p.dtype), shape=tuple(p.shape)) for n, p in held.items()]
receiver = Receiver(held, [place_row_major(spec, spec.name) for spec in specs])
before = receiver.storage_addresses()
new = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)).requires_grad_(False)
wanted = [p.reshape(len(p), -1).view(torch.uint8) for p in new.parameters()]
receiver.begin(1, 1, 0, range(len(specs)))
for i, rows in enumerate(wanted):
    piece = memoryview(rows.numpy().reshape(-1))
    arrays = np.array([i], np.uint32), np.array([0], np.uint64), np.array([len(piece)], np.uint32)
    receiver.stage(decode_request(encode_chunk(i, *arrays, [piece])))
digests = [digest_rows(name_key(spec.name), rows, 0) for spec, rows in zip(specs, wanted)]
assert receiver.prepare().tolist() == receiver.install().tolist() == [list(d) for d in digests]
receiver.publish()
x = torch.randn(2, 8)
assert torch.equal(model(x), new(x)) and receiver.storage_addresses() == before and receiver.version == 1
print("filled")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.returncode) == ("filled\n", 0), done.stderr


def test_named_tensor_parallel_slices_are_filled() -> None:
    spec = TensorSpec(name="w", dtype="F32", shape=(12, 4))
    slices = [torch.zeros(4, 4) for _ in range(3)]
    value = torch.randn(12, 4)
    total = np.zeros((1, 2), np.uint64)
    for rank, part in enumerate(slices):
        receiver = Receiver({"w": part}, [place_row_major(spec, "w")], shards={"w": (4 * rank, 4 * rank + 4)})
        receiver.begin(1, 1, 0, [0])
        data = value[4 * rank : 4 * rank + 4].numpy().tobytes()
        receiver.stage(chunk_of([(0, 64 * rank, data)]))
        receiver.prepare()
        total += receiver.install()
        receiver.publish()
    assert torch.equal(torch.cat(slices), value)
    assert tuple(total[0].tolist()) == digest_rows(name_key("w"), value.view(torch.uint8), 0)


def test_a_derived_value_of_a_derived_value_follows() -> None:
    spec = TensorSpec(name="s", dtype="F32", shape=(1,))
    storages = {"s": torch.zeros(1), "double": torch.zeros(1), "quadruple": torch.zeros(1)}
    derived = [
        Derived(name="double", inputs=("s",), function=lambda s: 2 * s, shape=(1,)),
        Derived(name="quadruple", inputs=("double",), function=lambda d: 2 * d, shape=(1,)),
    ]
    receiver = Receiver(storages, [place_row_major(spec, "s")], derived)
    receiver.begin(1, 1, 0, [0])
    receiver.stage(chunk_of([(0, 0, np.float32(3).tobytes())]))
    receiver.prepare()
    receiver.install()
    assert (storages["double"].item(), storages["quadruple"].item()) == (6, 12)
    receiver.undo()
    assert (storages["double"].item(), storages["quadruple"].item()) == (0, 0)


@pytest.mark.parametrize(
    ("row_bytes", "unit_bytes", "byte"),
    [(8, 24, 8), (8, 24, 23), (40, 52, 51), (5, 13, 5), (1024, 3 << 20, (3 << 20) - 1), (1024, 3 << 20, 2_000_001)],
)
def test_a_padding_byte_is_found_wherever_it_is(row_bytes: int, unit_bytes: int, byte: int) -> None:
    spec = TensorSpec(name="w", dtype="U8", shape=(3, row_bytes))
    located = Located(
        rows=np.arange(3) * unit_bytes,
        runs=np.zeros(1, np.int64),
        run_bytes=row_bytes,
        dims=(3, unit_bytes),
    )
    placement = Placement(tensor=spec, storage="w", origin=0, located=located, unit_bytes=unit_bytes)
    storage = torch.zeros(3, unit_bytes, dtype=torch.uint8)
    receiver = Receiver({"w": storage}, [placement])

    def install(version: int) -> None:
        receiver.begin(version, version, receiver.version, [0])
        receiver.stage(chunk_of([(0, 0, b"\xff" * spec.num_bytes)]))
        receiver.prepare()
        receiver.install()
        receiver.publish()

    install(1)
    storage[2, byte] = 7
    with pytest.raises(LayoutError, match=rf"w: padding byte {byte} of unit 2 of this rank is 7, expected 0"):
        install(2)
    receiver.abort()
    storage[2, byte] = 0
    install(3)


def test_module_parameters_replaced_behind_the_receiver_are_seen_by_its_lookup() -> None:
    module = nn.Linear(4, 4).requires_grad_(False)
    specs = [TensorSpec(name=name, dtype="F32", shape=tuple(p.shape)) for name, p in module.named_parameters()]
    receiver = Receiver(
        dict(module.named_parameters()),
        [place_row_major(spec, spec.name) for spec in specs],
        live=lambda: dict(module.named_parameters()),
    )
    receiver.audit()
    kept, module.weight = module.weight, nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(LayoutError, match="weight: data_ptr was"):
        receiver.audit()
    del kept


# ---------------------------------------------------------------- our own modules, sharded by FSDP2


class Block(nn.Module):
    """A quantized linear between norms, as a decoder layer has them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        self.proj = QuantLinear(64, 192, False, FORMATS["nvfp4"], LAYOUTS["trtllm_linear"], "layers.0.proj")

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x * self.norm)  # type: ignore[no-any-return]


class Model(nn.Module):
    """One layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block()])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)  # type: ignore[no-any-return]


@pytest.fixture
def gloo(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_sharded_quantized_model_is_filled_while_it_is_sharded(gloo: None) -> None:
    model = Model()
    shard_model(model, init_device_mesh("cpu", (1,)), quantized=quantized_modules(model))
    receiver = Receiver.from_module(model)
    addresses = receiver.storage_addresses()
    tensors = range(len(receiver.manifest.tensors))
    for version, seed in ((1, 5), (2, 6)):
        content = random_content(receiver.manifest.tensors, seed)
        receiver.begin(version, version, version - 1, tensors)
        for chunk in chunks_for(receiver, tensors, content, seed):
            receiver.stage(chunk)
        assert np.array_equal(receiver.prepare(), receiver.install())
        receiver.publish()
        stored = receiver.storage_bytes()
        parts = content["layers.0.proj.weight"], content["layers.0.proj.weight_scale"]
        weight, scales = reference.linear_storage("trtllm_linear", *parts)
        assert stored["layers.0.proj.weight"] == weight.tobytes()
        assert stored["layers.0.proj.weight_scale"] == scales.tobytes()
        assert stored["layers.0.norm"] == content["layers.0.norm"].tobytes()
    assert receiver.storage_addresses() == addresses
    model.layers[0].unshard()  # type: ignore[operator]
    with pytest.raises(LayoutError, match="data_ptr was"):
        receiver.audit()  # what is gathered hides the shards, and would go stale
    reshard_all(model)
    receiver.audit()
