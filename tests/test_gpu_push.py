"""A push of a model on a GPU is encoded there and goes from GPU memory to GPU memory: its bytes are the host's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.device_service import Shape, served, weights_of
from weight_update.client import Pusher, PushReport

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# No multiple of the kernels' tiles anywhere; hidden needs padding.
SHAPE = Shape(layers=2, experts=3, hidden=192, inter=64, query=128, key=64, head=50, vocab=301)
Weights = list[tuple[str, Tensor]]


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """One whose storages are on a GPU, one whose are on the host."""
    last = f"cuda:{torch.cuda.device_count() - 1}"
    folders = tmp_path_factory.mktemp("gpu"), tmp_path_factory.mktemp("host")
    with served(SHAPE, last, folders[0]) as gpu, served(SHAPE, "cpu", folders[1]) as host:
        yield gpu, host


def on(device: str, weights: Weights) -> Weights:
    return [(name, tensor.to(device)) for name, tensor in weights]


def nudged(weights: Weights, seed: int, count: int = 5) -> Weights:
    """Some weights of every third tensor a little larger, and one so much that its scale changes."""
    generator = torch.Generator().manual_seed(seed)
    found = [(name, tensor.clone()) for name, tensor in weights]
    for i in range(seed % 3, len(found), 3):
        flat = found[i][1].view(-1)
        at = torch.randint(0, len(flat), (count,), generator=generator)
        flat[at] += flat[at].abs() * 0.5 + 0.001
    found[7][1].view(-1)[3] = 0.3
    return found


def push_both(services: tuple[Any, Any], pushers: tuple[Pusher, Pusher], weights: Weights) -> PushReport:
    gpu, host = services
    report = pushers[0].push(on("cuda:0", weights))
    reference = pushers[1].push(weights)
    assert report.digest == reference.digest and report.digest_verified
    assert gpu.ask("storages") == host.ask("storages")
    return report


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a group of NCCL needs two GPUs")


@pytest.mark.parametrize(
    "transport", ["cuda-ipc", pytest.param("nccl", marks=TWO_GPUS), "shared-memory", "grpc"]
)
@pytest.mark.parametrize("keep", ["cuda", "cpu"])
def test_bytes_are_those_of_a_push_from_the_host(services: tuple[Any, Any], transport: str, keep: str) -> None:
    gpu, host = services
    keep = "cuda:0" if keep == "cuda" else keep
    pushers = Pusher(gpu.address, transport=transport, keep=keep), Pusher(host.address)
    addresses = gpu.ask("addresses")
    weights = weights_of(SHAPE, "cpu", seed=1)
    report = push_both(services, pushers, weights)
    assert report.mode == "full" and transport in report.transports[0]
    for seed in range(2, 5):
        weights = nudged(weights, seed)
        report = push_both(services, pushers, weights)
        assert report.mode == "delta", report.reason
    report = push_both(services, pushers, weights_of(SHAPE, "cpu", seed=9))
    assert report.mode == "full"  # nearly everything changed
    report = push_both(services, pushers, nudged(weights_of(SHAPE, "cpu", seed=9), 10))
    assert report.mode == "delta"
    assert gpu.ask("addresses") == addresses
    for pusher in pushers:
        pusher.close()


# Whole pieces of 1,024 weights everywhere: codes are compared as they are encoded.
NOTED = Shape(layers=3, experts=4, hidden=256, inter=128, query=256, key=128, head=64, vocab=320)


def test_what_changed_is_found_as_it_is_encoded(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over many steps; more than is noted in one place, and a scale that no batch takes, go through scratch."""
    monkeypatch.setattr("weight_update.forms.STEP_BYTES", 300_000)
    folders = tmp_path_factory.mktemp("gpu"), tmp_path_factory.mktemp("host")
    with served(NOTED, "cuda:0", folders[0]) as gpu, served(NOTED, "cpu", folders[1]) as host:
        pushers = Pusher(gpu.address, keep="cuda:0"), Pusher(host.address)
        weights = weights_of(NOTED, "cpu", seed=1)
        live = on("cuda:0", weights)
        assert pushers[0].push(live).digest == pushers[1].push(weights).digest

        def push() -> dict[bool, int]:
            for (_, target), (_, source) in zip(live, weights, strict=True):
                target.copy_(source)
            report = pushers[0].push(live)
            assert report.mode == "delta", report.reason
            assert report.digest == pushers[1].push(weights).digest
            assert gpu.ask("storages") == host.ask("storages")
            comparisons = pushers[0]._retained._comparisons
            assert comparisons is not None
            found = [direct for _, direct in comparisons._tables]
            return {each: found.count(each) for each in (True, False)}

        for seed in range(3):
            for _, tensor in weights[seed::3]:
                tensor.view(-1)[seed :: 1 + tensor.numel() // 5].neg_()  # no scale moves
            tables = push()
        assert tables[True] > 3 and not tables[False]
        weights[33][1].view(-1)[:1024].neg_()
        assert push()[False] == 1
        weights[60][1].mul_(2.0**-120)
        assert push()[False] == 2
        weights[60][1].mul_(2.0**120)
        push()
        for pusher in pushers:
            pusher.close()


def test_what_no_kernel_takes_at_once_goes_along(services: tuple[Any, Any]) -> None:
    """FP32 masters, rows that are no contiguous memory, tensors of the host, a scope of some tensors."""
    gpu, host = services
    pushers = Pusher(gpu.address, keep="cuda:0"), Pusher(host.address)
    weights = weights_of(SHAPE, "cpu", seed=20)
    forms = (lambda each: each.float(), lambda each: each.t().contiguous().t() if each.ndim == 2 else each)
    mixed = [(name, forms[i % 2](tensor) if i % 4 < 2 else tensor) for i, (name, tensor) in enumerate(weights)]
    moved = [(name, tensor if i % 7 == 0 else tensor.to("cuda:0")) for i, (name, tensor) in enumerate(mixed)]
    assert pushers[0].push(moved).digest == pushers[1].push(mixed).digest
    assert gpu.ask("storages") == host.ask("storages")
    scope = ["model.layers.1.*"]
    changed = nudged(weights, 21)
    reports = [
        pusher.push(each, scope) for pusher, each in zip(pushers, (on("cuda:0", changed), changed), strict=True)
    ]
    assert reports[0].digest == reports[1].digest
    assert gpu.ask("storages") == host.ask("storages")
    push_both(services, pushers, weights)
    for pusher in pushers:
        pusher.close()


def test_weights_that_are_not_finite_are_named(services: tuple[Any, Any]) -> None:
    weights = on("cuda:0", weights_of(SHAPE, "cpu", seed=30))
    name, tensor = next(each for each in weights if each[0].endswith("up_proj.weight"))
    tensor[1, 2] = float("nan")
    pusher = Pusher(services[0].address)
    with pytest.raises(Exception, match=rf"{name}: NaN or Inf at index \[1, 2\]"):
        pusher.push(weights)
    pusher.close()


def test_the_same_tensors_are_planned_once_and_read_anew(services: tuple[Any, Any]) -> None:
    gpu, host = services
    weights = weights_of(SHAPE, "cpu", seed=40)
    live = on("cuda:0", weights)
    pushers = Pusher(gpu.address, keep="cuda:0"), Pusher(host.address)
    pushers[0].push(live)
    plan = pushers[0]._retained._planned
    for seed in (41, 42):
        weights = nudged(weights, seed)
        for (_, target), (_, source) in zip(live, weights, strict=True):
            target.copy_(source)
        assert pushers[0].push(live).digest == pushers[1].push(weights).digest
        assert gpu.ask("storages") == host.ask("storages")
    assert plan is not None and pushers[0]._retained._planned is plan
    for pusher in pushers:
        pusher.close()
