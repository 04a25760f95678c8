"""Experts that move between slots, and that lie in several: part of the transaction, byte for byte as a cold load.

What the storages must hold comes from a model without maps that has an expert for every slot; it knows nothing of maps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from quant.expert_maps import ExpertMaps
from quant.models import ModelError, build_model
from quant.modules import QuantExperts, decode_all
from tests.local import LocalService, cold, local_service
from tests.tiny import save, tiny_llama, tiny_qwen3_moe
from weight_update.client import Pusher
from weight_update.errors import ManifestError, VersionError, WeightUpdateError
from weight_update.transport import call, connect

LAYOUTS = ("trtllm", "cutlass")
MODULE = "model.layers.0.mlp.experts"
NUM_EXPERTS, REDUNDANT = 4, 2
SLOTS = NUM_EXPERTS + REDUNDANT
FIRST = [0, 1, 2, 3, 0, 1]  # dealt out in turn
Map = Sequence[int]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_qwen3_moe(seed=0), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def service(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    with local_service(model_dir, tmp_path_factory.mktemp("state"), LAYOUTS, redundant=REDUNDANT) as running:
        yield running


@pytest.fixture
def pusher(service: LocalService) -> Iterator[Pusher]:
    each = Pusher(service.address)
    yield each
    each.close()


@pytest.fixture
def control(service: LocalService) -> Iterator[pb_grpc.ControlStub]:
    with connect(service.address) as channel:
        yield pb_grpc.ControlStub(channel)


def expected(model: nn.Module, held: Map, directory: Path) -> list[dict[str, bytes]]:
    """The storages of both replicas: every slot an expert of its own in a model without maps."""
    wide = copy.deepcopy(model)
    experts = wide.model.layers[0].mlp.experts  # type: ignore[index, union-attr]
    for name in ("gate_up_proj", "down_proj"):
        stacked = getattr(experts, name)
        setattr(experts, name, nn.Parameter(torch.stack([stacked[expert] for expert in held])))
    wide.config.num_experts = len(held)  # type: ignore[union-attr]
    gate = wide.model.layers[0].mlp.gate  # type: ignore[index, union-attr]
    gate.weight = nn.Parameter(gate.weight[:1].repeat(len(held), 1))
    save(wide, directory / "wide")
    save(model, directory / "narrow")
    found = []
    for layout in LAYOUTS:
        wide_bytes, narrow_bytes = (cold(directory / each, layout)[1].storage_bytes() for each in ("wide", "narrow"))
        experts_only = {name: data for name, data in wide_bytes.items() if name.startswith(MODULE)}
        found.append({**narrow_bytes, **experts_only, f"{MODULE}.physical_to_logical": np.array(held, "<i4").tobytes()})
    return found


def maps_of(control: pb_grpc.ControlStub) -> list[int]:
    (each,) = control.Describe(pb.DescribeRequest()).expert_maps
    assert each.module == MODULE
    return list(each.physical_to_logical)


def digest_of(control: pb_grpc.ControlStub) -> str:
    return str(control.Status(pb.StatusRequest()).expert_map_digest)


def mixed(base: nn.Module, other: nn.Module, names: Sequence[str]) -> nn.Module:
    """The base with these parameters of the other."""
    made = copy.deepcopy(base)
    state = made.state_dict()
    for name in names:
        state[name].copy_(other.state_dict()[name])
    return made


def test_a_map_lands_with_its_weights_and_goes_back_with_them(
    service: LocalService, pusher: Pusher, control: pb_grpc.ControlStub, tmp_path: Path
) -> None:
    addresses = service.addresses()
    first = pusher.push(tiny_qwen3_moe(seed=1))
    assert maps_of(control) == FIRST
    before, digest = service.bytes(), digest_of(control)
    assert before == expected(tiny_qwen3_moe(seed=1), FIRST, tmp_path / "a")
    moved = [3, 3, 1, 0, 2, 3]
    report = pusher.push(tiny_qwen3_moe(seed=2), expert_map={MODULE: moved})
    assert report.digest_verified and maps_of(control) == moved and digest_of(control) != digest
    assert service.bytes() == expected(tiny_qwen3_moe(seed=2), moved, tmp_path / "b")
    call(control.Rollback, pb.RollbackRequest(version=first.version))
    assert service.bytes() == before and maps_of(control) == FIRST and digest_of(control) == digest
    assert service.addresses() == addresses
