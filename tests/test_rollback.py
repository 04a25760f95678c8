"""Going back to older versions, replicas that come and go, and what is left when all of them are gone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from service.leases import POLL_S
from service.rank import RankServer
from tests.local import LocalService, cold, local_service, start_rank, wait_for
from tests.tiny import save, tiny_llama
from weight_update.client import Pusher
from weight_update.errors import VersionError, WeightUpdateError
from weight_update.transport import call, connect

LAYOUTS = ("trtllm", "cutlass")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_llama(seed=0), tmp_path_factory.mktemp("model"))


@pytest.fixture
def service(model_dir: Path, tmp_path: Path) -> Iterator[LocalService]:
    with local_service(model_dir, tmp_path, LAYOUTS) as running:
        yield running


def roll_back(control: pb_grpc.ControlStub, version: int) -> pb.VersionInfo:
    info: pb.VersionInfo = call(control.Rollback, pb.RollbackRequest(version=version, pushed_by="me")).version
    return info


def states(control: pb_grpc.ControlStub) -> list[str]:
    return [replica.state for replica in control.Status(pb.StatusRequest()).replicas]


def test_every_rank_goes_back_byte_for_byte_over_one_and_over_several_versions(
    service: LocalService, pusher: Pusher, control: pb_grpc.ControlStub
) -> None:
    held = {1: service.bytes()}
    addresses = service.addresses()
    for seed in (1, 2, 3):
        version = pusher.push(tiny_llama(seed=seed)).version
        held[version] = service.bytes()
    for target in (3, 1, 2, 4):  # the last two: forward again, over a rollback
        info = roll_back(control, target)
        assert (info.restores, info.pushed_by) == (target, "me")
        assert service.bytes() == held[target]
        assert service.addresses() == addresses
        assert control.Verify(pb.VerifyRequest()).ok
        held[info.version] = held[target]
    versions = {info.version: info for info in control.Versions(pb.VersionsRequest()).versions}
    assert list(versions) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert versions[8].digest == versions[4].digest


def test_a_rollback_and_a_partial_push_mix(service: LocalService, pusher: Pusher, control: pb_grpc.ControlStub) -> None:
    first = service.bytes()
    pusher.push(tiny_llama(seed=1), scope=["model.layers.0.*"])
    second = service.bytes()
    pusher.push(tiny_llama(seed=2), scope=["model.layers.1.*", "*norm*"])
    roll_back(control, 2)
    assert service.bytes() == second
    roll_back(control, 1)
    assert service.bytes() == first
    assert pusher.push(tiny_llama(seed=3)).version == 6


def test_a_version_that_is_not_kept_by_all_is_refused_with_those_that_are(
    service: LocalService, pusher: Pusher, control: pb_grpc.ControlStub
) -> None:
    pusher.push(tiny_llama(seed=1))
    pusher.push(tiny_llama(seed=2))
    service.ranks[1].sources.settle()
    service.ranks[1].sources.history._steps.pop(2)
    before = service.bytes()
    with pytest.raises(VersionError, match="version 1 is not kept by every rank; reachable: 2"):
        roll_back(control, 1)
    with pytest.raises(VersionError, match="version 9: unknown"):
        roll_back(control, 9)
    with pytest.raises(VersionError, match="current is 3"):
        roll_back(control, 3)
    with pytest.raises(VersionError, match="nothing is lost"):
        call(control.Reset, pb.ResetRequest(version=2))
    assert service.bytes() == before
    assert roll_back(control, 2).version == 4


def test_a_rank_that_fails_in_a_rollback_leaves_every_byte_as_it_was(
    service: LocalService, pusher: Pusher, control: pb_grpc.ControlStub
) -> None:
    pusher.push(tiny_llama(seed=1))
    before = service.bytes()
    for point in ("open", "prepare", "install", "installed"):
        service.ranks[1].faults.arm(point, "raise")
        with pytest.raises(WeightUpdateError, match="planned failure"):
            roll_back(control, 1)
        assert service.bytes() == before
    assert roll_back(control, 1).version == 3


def test_nothing_goes_on_between_an_undo_and_the_end_of_its_transaction(
    service: LocalService, pusher: Pusher, control: pb_grpc.ControlStub
) -> None:
    """A replica that has its old bytes back waits for its peers: their shards may still be the new ones. Neither the
    lease that it holds nor an operator lets it go on."""
    pusher.push(tiny_llama(seed=1))
    first, second = service.ranks
    second.faults.arm("installed", "raise")
    second.faults.arm("undo", "stall")
    with ThreadPoolExecutor(1) as pool:
        pushing = pool.submit(pusher.push, tiny_llama(seed=2))
        wait_for(lambda: second.faults.stalled == "undo" and first.member.state == "prepared")
        with connect(first.address) as channel:
            call(pb_grpc.MemberStub(channel).Resume, pb.MemberRequest())
        for _ in range(10):
            time.sleep(POLL_S / 4)
            assert first.engine.state == "paused" and first.stale
        second.faults.release()
        with pytest.raises(WeightUpdateError, match="planned failure"):
            pushing.result()
    wait_for(lambda: states(control) == ["serving"] * 2)
    assert not first.stale and not second.stale
    assert pusher.push(tiny_llama(seed=2)).digest_verified


def test_a_replica_that_is_added_takes_the_committed_version_from_a_live_one_and_counts(
    service: LocalService, pusher: Pusher, control: pb_grpc.ControlStub, model_dir: Path, tmp_path: Path
) -> None:
    model = tiny_llama(seed=1)
    pusher.push(model)
    rank, _ = start_rank(model_dir, 2, "trtllm", "nvfp4")  # holds what the model folder holds
    try:
        assert call(control.ReplicaAdd, pb.ReplicaAddRequest(addresses=[rank.address])).replica == 2
        wait_for(lambda: states(control) == ["serving"] * 3)
        expected = cold(save(model, tmp_path / "cold"), "trtllm")[1].storage_bytes()
        assert rank.receiver.storage_bytes() == expected
        assert rank.member.version == 2
        assert len(pusher.push(tiny_llama(seed=2)).replicas) == 3
        call(control.ReplicaRemove, pb.ReplicaRemoveRequest(replica=2))
        assert len(states(control)) == 2
        wait_for(lambda: states(control) == ["serving"] * 2)  # as of a greeting ago, one may be pausing for a commit
        wait_for(lambda: not rank.serves())
        assert len(pusher.push(tiny_llama(seed=3)).replicas) == 2
    finally:
        rank.stop()


def rebuilt(service: LocalService, model_dir: Path, replica: int) -> RankServer:
    """The replica's process is gone, and a new one in its place."""
    service.ranks[replica].stop()
    return start_rank(model_dir, replica, LAYOUTS[replica], "nvfp4")[0]


def test_a_replica_that_dies_is_fenced_and_its_rebuilt_ranks_are_filled_and_serve(
    service: LocalService, pusher: Pusher, control: pb_grpc.ControlStub, model_dir: Path
) -> None:
    pusher.push(tiny_llama(seed=1))
    before = service.bytes()
    rank = rebuilt(service, model_dir, 1)
    try:
        wait_for(lambda: states(control) == ["serving", "fenced"])
        call(control.ReplicaAdd, pb.ReplicaAddRequest(addresses=[rank.address], dead=True))
        wait_for(lambda: states(control) == ["serving", "serving"])
        assert rank.receiver.storage_bytes() == before[1]
        assert pusher.push(tiny_llama(seed=2)).version == 3
    finally:
        rank.stop()


def test_once_no_replica_holds_the_committed_version_only_a_full_push_goes_on(model_dir: Path, tmp_path: Path) -> None:
    with local_service(model_dir, tmp_path, LAYOUTS[:1]) as service, connect(service.address) as channel:
        control, pusher = pb_grpc.ControlStub(channel), Pusher(service.address)
        pusher.push(tiny_llama(seed=1))
        rank = rebuilt(service, model_dir, 0)
        try:
            call(control.ReplicaAdd, pb.ReplicaAddRequest(addresses=[rank.address], dead=True))
            wait_for(lambda: bool(control.Status(pb.StatusRequest()).lost))
            assert "version 2 is held by no replica" in control.Status(pb.StatusRequest()).lost
            assert not rank.serves()
            with pytest.raises(VersionError, match="only a full push"):
                Pusher(service.address).push(tiny_llama(seed=2), scope=["*norm*"])
            with pytest.raises(VersionError, match="reset"):
                roll_back(control, 1)
            model = tiny_llama(seed=2)
            assert Pusher(service.address).push(model).version == 3
            wait_for(rank.serves)
            assert rank.receiver.storage_bytes() == cold(save(model, tmp_path / "c"), "trtllm")[1].storage_bytes()
            assert control.Status(pb.StatusRequest()).lost == ""
        finally:
            rank.stop()
