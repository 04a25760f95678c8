"""One service whose replicas hold the model in different formats: each encoded, compared and named by digest once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from service.fleet import FleetConfig
from tests.local import LocalService, cold, local_service, start_rank
from tests.test_push import generate
from tests.test_rollback import wait_for
from tests.tiny import save, tiny_llama
from weight_update.client import Pusher
from weight_update.digest import total
from weight_update.errors import ManifestError, MemberError, PlanError, WeightUpdateError
from weight_update.transport import call, connect

REPLICAS = (("nvfp4", "trtllm"), ("fp8", "plain"), ("bf16", "plain"), ("fp8", "cutlass"))
FORMATS = ",".join(format for format, _ in REPLICAS)
LAYOUTS = tuple(layout for _, layout in REPLICAS)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    folder = tmp_path_factory.mktemp("variants")
    with local_service(save(tiny_llama(seed=0), folder / "model"), folder, LAYOUTS, FORMATS) as running:
        yield running


def held(service: LocalService) -> list[dict[str, bytes]]:
    """The storages of every replica; of what it lacks none has a byte."""
    found = service.bytes()
    assert all(each.pop("absent") == b"" for each in found)
    return found


def alone(model: nn.Module, directory: Path) -> tuple[list[dict[str, bytes]], list[str]]:
    """Storages and digests of services that hold one format each and load these weights."""
    save(model, directory)
    receivers = [cold(directory, layout, format)[1] for format, layout in REPLICAS]
    return [each.storage_bytes() for each in receivers], [total(each.digests()) for each in receivers]


def digests(control: pb_grpc.ControlStub) -> list[str]:
    return [replica.digest for replica in control.Status(pb.StatusRequest()).replicas]


def test_every_replica_gets_its_format_and_the_digest_that_it_has_alone(
    service: LocalService, pusher: Pusher, control: pb_grpc.ControlStub, tmp_path: Path
) -> None:
    addresses = service.addresses()
    first = tiny_llama(seed=1)
    version = pusher.push(first)
    before, wanted = alone(first, tmp_path / "first")
    assert held(service) == before and version.digest_verified
    assert digests(control) == wanted and wanted[1] == wanted[3] and len(set(wanted)) == 3
    names = [spec.name for spec in service.shell.manifest.tensors]
    assert names.count("model.norm.weight") == 1  # alike in all of them: encoded and sent as one
    second = copy.deepcopy(first)
    second.get_parameter("model.layers.1.mlp.down_proj.weight").data[3, :40] *= -1.5
    report = pusher.push(second)
    after, wanted = alone(second, tmp_path / "second")
    assert report.mode == "delta" and held(service) == after and digests(control) == wanted
    assert call(control.Verify, pb.VerifyRequest()).ok
    assert {token.version for token in generate(service.address)} == {report.version}
    call(control.Rollback, pb.RollbackRequest(version=version.version))
    assert held(service) == before
    partly = pusher.push(tiny_llama(seed=2), ["model.layers.0.mlp.*", "*norm*"])
    mixed = copy.deepcopy(first)
    state, other = mixed.state_dict(), tiny_llama(seed=2).state_dict()
    for name in state:
        if name.startswith("model.layers.0.mlp.") or "norm" in name:
            state[name].copy_(other[name])
    assert held(service) == alone(mixed, tmp_path / "partly")[0] and partly.carried_over > 0
    assert service.addresses() == addresses


def test_a_failure_in_one_format_leaves_all_of_them_as_they_were(service: LocalService, pusher: Pusher) -> None:
    pusher.push(tiny_llama(seed=3))
    before = held(service)
    for replica, point in ((1, "prepare"), (2, "installed")):
        service.ranks[replica].faults.arm(point, "raise")
        with pytest.raises(WeightUpdateError, match="planned failure"):
            pusher.push(tiny_llama(seed=4))
        assert held(service) == before


def test_bytes_that_change_in_one_format_only_are_found(
    service: LocalService, pusher: Pusher, control: pb_grpc.ControlStub
) -> None:
    pusher.push(tiny_llama(seed=5))
    storage = service.models[3].get_parameter("model.layers.0.mlp.up_proj.weight")
    storage.data.view(-1)[5] ^= 1
    try:
        reply = call(control.Verify, pb.VerifyRequest())
    finally:
        storage.data.view(-1)[5] ^= 1
    assert list(reply.mismatches) == ["replica 3: fp8:model.layers.0.mlp.up_proj.weight"]


def test_what_a_service_of_several_formats_lacks_is_refused_at_its_start(tmp_path: Path) -> None:
    from service.keeper import StoreConfig

    several = {"model": "smollm2", "format": "nvfp4,fp8"}
    for more, message in (
        ({"replicas": 1}, "fewer replicas than formats: 1"),
        ({"replicas": 2, "redundant_experts": 0}, "redundant experts"),
        ({"replicas": 2, "store": StoreConfig(directory=tmp_path)}, "a version store, which keeps one format"),
    ):
        with pytest.raises(PlanError, match=message):
            FleetConfig(**several, **more)  # type: ignore[arg-type]


def test_checkpoint_form_fits_one_format_and_is_refused(service: LocalService, pusher: Pusher) -> None:
    before = held(service)
    packed = torch.zeros(320, 64, dtype=torch.uint8)  # as NVFP4 has it
    with pytest.raises(ManifestError, match=r"fp8:model\.layers\.0\.mlp\.up_proj\.weight: got \[320, 64\] of U8"):
        pusher.push([("model.layers.0.mlp.up_proj.weight", packed)], "*")
    assert held(service) == before


@pytest.mark.slow
def test_a_replica_that_comes_back_is_filled_by_one_of_its_format_alone(tmp_path: Path) -> None:
    folder = save(tiny_llama(seed=0), tmp_path / "model")
    formats = ["fp8", "nvfp4"]
    with local_service(folder, tmp_path, ("plain",) * 3, "fp8,nvfp4,fp8") as service, connect(service.address) as at:
        control, trainer = pb_grpc.ControlStub(at), Pusher(service.address)
        trainer.push(tiny_llama(seed=1))
        before = service.bytes()
        back = {}
        for replica, format in ((2, "fp8"), (1, "nvfp4")):
            service.ranks[replica].stop()
            back[replica] = start_rank(folder, replica, "plain", format, formats=formats)[0]
            back[replica].empty = True
            call(control.ReplicaAdd, pb.ReplicaAddRequest(addresses=[back[replica].address], dead=True))
        try:
            wait_for(lambda: [each.state for each in control.Status(pb.StatusRequest()).replicas][2] == "serving")
            assert back[2].receiver.storage_bytes() == before[2]
            wait_for(lambda: "another replica in nvfp4" in control.Status(pb.StatusRequest()).replicas[1].reason)
            with pytest.raises(MemberError, match=r"replica 1: .*another replica in nvfp4, and none serves"):
                trainer.push(tiny_llama(seed=2))
        finally:
            trainer.close()
            for rank in back.values():
                rank.stop()
