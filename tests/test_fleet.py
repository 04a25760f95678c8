"""The whole service on Ray: FSDP2-sharded ranks in their own processes, and processes that are really killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import ray
from torch import nn

from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from quant.models import placements_of
from service.fleet import Fleet, FleetConfig
from sharding.fsdp import shard_range
from tests.local import cold, wait_for
from tests.tiny import save, tiny_llama
from weight_update.client import Pusher
from weight_update.errors import WeightUpdateError
from weight_update.transport import connect

LAYOUTS = ("trtllm", "cutlass")
RANKS = 2


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two replicas of two ranks, each replica with its own layout."""
    model_dir = save(tiny_llama(seed=0), tmp_path_factory.mktemp("model"))
    config = FleetConfig(
        model=str(model_dir),
        layout=",".join(LAYOUTS),
        replicas=len(LAYOUTS),
        ranks=RANKS,
        state_dir=tmp_path_factory.mktemp("state"),
    )
    with Fleet(config) as running:
        yield running


@pytest.fixture
def pusher(fleet: Fleet) -> Iterator[Pusher]:
    each = Pusher(fleet.address, lease_s=5.0)
    yield each
    each.close()


@pytest.fixture
def control(fleet: Fleet) -> Iterator[pb_grpc.ControlStub]:
    with connect(fleet.address) as channel:
        yield pb_grpc.ControlStub(channel)


def live_bytes(fleet: Fleet) -> list[dict[str, bytes]]:
    """Every storage of every rank, in the order of fleet.ranks."""
    stored: list[dict[str, bytes]] = ray.get([rank.stored_bytes.remote() for rank in fleet.ranks])
    return stored


def cold_shards(model: nn.Module, directory: Path) -> list[dict[str, bytes]]:
    """What every rank would hold after a cold load: unsharded storages, cut by torch.chunk over units."""
    save(model, directory)
    shards = []
    for layout in LAYOUTS:
        loaded, receiver = cold(directory, layout)
        units = {placement.storage: placement.unit_bytes for placement in placements_of(loaded)}
        whole = receiver.storage_bytes()
        for rank in range(RANKS):
            held = {}
            for name, data in whole.items():
                unit_bytes = units.get(name, len(data))  # derived scalars are one unit
                start, stop = shard_range(len(data) // unit_bytes, rank, RANKS)
                held[name] = data[start * unit_bytes : stop * unit_bytes]
            shards.append(held)
    return shards


def generate(fleet: Fleet, num_tokens: int = 8) -> list[pb.Token]:
    with connect(fleet.address) as channel:
        request = pb.GenerateRequest(
            prompts=[pb.Prompt(token_ids=[3 + i, 4, 5]) for i in range(4)], max_new_tokens=num_tokens, ignore_eos=True
        )
        return list(pb_grpc.GenerationStub(channel).Generate(request, timeout=120))


def test_a_push_leaves_every_shard_of_every_rank_as_a_cold_load_would(
    fleet: Fleet, pusher: Pusher, tmp_path: Path
) -> None:
    before = ray.get([rank.addresses.remote() for rank in fleet.ranks])
    assert live_bytes(fleet) == cold_shards(tiny_llama(seed=0), tmp_path / "first")
    for seed in (1, 2):
        model = tiny_llama(seed=seed)
        report = pusher.push(model)
        assert report.digest_verified
        assert live_bytes(fleet) == cold_shards(model, tmp_path / str(seed))
        tokens = generate(fleet)
        assert {token.version for token in tokens} == {report.version}
        assert len(tokens) == 4 * 8
        assert {token.replica for token in tokens} == {0, 1}
    assert ray.get([rank.addresses.remote() for rank in fleet.ranks]) == before


def test_both_replicas_generate_the_same_tokens_though_their_layouts_differ(fleet: Fleet) -> None:
    with connect(fleet.address) as channel:
        request = pb.GenerateRequest(prompts=[pb.Prompt(token_ids=[7, 8, 9])] * 2, max_new_tokens=12, ignore_eos=True)
        tokens = list(pb_grpc.GenerationStub(channel).Generate(request, timeout=60))
    by_replica = [[token.token_id for token in tokens if token.replica == replica] for replica in (0, 1)]
    assert by_replica[0] == by_replica[1]
    assert len(by_replica[0]) == 12


def test_generation_goes_on_across_a_commit_and_every_rank_switches_at_one_step(fleet: Fleet, pusher: Pusher) -> None:
    with connect(fleet.address) as channel:
        request = pb.GenerateRequest(
            prompts=[pb.Prompt(token_ids=[3 + i, 4, 5]) for i in range(8)], max_new_tokens=400, ignore_eos=True
        )
        stream = pb_grpc.GenerationStub(channel).Generate(request, timeout=120)
        tokens = [next(stream) for _ in range(40)]
        report = pusher.push(tiny_llama(seed=3))
        tokens += list(stream)
    switched: dict[int, set[int]] = {0: set(), 1: set()}
    for sequence in range(8):
        own = [token for token in tokens if token.sequence == sequence]
        versions = [token.version for token in own]
        assert len(versions) == 400
        assert versions == sorted(versions)
        assert set(versions) == {report.base_version, report.version}
        assert list(own[-1].kv_versions) == [report.base_version, report.version]
        switched[own[0].replica].add(versions.index(report.version))
    assert all(len(steps) == 1 for steps in switched.values())  # sequences of one request start at one step


@pytest.mark.parametrize("rank", [2, 3], ids=["leader", "follower"])
@pytest.mark.parametrize("point", ["prepare", "install", "installed"])
def test_a_rank_that_fails_leaves_every_shard_as_it_was_and_serving_goes_on(
    point: str, rank: int, fleet: Fleet, pusher: Pusher, control: pb_grpc.ControlStub
) -> None:
    before, version = live_bytes(fleet), control.Status(pb.StatusRequest()).version
    ray.get(fleet.ranks[rank].arm.remote(point, "raise"))
    with pytest.raises(WeightUpdateError, match="planned failure"):
        pusher.push(tiny_llama(seed=4))
    assert live_bytes(fleet) == before
    assert {token.version for token in generate(fleet)} == {version}
    assert control.Verify(pb.VerifyRequest()).ok


TRAINER = """
import sys, time, torch
sys.path.insert(0, sys.argv[2])
from tests.tiny import tiny_llama
from weight_update import attempt
from weight_update.client import Pusher

pusher = Pusher(sys.argv[1], lease_s=2.0)
send = attempt.send_whole
def stall(*args):
    result = send(*args)
    print("sent", flush=True)
    time.sleep(60)
    return result
attempt.send_whole = stall
pusher.push(tiny_llama(seed=5))
"""


def test_a_trainer_killed_mid_stream_is_forgotten_and_the_next_push_works(
    fleet: Fleet, pusher: Pusher, control: pb_grpc.ControlStub
) -> None:
    before, version = live_bytes(fleet), control.Status(pb.StatusRequest()).version
    root = str(Path(__file__).parent.parent)
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, fleet.address, root], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "sent\n"
    assert control.Status(pb.StatusRequest()).transaction_state == "open"
    trainer.kill()
    trainer.communicate()
    wait_for(lambda: control.Status(pb.StatusRequest()).transaction_state == "", timeout_s=10)
    assert live_bytes(fleet) == before
    assert {token.version for token in generate(fleet)} == {version}
    assert pusher.push(tiny_llama(seed=6)).version == version + 1


def test_a_coordinator_killed_with_ranks_installed_comes_back_and_aborts_what_was_not_decided(
    fleet: Fleet, pusher: Pusher, control: pb_grpc.ControlStub
) -> None:
    before, version = live_bytes(fleet), control.Status(pb.StatusRequest()).version
    decide = pusher._control.decide

    def kill_then_decide(transaction: int, **options: Any) -> pb.DecideReply:
        pusher._control.install(transaction)
        os.kill(ray.get(fleet.coordinator.pid.remote()), signal.SIGKILL)
        return decide(transaction, **options)

    pusher._control.decide = kill_then_decide  # type: ignore[method-assign]
    with pytest.raises(WeightUpdateError):
        pusher.push(tiny_llama(seed=7))

    def back() -> bool:
        try:
            return all(replica.state == "serving" for replica in control.Status(pb.StatusRequest()).replicas)
        except grpc.RpcError:
            return False

    assert wait_for(back, timeout_s=30) < 15
    assert live_bytes(fleet) == before
    assert {token.version for token in generate(fleet)} == {version}
    fresh = Pusher(fleet.address)
    assert fresh.push(tiny_llama(seed=8)).version == version + 1
    fresh.close()


SHARDED_TRAINER = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[2])
from torch.distributed.fsdp import fully_shard
from tests.tiny import tiny_llama
from weight_update.client import Pusher

torch.set_num_threads(1)
dist.init_process_group("gloo")
model = tiny_llama(seed=9, dtype=torch.float32)
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
report = Pusher(sys.argv[1]).push(model)
assert report.digest_verified
if len(sys.argv) > 3:  # one rank's shard gets a NaN: every rank must raise, none may hang
    from weight_update.errors import ManifestError
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.to_local()[-1, 3] = float("nan")
    try:
        Pusher(sys.argv[1]).push(model)
    except ManifestError as error:
        assert "up_proj" in str(error)
        print(dist.get_rank(), "refused")
print(dist.get_rank(), report.version, report.digest, report.wire_bytes)
dist.barrier()
dist.destroy_process_group()
"""


def test_a_trainer_sharded_over_two_ranks_pushes_the_same_bytes_as_one_rank_would(
    fleet: Fleet, control: pb_grpc.ControlStub, tmp_path: Path
) -> None:
    root = str(Path(__file__).parent.parent)
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", SHARDED_TRAINER, fleet.address, root, "then a nan"]
    trainers = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [trainer.communicate(timeout=120)[0].split("\n") for trainer in trainers]
    assert [trainer.returncode for trainer in trainers] == [0, 0]
    assert [lines[0] for lines in outputs] == ["0 refused", "1 refused"]
    assert outputs[0][1].split()[1:] == outputs[1][1].split()[1:]  # all ranks return the same report
    assert live_bytes(fleet) == cold_shards(tiny_llama(seed=9), tmp_path)
    assert control.Verify(pb.VerifyRequest()).ok


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_killed_rank_fences_its_replica_and_the_other_one_serves_until_it_is_back(
    fleet: Fleet, pusher: Pusher, control: pb_grpc.ControlStub, tmp_path: Path
) -> None:
    version = control.Status(pb.StatusRequest()).version
    os.kill(ray.get(fleet.ranks[3].pid.remote()), signal.SIGKILL)
    wait_for(lambda: control.Status(pb.StatusRequest()).replicas[1].state == "fenced", timeout_s=30)
    tokens = generate(fleet)
    assert {(token.replica, token.version) for token in tokens} == {(0, version)}
    assert np.isfinite([token.logprob for token in tokens]).all()
    wait_for(lambda: control.Status(pb.StatusRequest()).replicas[1].state == "serving", timeout_s=90)
    assert {token.replica for token in generate(fleet)} == {0, 1}
    assert pusher.push(tiny_llama(seed=10)).version == version + 1
    assert live_bytes(fleet) == cold_shards(tiny_llama(seed=10), tmp_path)
