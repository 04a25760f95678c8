"""Experts that move between slots, and that lie in several: part of the transaction, byte for byte as a cold load.

What the storages must hold comes from a model without maps that has an expert for every slot; it knows nothing of maps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
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


def test_a_failure_leaves_map_and_bytes_as_they_were(
    service: LocalService, pusher: Pusher, control: pb_grpc.ControlStub
) -> None:
    pusher.push(tiny_qwen3_moe(seed=3))
    before, held, digest = service.bytes(), maps_of(control), digest_of(control)
    for point in ("prepare", "installed"):
        service.ranks[1].faults.arm(point, "raise")
        with pytest.raises(WeightUpdateError, match="planned failure"):
            pusher.push(tiny_qwen3_moe(seed=4), expert_map={MODULE: [2, 1, 3, 0, 0, 0]})
        assert (service.bytes(), maps_of(control), digest_of(control)) == (before, held, digest)


def test_a_new_map_alone_brings_what_it_moves_and_nothing_else(
    service: LocalService, pusher: Pusher, control: pb_grpc.ControlStub, tmp_path: Path
) -> None:
    model = tiny_qwen3_moe(seed=5)
    pusher.push(model, expert_map={MODULE: FIRST})
    moved = [0, 1, 2, 3, 3, 1]  # one slot
    report = pusher.push(model, scope=["nothing that is there", "model.norm.weight"], expert_map={MODULE: moved})
    brought = [f"{MODULE}.4.{half}_proj.weight" for half in ("gate", "up", "down")]
    assert sorted(report.widened) == sorted([*brought, f"{MODULE}.physical_to_logical"])
    assert service.bytes() == expected(model, moved, tmp_path)
    pusher.push(model)  # the map stays
    assert maps_of(control) == moved and service.bytes() == expected(model, moved, tmp_path)


STEP = st.tuples(
    st.integers(0, 5),  # seed
    st.sampled_from(["all", f"{MODULE}.*", "*norm*", "*gate_up_proj"]),
    st.none() | st.permutations([0, 1, 2, 3, *[0] * REDUNDANT]) | st.permutations([0, 1, 2, 3, 2, 1]),
    st.sampled_from(["land", "land", "fail", "rank is new"]),
)


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEP, min_size=2, max_size=4))
def test_any_sequence_of_pushes_ends_as_a_cold_load(
    service: LocalService, control: pb_grpc.ControlStub, tmp_path_factory: pytest.TempPathFactory, steps: list[Any]
) -> None:
    """Full, partial and delta pushes, with and without a map, some of them failing, by trainers that come and go."""
    held, model = list(FIRST), tiny_qwen3_moe(seed=9)
    trainer = Pusher(service.address)
    trainer.push(model, expert_map={MODULE: held})
    for seed, scope, wish, outcome in steps:
        if outcome == "rank is new":
            trainer.close()
            trainer = Pusher(service.address)
        if outcome == "fail":
            service.ranks[0].faults.arm("installed", "raise")
        # What a map moves comes from the model that is pushed: outside the scope that has to be the old weights.
        names = [name for name in model.state_dict() if scope == "all" or selects(scope, name)]
        pushed = mixed(model, tiny_qwen3_moe(seed), names)
        given_map = None if wish is None else {MODULE: wish}
        if outcome == "fail":
            with pytest.raises(WeightUpdateError, match="planned failure"):
                trainer.push(pushed, scope, expert_map=given_map)
            continue
        report = trainer.push(pushed, scope, expert_map=given_map)
        assert report.digest_verified
        model, held = pushed, held if wish is None else list(wish)
        assert maps_of(control) == held
    trainer.close()
    assert service.bytes() == expected(model, held, tmp_path_factory.mktemp("expected"))


def selects(pattern: str, name: str) -> bool:
    """A pattern with one star, at an end of it."""
    return pattern.strip("*") in name if pattern != "*gate_up_proj" else name.endswith("gate_up_proj")


def test_a_cold_load_with_a_map_gives_the_same_bytes(model_dir: Path, tmp_path: Path) -> None:
    held = [1, 0, 3, 2, 2, 2]
    loaded = [
        cold(model_dir, layout, redundant=REDUNDANT, maps=ExpertMaps({MODULE: tuple(held)}))[1].storage_bytes()
        for layout in LAYOUTS
    ]
    assert loaded == expected(tiny_qwen3_moe(seed=0), held, tmp_path)


@pytest.mark.parametrize("format", ["nvfp4", "fp8"])
def test_tokens_reach_the_experts_that_the_router_names(model_dir: Path, format: str) -> None:
    """The router knows experts; where they lie, and how often, changes nothing."""
    maps = ExpertMaps({MODULE: (2, 0, 3, 1, 0, 0)})
    moved, plain = (cold(model_dir, "plain", format, *more)[0] for more in ((REDUNDANT, maps), ()))
    found = []
    for model in (moved, plain):
        decode_all(model)
        experts = next(each for each in model.modules() if isinstance(each, QuantExperts))
        generator = torch.Generator().manual_seed(1)
        hidden = torch.randn(40, 128, generator=generator).bfloat16()
        chosen = torch.stack([torch.randperm(NUM_EXPERTS + 1, generator=generator)[:2] for _ in range(40)])
        found.append(experts(hidden, chosen, torch.rand(40, 2, generator=generator)))  # 4: routed elsewhere
    assert torch.allclose(*found, rtol=1e-2, atol=1e-3) and found[0].any()


@pytest.mark.parametrize(
    ("given_map", "message"),
    [
        ({MODULE: [0, 1, 2]}, "3 slots, expected 6"),
        ({MODULE: [0, 1, 3, 3, 0, 0]}, r"experts \[2\] are in no slot"),
        ({MODULE: [0, 1, 2, 2, 0, 0]}, "experts.3.gate_proj.weight: its expert is in no slot"),
        ({MODULE: [0, 1, 2, 3, 4, 0]}, "experts.4.gate_proj.weight: missing"),
        ({MODULE: [0, 1, 2, 3, -1, 0]}, "-1 is no expert"),
        ({"model.layers.9.mlp.experts": [0]}, "do not move; those that do: model.layers.0"),
        (torch.zeros(2, SLOTS, dtype=torch.int64), r"got shape \[2, 6\], expected \[1, slots\]"),
    ],
)
def test_a_map_that_does_not_fit_is_refused_before_anything_is_sent(
    service: LocalService, pusher: Pusher, given_map: Any, message: str
) -> None:
    before = service.bytes()
    with pytest.raises(ManifestError, match=message):
        pusher.push(tiny_qwen3_moe(seed=6), expert_map=given_map)
    assert service.bytes() == before


def test_what_a_map_moves_must_be_there(service: LocalService, pusher: Pusher) -> None:
    model = tiny_qwen3_moe(seed=7)
    pusher.push(model, expert_map={MODULE: FIRST})
    norm = model.get_parameter("model.norm.weight")
    with pytest.raises(ManifestError, match=r"experts\.0\.up_proj\.weight: missing, and the new map"):
        pusher.push([("model.norm.weight", norm)], expert_map={MODULE: [1, 0, 2, 3, 0, 1]}, scope="*norm*")


def test_a_partial_push_holds_only_for_the_map_it_was_planned_with(
    service: LocalService, pusher: Pusher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another trainer's map comes between: the slots of this push are no longer what it thinks."""
    pusher.push(tiny_qwen3_moe(seed=7), expert_map={MODULE: FIRST})
    describe = pusher._control.describe

    def overtaken(*known: Any, **how: Any) -> pb.DescribeReply:
        reply = describe(*known, **how)
        other = Pusher(service.address)
        other.push(tiny_qwen3_moe(seed=8), expert_map={MODULE: [3, 2, 1, 0, 0, 0]})
        other.close()
        return reply

    monkeypatch.setattr(pusher._control, "describe", overtaken)
    with pytest.raises(VersionError, match="base version"):
        pusher.push(tiny_qwen3_moe(seed=9), f"{MODULE}.*")


def test_only_services_whose_experts_have_slots_take_a_map(tmp_path: Path) -> None:
    folder = save(tiny_llama(seed=0), tmp_path / "model")
    with local_service(folder, tmp_path, ("plain",)) as running:
        trainer = Pusher(running.address)
        with pytest.raises(ManifestError, match="start the service with --redundant-experts"):
            trainer.push(tiny_llama(seed=1), expert_map={MODULE: [0, 1]})
        trainer.close()
    with pytest.raises(ModelError, match="none can be moved or doubled"):
        build_model(folder, "nvfp4", "plain", redundant_experts=0)


@pytest.mark.slow
def test_the_store_keeps_every_expert_once_and_a_restart_serves_the_map(model_dir: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    held, model = [2, 2, 3, 1, 0, 2], tiny_qwen3_moe(seed=2)
    with local_service(model_dir, tmp_path / "a", LAYOUTS, redundant=REDUNDANT, store_dir=store) as running:
        trainer = Pusher(running.address)
        trainer.push(tiny_qwen3_moe(seed=1), durable=True)
        trainer.push(model, expert_map={MODULE: held}, durable=True)
        small = mixed(model, model, [])
        small.model.norm.weight.data.mul_(2)  # type: ignore[union-attr, operator]
        version = trainer.push(small, durable=True).version  # kept as a delta
        trainer.close()
        before = running.bytes()
    with safe_open(store / "v00000003" / "model-00001-of-00001.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(MODULE) and name.endswith("down_proj.weight")]  # noqa: SIM118
    assert names == [f"{MODULE}.{expert}.down_proj.weight" for expert in range(NUM_EXPERTS)]
    assert (store / f"v{version:08d}" / "delta.safetensors").is_file()
    with local_service(model_dir, tmp_path / "a", LAYOUTS, redundant=REDUNDANT, store_dir=store) as running:
        assert running.bytes() == before == expected(small, held, tmp_path)
        with connect(running.address) as channel:
            control = pb_grpc.ControlStub(channel)
            assert maps_of(control) == held
            call(control.Rollback, pb.RollbackRequest(version=2))
            assert running.bytes() == expected(tiny_qwen3_moe(seed=1), FIRST, tmp_path / "c")
