"""A fleet of Ray actors whose experts move, and one whose replicas hold several formats: what other files show of
receivers in one process, with shards, processes and streams of their own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
import ray

from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from service.fleet import Fleet, FleetConfig
from tests.local import cold
from tests.test_expert_maps import FIRST, MODULE, REDUNDANT, expected, maps_of
from tests.test_fleet import generate
from tests.tiny import save, tiny_llama, tiny_qwen3_moe
from weight_update.client import Pusher
from weight_update.transport import call, connect

pytestmark = pytest.mark.slow
RANKS = 2


def require_whole(fleet: Fleet, replicas: Sequence[dict[str, bytes]]) -> None:
    """The shards of each replica are its storages, cut; what is not sharded lies on every rank."""
    held: list[dict[str, bytes]] = ray.get([rank.stored_bytes.remote() for rank in fleet.ranks])
    for number, whole in enumerate(replicas):
        shards = held[number * RANKS : (number + 1) * RANKS]
        for each in shards:
            each.pop("absent", None)
            assert each.keys() == whole.keys()
        for name, data in whole.items():
            parts = [each[name] for each in shards]
            assert b"".join(parts) == data or parts == [data] * RANKS, f"replica {number}: {name}"


def test_a_map_lands_on_every_shard_with_its_weights_and_goes_back_with_them(tmp_path: Path) -> None:
    config = FleetConfig(
        model=str(save(tiny_qwen3_moe(seed=0), tmp_path / "model")),
        layout="trtllm,cutlass",
        redundant_experts=REDUNDANT,
        replicas=2,
        ranks=RANKS,
        state_dir=tmp_path / "state",
    )
    with Fleet(config) as fleet, closing(Pusher(fleet.address)) as pusher, connect(fleet.address) as channel:
        control = pb_grpc.ControlStub(channel)
        first = pusher.push(tiny_qwen3_moe(seed=1))
        assert maps_of(control) == FIRST
        require_whole(fleet, expected(tiny_qwen3_moe(seed=1), FIRST, tmp_path / "a"))
        moved = [3, 3, 1, 0, 2, 3]
        report = pusher.push(tiny_qwen3_moe(seed=2), expert_map={MODULE: moved})
        assert report.digest_verified and maps_of(control) == moved
        require_whole(fleet, expected(tiny_qwen3_moe(seed=2), moved, tmp_path / "b"))
        assert {token.version for token in generate(fleet)} == {report.version}
        call(control.Rollback, pb.RollbackRequest(version=first.version))
        assert maps_of(control) == FIRST
        require_whole(fleet, expected(tiny_qwen3_moe(seed=1), FIRST, tmp_path / "a"))


def test_every_replica_of_a_fleet_of_several_formats_gets_its_own(tmp_path: Path) -> None:
    kinds = (("nvfp4", "trtllm"), ("fp8", "plain"))
    config = FleetConfig(
        model=str(save(tiny_llama(seed=0), tmp_path / "model")),
        format=",".join(format for format, _ in kinds),
        layout=",".join(layout for _, layout in kinds),
        replicas=len(kinds),
        ranks=RANKS,
        state_dir=tmp_path / "state",
    )
    with Fleet(config) as fleet, closing(Pusher(fleet.address)) as pusher, connect(fleet.address) as channel:
        model = tiny_llama(seed=1)
        for name, mode in (("first", "full"), ("second", "delta")):
            report = pusher.push(model)
            assert report.mode == mode and report.digest_verified
            save(model, tmp_path / name)
            wanted = [cold(tmp_path / name, layout, format)[1].storage_bytes() for format, layout in kinds]
            require_whole(fleet, wanted)
            model = copy.deepcopy(model)
            model.get_parameter("model.layers.1.mlp.down_proj.weight").data[3, :40] *= -1.5
        assert {token.version for token in generate(fleet)} == {report.version}
        assert call(pb_grpc.ControlStub(channel).Verify, pb.VerifyRequest()).ok
