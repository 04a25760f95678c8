"""A service that starts again from its version store: the last durable version, and nothing else in silence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import nn

from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from service import keeper as keeping
from service.fleet import Fleet, FleetConfig
from service.keeper import StoreConfig
from tests.local import LocalService, cold, local_service, wait_for
from tests.tiny import save, tiny_llama
from weight_update.client import Pusher
from weight_update.errors import DigestError, ManifestError, MemberError
from weight_update.store import Store
from weight_update.transport import connect

LAYOUTS = ("trtllm", "cutlass")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_llama(seed=0), tmp_path_factory.mktemp("model"))


def ask(service: LocalService, method: str, request: Any) -> Any:
    with connect(service.address) as channel:
        return getattr(pb_grpc.ControlStub(channel), method)(request, timeout=60)


def status(service: LocalService) -> pb.StatusReply:
    reply: pb.StatusReply = ask(service, "Status", pb.StatusRequest())
    return reply


def push(service: LocalService, *models: nn.Module, **options: Any) -> int:
    pusher = Pusher(service.address)
    version = [pusher.push(model, **options).version for model in models][-1]
    pusher.close()
    return version


def cold_bytes(model: nn.Module, directory: Path) -> list[dict[str, bytes]]:
    save(model, directory)
    return [cold(directory, layout)[1].storage_bytes() for layout in LAYOUTS]


def nudged(model: nn.Module) -> nn.Module:
    """A few weights differ, as after a step of training."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "up_proj" in name:
                parameter[3, 5] += 0.25
    return model


@pytest.mark.parametrize("state", ["kept", "gone"])
def test_a_restart_serves_the_last_durable_version_under_its_number(
    state: str, checkpoint: Path, tmp_path: Path
) -> None:
    """Version 3 is stored as changes; with the state folder gone the store alone knows what it is."""
    with local_service(checkpoint, tmp_path / "state", LAYOUTS, store_dir=tmp_path / "store") as service:
        push(service, tiny_llama(seed=1), nudged(tiny_llama(seed=1)), durable=True, step=11)
        before, digest = service.bytes(), status(service).digest
    with local_service(
        checkpoint, tmp_path / {"kept": "state", "gone": "new"}[state], LAYOUTS, store_dir=tmp_path / "store"
    ) as service:
        after = status(service)
        assert [replica.state for replica in after.replicas] == ["serving"] * 2
        assert (after.version, after.digest, after.lost, after.durable_version) == (3, digest, "", 3)
        assert service.bytes() == before == cold_bytes(nudged(tiny_llama(seed=1)), tmp_path / "cold")
        assert ask(service, "Verify", pb.VerifyRequest()).ok
        assert ask(service, "Versions", pb.VersionsRequest()).versions[-1].step == 11
        assert push(service, tiny_llama(seed=2)) == 4


def test_what_was_committed_and_never_stored_is_said_to_be_lost_and_only_an_operator_or_a_full_push_goes_on(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*args: Any) -> None:
        raise MemberError("planned: no store for this one")

    with local_service(checkpoint, tmp_path / "state", LAYOUTS, store_dir=tmp_path / "store") as service:
        push(service, tiny_llama(seed=1), durable=True)
        monkeypatch.setattr(keeping, "fetch", fetch)
        assert push(service, tiny_llama(seed=2)) == 3
        wait_for(lambda: "version 3" in status(service).store)
        monkeypatch.undo()
    with local_service(checkpoint, tmp_path / "state", LAYOUTS, store_dir=tmp_path / "store") as service:
        wait_for(lambda: status(service).lost != "")
        told = status(service)
        assert "version 3" in told.lost and "version 2" in told.lost and "reset" in told.lost
        assert not any(replica.state == "serving" for replica in told.replicas)
        reset = ask(service, "Reset", pb.ResetRequest()).version
        assert (reset.version, reset.restores) == (4, 2)
        wait_for(lambda: all(replica.state == "serving" for replica in status(service).replicas))
        assert status(service).lost == ""
        assert service.bytes() == cold_bytes(tiny_llama(seed=1), tmp_path / "cold")
        wait_for(lambda: status(service).durable_version == 4)


def test_a_rollback_reaches_what_only_the_store_keeps(checkpoint: Path, tmp_path: Path) -> None:
    with local_service(checkpoint, tmp_path / "state", LAYOUTS, store_dir=tmp_path / "store") as service:
        push(service, tiny_llama(seed=1), tiny_llama(seed=2), durable=True)
    with local_service(checkpoint, tmp_path / "state", LAYOUTS, store_dir=tmp_path / "store") as service:
        reachable = [each.version for each in ask(service, "Versions", pb.VersionsRequest()).versions if each.reachable]
        assert reachable == [1, 2]
        assert ask(service, "Rollback", pb.RollbackRequest(version=2)).version.version == 4
        assert service.bytes() == cold_bytes(tiny_llama(seed=1), tmp_path / "cold")


def test_a_damaged_version_is_never_served(checkpoint: Path, tmp_path: Path) -> None:
    with local_service(checkpoint, tmp_path / "state", LAYOUTS, store_dir=tmp_path / "store") as service:
        push(service, tiny_llama(seed=1), durable=True)
    path = tmp_path / "store" / "v00000002" / "model-00001-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    with pytest.raises(DigestError):
        Store.existing(tmp_path / "store").check(2)
    with local_service(checkpoint, tmp_path / "state", LAYOUTS, store_dir=tmp_path / "store") as service:
        wait_for(lambda: "version 2" in status(service).lost)
        assert not any(replica.state == "serving" for replica in status(service).replicas)
        assert push(service, tiny_llama(seed=3)) == 3
        assert service.bytes() == cold_bytes(tiny_llama(seed=3), tmp_path / "cold")


def test_a_store_of_another_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with local_service(checkpoint, tmp_path / "state", store_dir=tmp_path / "store"):
        wait_for(lambda: bool(list((tmp_path / "store").glob("v*"))))
    with (
        pytest.raises(ManifestError, match=r"store/v00000001: 14 problems\n.*wrong checkpoint or --format"),
        local_service(checkpoint, tmp_path / "new", format="bf16", store_dir=tmp_path / "store"),
    ):
        pass


KILLED = """
import os, signal, sys, time
from pathlib import Path
from service.fleet import Fleet, FleetConfig
from service.keeper import StoreConfig
from tests.local import local_service
from tests.tiny import tiny_llama
from weight_update import store_files
from weight_update.client import Pusher

model, place = Path(sys.argv[1]), Path(sys.argv[2])
save_file = store_files.save_file

def save_and_die(tensors, path, **options):
    save_file(tensors, path, **options)
    if ".v00000002" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)

store_files.save_file = save_and_die
with local_service(model, place / "state", store_dir=place / "store") as service:
    while not (place / "store" / "v00000001").exists():
        time.sleep(0.05)
    print(Pusher(service.address).push(tiny_llama(seed=1)).version, flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_a_service_killed_while_it_stores_a_version_leaves_a_store_that_opens(checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(checkpoint), str(tmp_path)]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "store" / ".v00000002").is_dir()
    Store.existing(tmp_path / "store").check(1)
    with local_service(checkpoint, tmp_path / "state", store_dir=tmp_path / "store") as service:
        # The push may not have been answered; it was decided.
        wait_for(lambda: "version 2" in status(service).lost)
        assert not (tmp_path / "store" / ".v00000002").exists()
        assert push(service, tiny_llama(seed=1), durable=True) == 3
    Store.existing(tmp_path / "store").check(3)


@pytest.mark.slow
def test_a_sharded_fleet_starts_again_from_its_store_and_so_does_its_last_replica(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Two ranks in processes of their own; the second version is stored as changes."""
    config = FleetConfig(
        model=str(checkpoint),
        layout="trtllm",
        ranks=2,
        state_dir=tmp_path / "state",
        store=StoreConfig(directory=tmp_path / "store"),
        scrub_s=2.0,
    )

    def stored(fleet: Fleet) -> list[dict[str, bytes]]:
        return ray.get([rank.stored_bytes.remote() for rank in fleet.ranks])

    def state(fleet: Fleet) -> tuple[int, list[str]]:
        with connect(fleet.address) as channel:
            told = pb_grpc.ControlStub(channel).Status(pb.StatusRequest(), timeout=30)
        return told.version, [each.state for each in told.replicas]

    with Fleet(config) as fleet:
        pusher = Pusher(fleet.address)
        for model in (tiny_llama(seed=1), nudged(tiny_llama(seed=1))):
            version = pusher.push(model, durable=True).version
        pusher.close()
        before = stored(fleet)
    assert Store.existing(tmp_path / "store").record(version).base == version - 1
    with Fleet(config) as fleet:
        assert state(fleet) == (version, ["serving"])
        assert stored(fleet) == before
        pids = ray.get([rank.pid.remote() for rank in fleet.ranks])
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: state(fleet)[1] != ["serving"])
        wait_for(lambda: state(fleet) == (version, ["serving"]), timeout_s=90)
        assert stored(fleet) == before
