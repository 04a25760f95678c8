"""The background scrub: a bit that flips in memory is found, its replica fenced and filled anew."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from service import scrubbing
from tests.local import LocalService, cold, local_service, wait_for
from tests.tiny import save, tiny_llama
from weight_update.client import Pusher
from weight_update.receiver import Receiver
from weight_update.transport import connect

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_llama(seed=0), tmp_path_factory.mktemp("model"))


def flip(storage: torch.Tensor, at: int) -> None:
    """One bit of live memory, behind everybody's back."""
    storage.data.view(-1).view(torch.uint8)[at] ^= 1


def ask(service: LocalService, method: str, request: Any) -> Any:
    with connect(service.address) as channel:
        return getattr(pb_grpc.ControlStub(channel), method)(request, timeout=30)


def fences(service: LocalService) -> list[str]:
    """Why replicas were taken out of service, from the audit log."""
    return [text for (text,) in service.shell.index._db.execute("SELECT text FROM events WHERE kind = 'fence'")]


def look(receiver: Receiver) -> list[str]:
    """What one round finds."""
    scrub = scrubbing.Scrub(receiver)
    found = [scrub.look(group, lambda: True) for group in scrub.groups]
    return [each for each in found if each]


def test_every_byte_of_every_tensor_is_read(checkpoint: Path) -> None:
    """A flip at either end, and in the middle, of each tensor's bytes is found, and under its own name only."""
    model, receiver = cold(checkpoint, "plain")
    assert look(receiver) == []
    storages = dict(model.named_parameters()) | dict(model.named_buffers())
    for spec in receiver.manifest.tensors:
        for at in (0, spec.num_bytes // 2, spec.num_bytes - 1):
            flip(storages[spec.name], at)
            (found,) = look(receiver)
            assert f"scrub: {spec.name} reads" in found
            flip(storages[spec.name], at)
    assert look(receiver) == []


def test_slices_cover_a_tensor_whatever_their_size(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, receiver = cold(checkpoint, "trtllm")
    monkeypatch.setattr(scrubbing, "SLICE_BYTES", 1000)
    specs, read = receiver.manifest.tensors, list[int]()
    for group in scrubbing.Scrub(receiver).groups:
        tensors = group[0].tensors
        read += tensors
        if len(tensors) > 1:
            assert len(group) == 1 and sum(specs[i].num_bytes for i in tensors) == group[0].num_bytes <= 1000
            continue
        (spec,) = (specs[i] for i in tensors)
        rows = [row for each in group for row in range(*(each.rows or (0, spec.num_rows)))]
        assert rows == list(range(spec.num_rows))
        assert all(each.num_bytes <= max(1000, spec.row_bytes) for each in group)
    assert read == [i for i, spec in enumerate(specs) if spec.num_bytes] and len(read) > 50
    assert look(receiver) == []


def test_in_a_gpus_memory_tensors_are_read_whole_and_many_at_a_time(checkpoint: Path) -> None:
    """Their digests are made there: nothing goes through the host, and a launch does for all of a kind."""
    _, receiver = cold(checkpoint, "trtllm")
    scrub = scrubbing.Scrub(receiver)
    specs = receiver.manifest.tensors
    groups = list(scrub._grouped(20_000, cut=False))
    assert all(len(group) == 1 for group in groups) and max(len(each.tensors) for (each,) in groups) > 5
    assert [i for (each,) in groups for i in each.tensors] == [i for i, spec in enumerate(specs) if spec.num_bytes]
    assert max(each.num_bytes for (each,) in groups) == max(spec.num_bytes for spec in specs) > 20_000
    for (each,) in groups:
        wanted, is_known = receiver.installed_digests(receiver.version, each.tensors)
        found = scrub.read(receiver.version, each)
        assert (found == receiver.digests(each.tensors)).all() and ((found == wanted).all(axis=1) | ~is_known).all()


def test_a_flipped_bit_fences_its_replica_by_name_and_a_donor_fills_it(checkpoint: Path, tmp_path: Path) -> None:
    with local_service(checkpoint, tmp_path, ("trtllm", "cutlass"), scrub_s=1.0) as service:
        events: list[pb.Event] = []
        watching = threading.Thread(target=lambda: events.extend(service.shell.watch(lambda: True)), daemon=True)
        watching.start()
        pusher = Pusher(service.address)
        version = pusher.push(tiny_llama(seed=1)).version
        before = service.bytes()
        flip(service.models[1].get_parameter(DOWN), 77)
        wait_for(lambda: bool(fences(service)))
        wait_for(lambda: service.bytes() == before)
        wait_for(lambda: all(each.state == "serving" for each in ask(service, "Status", pb.StatusRequest()).replicas))
        (told,) = fences(service)
        assert "replica 1 rank 0" in told and DOWN in told
        assert ask(service, "Verify", pb.VerifyRequest()).ok
        assert pusher.push(tiny_llama(seed=2)).version == version + 1
        pusher.close()


def test_commits_that_come_faster_than_a_round_raise_no_false_alarm(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrubbing, "IDLE_S", 0.0)
    monkeypatch.setattr(scrubbing, "SLICE_BYTES", 4096)
    with local_service(checkpoint, tmp_path, scrub_s=0.05) as service:
        pusher = Pusher(service.address)
        for seed in range(1, 7):
            pusher.push(tiny_llama(seed=seed))
        time.sleep(0.3)  # rounds of the last version; the state that Status shows is up to a tick old
        wait_for(lambda: [each.state for each in ask(service, "Status", pb.StatusRequest()).replicas] == ["serving"])
        assert not fences(service)
        pusher.close()
